"""The engine on a CUDA device, on a tiny model; without one these tests skip."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_engine.attention import FusedAttention, HeadShape, PlainKernel, SpanwiseAttention
from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.config import TrainConfig
from ppo_engine.export import BaseModelRef
from ppo_engine.packing import pack
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.sampling import Sampler
from ppo_engine.trainer import Trainer
from tests.tiny_model import make_tiny_model
from tests.tiny_run import AsciiShare, tiny_config, tiny_prompts, tiny_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# fp32 matrix products of two devices add in another order.
CLOSE = 2e-3
NOISE = 1e-5
# bf16 keeps eight bits of a number of about one.
ROUNDED = 0.03


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def cuda_trainer(folder: Path, config: TrainConfig, *, seed: int = 0) -> Trainer:
    base = BaseModel.load(folder, precision=config.precision, device="cuda")
    policy = Policy(
        base,
        config.lora,
        temperature=config.temperature,
        seed=seed,
        critic=config.critic if config.has_critic else None,
    )
    prompts = tiny_prompts(base)
    return Trainer(policy, AsciiShare(), prompts, config, seed=seed, validation=prompts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_first_ratio_is_one(model: Path, precision: str, micro_batch_size: int) -> None:
    config = tiny_config(precision=precision, micro_batch_size=micro_batch_size)
    report = next(cuda_trainer(model, config).steps())

    (check,) = [event for event in report.events if event.code == "self_check.passed"]
    first = report.passes[0].values
    # Kernels may take another path for another alignment of the same rows.
    assert check.data["log_ratio_abs_max"] < NOISE
    assert check.data["kl_reference_abs_max"] == 0
    assert first["log_ratio_abs_max"] < NOISE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantage_estimator": "grpo", "group_size": 3, "kl_coef": 0.0},
        {"kl_placement": "loss", "kl_estimator": "k2", "importance_weight_cap": 2.0},
        {"critic": "adapter", "mask_truncated": True, "bootstrap_truncated": True},
        {"critic": "detached_head", "lam": "length_adaptive", "lambda_value": 1.0},
    ],
)
def test_every_kind_of_run_works(model: Path, changes: dict[str, Any]) -> None:
    config = TrainConfig.from_dict(tiny_config(total_steps=2).to_dict() | changes)

    reports = list(cuda_trainer(model, config).steps())

    assert [report.step for report in reports] == [1, 2]
    assert all(sum(p.sums.counts) == p.sums.tokens for r in reports for p in r.passes)


def test_the_first_update_is_that_of_the_cpu(model: Path) -> None:
    # Prompts, samples and order come from generators of the CPU: the same tokens on both.
    config = tiny_config(total_steps=1)
    on_cpu = next(tiny_trainer(model, config).steps())
    on_cuda = next(cuda_trainer(model, config).steps())

    assert [s["completion"] for s in on_cuda.samples] == [s["completion"] for s in on_cpu.samples]
    for name in ("reward_mean", "entropy", "policy_loss", "value_loss", "grad_norm"):
        assert on_cuda.values[name] == pytest.approx(on_cpu.values[name], rel=CLOSE, abs=CLOSE)


def test_a_tiny_model_learns_in_bf16(model: Path) -> None:
    config = tiny_config(
        total_steps=40, batch_size=32, micro_batch_size=16, kl_coef=0.0, max_response_tokens=12
    )
    config = dataclasses.replace(config, precision="bf16")

    rewards = [report.values["reward_mean"] for report in cuda_trainer(model, config).steps()]

    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


def test_a_checkpoint_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    base_model = BaseModelRef(id="tests/tiny-random", path=str(model), sha256="0" * 64)
    first = cuda_trainer(model, tiny_config())
    list(itertools.islice(first.steps(), 2))
    save_checkpoint(first, tmp_path / "ck", base_model)

    second = cuda_trainer(model, tiny_config())
    restore_checkpoint(second, tmp_path / "ck")

    assert second.progress == first.progress
    for name, weight in first.policy.adapter_parameters().items():
        assert torch.equal(weight, second.policy.adapter_parameters()[name])
    assert next(second.steps()).step == 3


def test_peak_memory_is_that_of_the_device(model: Path) -> None:
    report = next(cuda_trainer(model, tiny_config()).steps())

    assert report.values["peak_memory_bytes"] == torch.cuda.max_memory_allocated()


SHAPE = HeadShape(queries=6, keys=2, size=16)


@pytest.mark.parametrize("prefix", [0, 16])
def test_the_fused_attention_is_the_plain_one(prefix: int) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 9, (5, 40), generator=generator)
    tokens[:, :prefix] = 1
    mask = torch.ones(5, 40, dtype=torch.bool)
    read = torch.zeros_like(mask)
    for row, (start, end) in enumerate([(20, 40), (20, 38), (30, 33), (20, 38), (25, 36)]):
        read[row, start:end] = True
    packed = pack(mask.cuda(), read.cuda(), prefix=prefix, pad_to=256)
    wide = torch.randn(len(packed.sources), sum(SHAPE.widths), generator=generator).cuda()
    of_result = torch.randn(len(wide), SHAPE.widths[0], generator=generator).cuda()
    of_result[~packed.is_real] = 0

    plain = SpanwiseAttention(packed, SHAPE, wide, PlainKernel)
    expected = plain.forward(wide)
    of_wide = plain.backward(wide, expected, of_result)
    fused = FusedAttention(packed, SHAPE)
    found = fused.forward(wide.bfloat16())
    of_half = fused.backward(wide.bfloat16(), found, of_result.bfloat16())

    real = packed.is_real
    assert (found.result[real].float() - expected.result[real]).abs().max() < ROUNDED
    assert (of_half.float() - of_wide)[real].abs().max() < ROUNDED * of_wide.abs().max()


def test_sampling_knows_the_log_probabilities_of_its_tokens(model: Path) -> None:
    base = BaseModel.load(model, precision="bf16", device="cuda")
    # Many rows stop early: recorded steps are recorded anew for those that go on.
    base = dataclasses.replace(base, stop_ids=tuple(range(0, 258, 9)))
    policy = Policy(base, tiny_config().lora, temperature=1.0, seed=0)
    for name, weight in policy.adapter_parameters().items():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    sampler = Sampler(policy=policy, max_response_tokens=24)
    samples = sampler.sample(tiny_prompts(base), torch.Generator().manual_seed(1), group_size=3)

    found = policy.evaluate(samples.tokens, samples.attention_mask, samples.response_mask)

    lengths = samples.response_mask.sum(dim=1)
    assert lengths.min() < 8 < lengths.max()
    apart = (found.logprobs - samples.behavior_logprobs)[samples.response_mask].abs()
    assert apart.max() < ROUNDED
    assert apart.mean() < ROUNDED / 10
