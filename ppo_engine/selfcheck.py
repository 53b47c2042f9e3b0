"""The check before the first update: with nothing learned yet, every ratio must be 1.

It runs on the first rollout, changes nothing, and its numbers are kept with the run.  What it finds
wrong would otherwise show as clipping, as KL or as slow learning, and be blamed on the settings.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_engine.config import TrainConfig
from ppo_engine.flat_weights import FlatWeights
from ppo_engine.layout import Layout
from ppo_engine.policy import Policy
from ppo_engine.rollout import Rollout

ROWS = 16
"""Responses looked at, at most."""
NOISE_LIMITS = {"fp32": 1e-4, "bf16": 0.05}
"""Largest |log ratio| without any training that is taken without a warning, in nats."""
SAMPLER_LIMITS = {"fp32": 0.01, "bf16": 0.15}
"""Largest mean |log π_old − log π_behavior|, in nats; rounding alone gives 1e-5 and 0.04."""
_PROBE_STD = 1e-3
_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """What the check measured, and what it thinks of it."""

    numbers: dict[str, Any]
    """By name; JSON types."""
    failures: tuple[str, ...]
    """What makes training pointless; a sentence each."""
    warnings: tuple[str, ...]
    """What deserves a look."""

    @property
    def noise(self) -> float:
        """Largest |log ratio| that rounding alone made, in nats."""
        return float(self.numbers["log_ratio_abs_max"])


def self_check(
    policy: Policy, rollout: Rollout, config: TrainConfig, *, generator: torch.Generator
) -> SelfCheck:
    """Walk over the rollout without learning, and ask every trainable tensor for a gradient.

    Call it on a rollout that the policy as it stands has made, before its first update.  Weights,
    optimizer and the run's random numbers are left exactly as they were.
    """
    drift = _drift_without_learning(policy, rollout, config, generator)
    missing = _tensors_without_gradient(policy, rollout, config, generator)
    mask = rollout.samples.response_mask
    sampler = (rollout.old_logprobs - rollout.samples.behavior_logprobs)[mask].abs()
    kl = (rollout.old_logprobs - rollout.kl_reference_logprobs)[mask].abs()
    ratio = drift.exp()
    numbers = {
        "tokens": drift.numel(),
        "log_ratio_abs_max": _largest(drift.abs()),
        "update_kl_k3": float((torch.expm1(drift) - drift).mean()) if drift.numel() else 0.0,
        "out_of_range_fraction": float(
            ((ratio > 1 + config.clip_high) | (ratio < 1 - config.clip_low)).double().sum()
            / max(1, drift.numel())
        ),
        "kl_reference_abs_max": _largest(kl),
        "sampler_mismatch_mean": float(sampler.double().mean()) if sampler.numel() else 0.0,
        "sampler_mismatch_max": _largest(sampler),
        "tensors_without_gradient": len(missing),
        "such_as": missing[:_NAMED],
        "stopped_responses": int((~rollout.samples.is_truncated).sum()),
        "responses": len(rollout.scores),
        "score_std": rollout.scores.double().std(correction=0).item(),
        "peak_memory_bytes": policy.peak_memory_bytes(),
    }
    return SelfCheck(
        numbers=numbers,
        failures=tuple(_failures(numbers, config)),
        warnings=tuple(_warnings(numbers, config)),
    )


def _drift_without_learning(
    policy: Policy, rollout: Rollout, config: TrainConfig, generator: torch.Generator
) -> Tensor:
    """The log-ratio of every response token, in a walk over the rows in an order of its own.

    In float64 on the CPU.  One half of the walk builds the graph, as a pass does, the other not.
    """
    found = []
    layout = Layout(policy, rollout.samples, config.micro_batch_size)
    order = torch.randperm(len(rollout.scores), generator=generator)[:ROWS]
    for has_graph, rows in zip((True, False), order.chunk(2), strict=False):
        for batch in layout.micro_batches(rows.to(policy.device)):
            mask = rollout.samples.response_mask[batch.rows] & batch.is_real[:, None]
            with torch.set_grad_enabled(has_graph):
                current = policy.evaluate(
                    rollout.samples.tokens[batch.rows],
                    rollout.samples.attention_mask[batch.rows],
                    mask,
                    shape=batch.shape,
                    boundary=rollout.boundary_of(batch.rows),
                    entropy_gradient=config.entropy_coef != 0,
                )
            d = current.logprobs.detach() - rollout.old_logprobs[batch.rows]
            found.append(d[mask].double().cpu())
    return torch.cat(found)


def _tensors_without_gradient(
    policy: Policy, rollout: Rollout, config: TrainConfig, generator: torch.Generator
) -> list[str]:
    """Names of tensors to be trained that are frozen, or that no gradient reaches.

    The adapter's must come from the log-probabilities, the critic's from the values.  A fresh
    adapter's B and a fresh value head are zero, which hides the tensors behind them; so they
    are shaken a little, and afterwards put back bit by bit.
    """
    trained = policy.adapter_parameters() | policy.value_parameters()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    was_trainable = {name: parameter.requires_grad for name, parameter in trained.items()}
    rows = torch.arange(min(len(rollout.scores), config.micro_batch_size), device=policy.device)
    batch = Layout(policy, rollout.samples, config.micro_batch_size).micro_batches(rows)[0]
    mask = rollout.samples.response_mask[batch.rows] & batch.is_real[:, None]
    try:
        with torch.no_grad():
            for parameter in trained.values():
                noise = torch.randn(parameter.shape, generator=generator) * _PROBE_STD
                parameter.add_(noise.to(parameter))
                parameter.requires_grad = True
        current = policy.evaluate(
            rollout.samples.tokens[batch.rows],
            rollout.samples.attention_mask[batch.rows],
            mask,
            boundary=rollout.boundary_of(batch.rows),
            entropy_gradient=False,
        )
        unreached = {
            *_unreached(current.logprobs.sum(), policy.adapter_weights),
            *_unreached(current.values.sum(), policy.value_weights),
        }
        return [name for name in trained if name in unreached or not was_trainable[name]]
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(before[name])
                parameter.requires_grad_(was_trainable[name])


def _unreached(total: Tensor, weights: FlatWeights | None) -> list[str]:
    """Names of the weights that have no gradient of the total."""
    if weights is None:
        return []
    if not total.requires_grad:
        return list(weights.parameters)
    gradients = weights.gradients_of(total)
    return [name for name, each in gradients.items() if not bool(each.abs().sum() > 0)]


def _failures(numbers: dict[str, Any], config: TrainConfig) -> list[str]:
    found = []
    if numbers["kl_reference_abs_max"] != 0:
        found.append(
            "a fresh adapter must equal the reference, but their log-probabilities differ by up to "
            f"{numbers['kl_reference_abs_max']:.3g} nats"
        )
    if count := numbers["tensors_without_gradient"]:
        names = ", ".join(numbers["such_as"])
        found.append(f"no usable gradient reaches {count} trainable tensors, such as {names}")
    limit = SAMPLER_LIMITS[config.precision]
    if not numbers["sampler_mismatch_mean"] <= limit:
        found.append(
            "the sampler's log-probabilities differ from the trainer's by "
            f"{numbers['sampler_mismatch_mean']:.3g} nats per token, more than {limit:g}"
        )
    if not math.isfinite(numbers["log_ratio_abs_max"]):
        found.append("log-probabilities are not finite before any training")
    return found


def _warnings(numbers: dict[str, Any], config: TrainConfig) -> list[str]:
    found = []
    limit = NOISE_LIMITS[config.precision]
    if numbers["log_ratio_abs_max"] > limit:
        found.append(
            f"rounding alone moves log-ratios by up to {numbers['log_ratio_abs_max']:.3g} nats "
            f"(limit {limit:g}): part of the clipping will be noise; precision fp32 has less"
        )
    if numbers["stopped_responses"] == 0:
        found.append(
            "no response ended by itself: all were cut at max_response_tokens, so the reward sees "
            "unfinished answers"
        )
    if numbers["score_std"] == 0:
        found.append("all responses got the same reward: there is nothing to learn from yet")
    return found


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
