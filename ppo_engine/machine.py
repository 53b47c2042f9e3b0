"""What this machine is good at, measured: which number format is fast, how much fits at once."""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_engine.native import product_kernels_for
from ppo_engine.products import is_packable

_SHAPE = (512, 576, 1536)
"""A linear layer of a small model: tokens, inputs, outputs."""
_REPETITIONS = 7
_SECONDS = 0.4
"""At most, for one format: where it is slow, a few products say so."""
_WORTH_IT = 1.5
"""bf16 rounds; it is taken where its products are faster by this factor."""
_TOKENS = {"cuda": 16_384}
_CPU_TOKENS = 1024
"""Tokens of a micro-batch beyond which measured steps get no faster."""
_SHARE_OF_MEMORY = 0.5
"""Of what is free, for the activations of one micro-batch."""
_SHARE_FOR_COPIES = 0.1
_BLOCK_ENTRIES = {"cuda": 16_384}
_CPU_BLOCK_ENTRIES = 2048
_SCORE_BYTES = 4
_SCORES_AT_ONCE = 3
"""Tensors as large as the scores that are held at the same time."""


def gemm_gflops(device: str) -> dict[str, float]:
    """Speed of a typical matrix product by number format, median of a few; GFLOP/s."""
    return {
        "fp32": _gflops(device, torch.float32),
        "bf16": _gflops(device, torch.bfloat16),
    }


def faster_precision(gflops: dict[str, float]) -> str:
    """`bf16` where its products are clearly faster than those of `fp32`."""
    return "bf16" if gflops["bf16"] >= _WORTH_IT * gflops["fp32"] else "fp32"


def _gflops(device: str, dtype: torch.dtype) -> float:
    tokens, inputs, outputs = _SHAPE
    left = torch.ones(tokens, inputs, dtype=dtype, device=device)
    right = torch.ones(inputs, outputs, dtype=dtype, device=device)
    seconds: list[float] = []
    _timed(left, right)  # the first product of a kind sets kernels up
    while len(seconds) < _REPETITIONS and sum(seconds) < _SECONDS:
        seconds.append(_timed(left, right))
    return 2 * tokens * inputs * outputs / statistics.median(seconds) / 1e9


def _timed(left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    product = left @ right
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def micro_batch_rows(model: Any, device: str, *, longest_row: int, minibatch_size: int) -> int:
    """Rows of `longest_row` tokens for one forward and backward pass.

    As many as make the step faster, as the free memory holds, and as a minibatch has.
    """
    by_speed = _TOKENS.get(device, _CPU_TOKENS)
    by_memory = int(_SHARE_OF_MEMORY * free_bytes(device) / bytes_per_token(model))
    return max(1, min(minibatch_size, min(by_speed, by_memory) // longest_row))


def bytes_per_token(model: Any) -> int:
    """Memory that one token holds between the forward and the backward pass, estimated."""
    config = model.config
    heads, kv, head_size = _head_shape(config)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    attention = 2 * (heads + kv) * head_size
    layer = 2 * config.hidden_size + attention + 2 * inner
    size: int = config.num_hidden_layers * layer * model.dtype.itemsize
    return size


def _head_shape(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads and their size; some families name the first alone."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv, getattr(config, "head_dim", None) or config.hidden_size // heads


def block_entries(device: str) -> int:
    """Vocabulary entries whose scores are held at once; on a CPU they stay in its caches."""
    return _BLOCK_ENTRIES.get(device, _CPU_BLOCK_ENTRIES)


def step_bytes(
    model: Any,
    device: str,
    *,
    responses: int,
    micro_batch_rows: int,
    longest_row: int,
    response_tokens: int,
) -> int:
    """Most memory that a step takes on top of the weights, estimated.

    The larger one of sampling's, keys and values with whole rows of scores and a copy of the
    weights, and learning's, activations with a block of scores; and the head's copy.
    """
    config = model.config
    _, kv, head_size = _head_shape(config)
    cache = 2 * kv * head_size * config.num_hidden_layers * model.dtype.itemsize
    scores = _SCORES_AT_ONCE * _SCORE_BYTES
    sampling = responses * (longest_row * cache + config.vocab_size * scores)
    sampling += packed_copy_bytes(_inner_weights(model))
    block = min(config.vocab_size, block_entries(device)) * scores
    learning = micro_batch_rows * (longest_row * bytes_per_token(model) + response_tokens * block)
    needed: int = max(sampling, learning) + _head_copy_bytes(model)
    return needed


def _inner_weights(model: Any) -> list[Tensor]:
    """Matrices between the embedding and the output head."""
    outside = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return [
        weight
        for weight in model.parameters()
        if weight.ndim == 2 and not any(weight is each for each in outside)
    ]


def _head_copy_bytes(model: Any) -> int:
    """Of the copy in fp32 that a CPU makes scores with where it has no kernels for the format."""
    weight = model.get_output_embeddings().weight
    if product_kernels_for(weight) is not None:
        return 0
    is_copied = weight.dtype != torch.float32 or is_packable(weight.device, torch.float32)
    return weight.numel() * _SCORE_BYTES if is_copied and not weight.is_cuda else 0


def packed_copy_bytes(weights: Sequence[Tensor]) -> int:
    """What packed copies of the weights take while responses are sampled; 0 where none are made.

    Our kernels for products take the weights as they are.
    They may take a share of all memory, not of what is free: a run must do the same when it is
    taken up again.
    """
    needed = sum(weight.nbytes for weight in weights)
    limit = _SHARE_FOR_COPIES * min(_total_bytes(), _group_limit_bytes())
    are_packable = all(
        is_packable(each.device, each.dtype) and product_kernels_for(each) is None
        for each in weights
    )
    return needed if are_packable and needed <= limit else 0


def free_bytes(device: str) -> int:
    """Memory that can still be taken: of the device, or within the system's and container's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min(_available_bytes(), _group_limit_bytes())


def _available_bytes() -> int:
    """What the system could give without swapping; half of all memory where it does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _total_bytes() // 2


def _total_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limit_bytes() -> int:
    """The limit of the container, if there is one."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.exists() else "max"
    return 2**63 if text == "max" else int(text)
