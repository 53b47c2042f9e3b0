"""Next-token scores of growing sequences: the models' side of sampling, with a key-value cache.

`DecoderGeneration` runs our own decoder, `ModelGeneration` transformers' forward pass; the sampler
does not see the difference.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ppo_engine.decoder import Decoder, gated, rms_norm
from ppo_engine.key_values import FusedKeyValues, KeyValues, Prompts, key_values
from ppo_engine.linear_groups import GroupAdapters, LinearGroup
from ppo_engine.logprobs import OutputHead
from ppo_engine.machine import packed_copy_bytes
from ppo_engine.native import product_kernels_for
from ppo_engine.packing import Packed, common_prefix, pack
from ppo_engine.products import PackedWeight


class Patience(NamedTuple):
    """When finished sequences are worth a thought."""

    steps: int
    """Tokens between two looks at which have ended."""
    share: float
    """They are dropped when they are this share: fewer are not worth moving the cache."""


_STEP_BY_STEP = Patience(steps=1, share=0.125)
_RECORDED = Patience(steps=8, share=0.5)
"""A look stops the device, and after a change the work on a token must be recorded anew."""


class Generation(Protocol):
    """Sequences in the making; row i of every tensor belongs to sequence i."""

    @property
    def patience(self) -> Patience:
        """When finished sequences are worth a thought."""

    def start(self, tokens: Tensor, attention_mask: Tensor, *, copies: int) -> Tensor:
        """Scores [B·copies, V] after prompts [B, P]; copies of a prompt stand side by side."""

    def step(self, tokens: Tensor) -> Tensor:
        """Scores z/τ [B, V] after one more token of each sequence; [B] in."""

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""


class DecoderGeneration:
    """Our own decoder: prompts are read once per group, keys stand where they stay."""

    def __init__(
        self,
        decoder: Decoder,
        head: OutputHead,
        adapter: str | None,
        *,
        max_response_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._head = head
        self._linears = _linears(decoder, adapter)
        self._adapter = adapter
        self._room = max_response_tokens
        self._cache: KeyValues
        self._recorded: _RecordedStep | None = None

    @property
    def patience(self) -> Patience:
        """When finished sequences are worth a thought."""
        return _RECORDED if self._is_recordable else _STEP_BY_STEP

    @property
    def _is_recordable(self) -> bool:
        return isinstance(self._cache, FusedKeyValues)

    def start(self, tokens: Tensor, attention_mask: Tensor, *, copies: int) -> Tensor:
        """Scores [B·copies, V] after prompts [B, P]; copies of a prompt stand side by side."""
        read = torch.zeros_like(attention_mask)
        read[:, -1] = True
        prefix = common_prefix(tokens, attention_mask, read)
        packed = pack(attention_mask, read, prefix=prefix)
        layers: list[Tensor] = []
        states = self._decoder.states(tokens, packed, adapter=self._adapter, collected=layers)
        lengths = attention_mask.sum(dim=1) - prefix
        prompts = Prompts(
            layers=layers,
            prefix=prefix,
            places=_own_places(packed, lengths),
            lengths=lengths,
            copies=copies,
            room=self._room,
        )
        self._cache = key_values(prompts, self._decoder.shape)
        return self._head.scores(states).repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Scores z/τ [B, V] after one more token of each sequence; [B] in.

        On a GPU they stay what they are until the next step.
        """
        if not self._is_recordable:
            scores = self._scores(tokens)
        else:
            if self._recorded is None:
                self._recorded = _RecordedStep(self._scores, tokens)
            scores = self._recorded.play(tokens)
        self._cache.advance()
        return scores

    def _scores(self, tokens: Tensor) -> Tensor:
        decoder, cache = self._decoder, self._cache
        rotation = decoder.rotation(cache.positions)
        hidden = decoder.embedded(tokens)
        for number, layer in enumerate(decoder.layers):
            into_attention, out_of_attention, into_mlp, out_of_mlp = self._linears[number]
            normed, _ = rms_norm(hidden, layer.attention_norm, decoder.epsilon)
            qkv = into_attention.outputs(normed).contiguous()
            rotation.turn(qkv, decoder.shape)
            attended = cache.attend(number, qkv.unflatten(1, (-1, decoder.shape.size)))
            hidden = out_of_attention.outputs(attended, onto=hidden)
            normed, _ = rms_norm(hidden, layer.mlp_norm, decoder.epsilon)
            gate_up = into_mlp.outputs(normed).contiguous()
            hidden = out_of_mlp.outputs(gated(gate_up), onto=hidden)
        states, _ = rms_norm(hidden, decoder.norm, decoder.epsilon)
        return self._head.scores(states)

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""
        self._recorded = None
        self._cache.keep(rows)


class _RecordedStep:
    """The work on one token of each sequence as a CUDA graph.

    Its hundreds of small kernels take longer to start from Python than to run.
    """

    def __init__(self, scores: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        before = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            scores(self._tokens)  # sets kernels up; what it writes is written again
        before.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = scores(self._tokens)

    def play(self, tokens: Tensor) -> Tensor:
        """What `scores` gives for these tokens."""
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._result


class _Linear(Protocol):
    """A group of linear layers with its adapters."""

    def outputs(self, inputs: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """[N, Σ out] of [N, in], added to `onto`."""


class _RowLinear:
    """On the weights as they are; one addition a group, for where the number of products counts."""

    def __init__(self, group: LinearGroup, adapters: GroupAdapters) -> None:
        self._group = group
        self._adapters = adapters.joined(len(group.weight))

    def outputs(self, inputs: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """[N, Σ out] of [N, in], added to `onto`."""
        return self._group.forward(inputs, self._adapters, onto=onto)[0]


class _ColumnLinear:
    """On the weights as they are, from the left: faster for few tokens on a CPU."""

    def __init__(self, group: LinearGroup, adapters: GroupAdapters) -> None:
        self._group = group
        self._adapters = adapters

    def outputs(self, inputs: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """[N, Σ out] of [N, in], added to `onto`."""
        columns = inputs.t()
        result = self._group.weight @ columns
        if self._group.bias is not None:
            result += self._group.bias[:, None]
        if (low_rank := self._adapters.low_rank) is not None:
            inner = low_rank.down @ columns
            for part, rank, up in self._adapters.additions:
                result[part].addmm_(up, inner[rank])
        return result.t() if onto is None else onto + result.t()


class _NativeLinear:
    """On the weights as they are, by our kernel: their adapters' additions in the same sums."""

    def __init__(self, group: LinearGroup, adapters: GroupAdapters) -> None:
        kernels = product_kernels_for(group.weight)
        assert kernels is not None  # noqa: S101 - or another kind was chosen
        self._kernels = kernels
        self._weight = group.weight
        self._bias = None if group.bias is None else group.bias.float()
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        if adapters.low_rank is not None:
            (addition,) = adapters.joined(len(group.weight)).additions
            self._down, self._up = adapters.low_rank.down, addition.up.contiguous()

    def outputs(self, inputs: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """[N, Σ out] of [N, in], added to `onto`."""
        low_rank = None
        if self._down is not None and self._up is not None:
            low_rank = self._kernels.product(inputs, self._down), self._up
        return self._kernels.product(
            inputs, self._weight, low_rank=low_rank, bias=self._bias, onto=onto
        )


class _PackedLinear:
    """On a packed copy of the weights, with the adapters' inner values as further inputs."""

    def __init__(self, group: LinearGroup, adapters: GroupAdapters) -> None:
        weight = group.weight
        self._down = None
        if adapters.low_rank is not None:
            self._down = PackedWeight(adapters.low_rank.down)
            (addition,) = adapters.joined(len(weight)).additions
            weight = torch.cat([weight, addition.up], dim=1)
        self._weight, self._bias = PackedWeight(weight), group.bias

    def outputs(self, inputs: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """[N, Σ out] of [N, in], added to `onto`."""
        if self._down is not None:
            inputs = torch.cat([inputs, self._down.product(inputs)], dim=1)
        return self._weight.product(inputs, bias=self._bias, onto=onto)


def _kind_for(decoder: Decoder) -> Callable[[LinearGroup, GroupAdapters], _Linear]:
    """On a CPU by our kernels, or packed, if that can be and the copies are small beside memory."""
    if decoder.norm.is_cuda:
        return _RowLinear
    if product_kernels_for(decoder.norm) is not None:
        return _NativeLinear
    weights = [group.weight for layer in decoder.layers for group in layer.groups]
    return _PackedLinear if packed_copy_bytes(weights) else _ColumnLinear


def _linears(decoder: Decoder, adapter: str | None) -> list[list[_Linear]]:
    """Each layer's groups."""
    kind = _kind_for(decoder)
    return [
        [kind(group, each) for group, each in zip(layer.groups, of_layer, strict=True)]
        for layer, of_layer in zip(decoder.layers, decoder.group_adapters(adapter), strict=True)
    ]


def _own_places(packed: Packed, lengths: Tensor) -> Tensor:
    """Where each prompt's own tokens stand in the flat sequence, [B, C]; behind its end anything.

    `kept` holds the place of every row's last token.
    """
    longest = int(lengths.max())
    first = packed.kept[: packed.num_kept] - lengths + 1
    places = first[:, None] + torch.arange(longest, device=lengths.device)
    return places.clamp(max=len(packed.sources) - 1)


class ModelGeneration:
    """Transformers' forward pass and cache, for models that our decoder does not know."""

    def __init__(self, forward: "CachedForward", head: OutputHead) -> None:
        self._forward = forward
        self._head = head
        self._cache: Any = None
        self._mask: Tensor
        self._positions: Tensor

    @property
    def patience(self) -> Patience:
        """When finished sequences are worth a thought."""
        return _STEP_BY_STEP

    def start(self, tokens: Tensor, attention_mask: Tensor, *, copies: int) -> Tensor:
        """Scores [B·copies, V] after prompts [B, P]; copies of a prompt stand side by side."""
        positions = position_ids(attention_mask)
        states, self._cache = self._forward(tokens, attention_mask, positions, None)
        self._cache.batch_repeat_interleave(copies)
        self._mask = attention_mask.repeat_interleave(copies, dim=0)
        self._positions = positions[:, -1:].repeat_interleave(copies, dim=0)
        return self._scores(states).repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Scores z/τ [B, V] after one more token of each sequence; [B] in."""
        self._mask = nn.functional.pad(self._mask, (0, 1), value=True)
        self._positions = self._positions + 1
        states, self._cache = self._forward(
            tokens[:, None], self._mask, self._positions, self._cache
        )
        return self._scores(states)

    def _scores(self, states: Tensor) -> Tensor:
        return self._head.scores(states[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


class CachedForward(Protocol):
    """A model's forward pass that grows a cache."""

    def __call__(
        self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Hidden states [B, Q, H] of new tokens [B, Q], and the grown cache."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding moves nothing; [B, S] int64."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
