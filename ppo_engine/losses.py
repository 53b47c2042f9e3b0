"""PPO's losses per token; `masking` reduces them, `clip_stats` watches them.

Numerical rules.  Mask before `exp`, never after: infinity times zero is NaN, in the gradient too.
float32 from the logits on.  The log-ratio is bounded before `exp`; `clip_stats` counts the hits,
and the pass is skipped.  Old and new log-probabilities come from the same code path and shapes, so
the first ratio is exactly 1.  Tensors are [B, T] and zero outside the response.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_engine.masking import zero_outside

LOG_RATIO_LIMIT = 20.0
"""Bound on |log ratio|; it only keeps `exp` finite."""


class SurrogateTerms(NamedTuple):
    """The three numbers behind PPO's policy loss, per token."""

    unclipped: Tensor
    """u = ρ·A."""
    clipped: Tensor
    """k = clip(ρ, 1−ε_low, 1+ε_high)·A."""
    objective: Tensor
    """J, to be maximised; the loss is −J."""


class ValueTerms(NamedTuple):
    """The critic's loss per token, and what clipping did to it."""

    error: Tensor
    """Half the larger squared error."""
    is_clipped: Tensor
    """True where clipping binds: the clipped error is the larger one, the gradient is gone."""
    is_out_of_range: Tensor
    """True where the value left the window around the old one."""


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """d_t = log π_θ(a_t|s_t) − log π_old(a_t|s_t), bounded to ±20."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def surrogate_terms(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> SurrogateTerms:
    """PPO's clipped objective per token, to be maximised (arXiv:1707.06347, eq. 7).

        ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)
        J_t = min(ρ_t·A_t, clip(ρ_t, 1−ε_low, 1+ε_high)·A_t)

    With a dual clip c, J_t is at least c·A_t where A_t < 0 (arXiv:1912.09729).
    """
    ratio = torch.exp(log_ratio)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        floor = dual_clip * advantages  # where, not maximum: at a tie maximum halves the gradient
        objective = torch.where((advantages < 0) & (objective < floor), floor, objective)
    return SurrogateTerms(unclipped, clipped, objective)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    """The objective J_t of `surrogate_terms`, straight from log-probabilities; 0 outside the mask.

    Whatever stands outside the mask, NaN included, reaches neither J nor its gradient.
    """
    return surrogate_terms(
        log_ratio(zero_outside(logprobs, response_mask), zero_outside(old_logprobs, response_mask)),
        zero_outside(advantages, response_mask),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    ).objective


def importance_weights(
    old_logprobs: Tensor, behavior_logprobs: Tensor, response_mask: Tensor, *, cap: float
) -> Tensor:
    """Truncated importance-sampling weights, detached; [B, T], zero outside the mask.

        w_t = min(π_old(a_t|s_t) / π_behavior(a_t|s_t), cap)

    They correct for a sampler whose numbers differ from the trainer's (decoupled PPO,
    arXiv:2110.00641; the bound: arXiv:1802.01561).  w multiplies J.
    """
    drift = log_ratio(
        zero_outside(old_logprobs, response_mask), zero_outside(behavior_logprobs, response_mask)
    )
    return zero_outside(torch.exp(drift).clamp(max=cap), response_mask).detach()


def clipped_value_error(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None
) -> ValueTerms:
    """The critic's error per token, pessimistic about moves beyond the window (OpenAI Baselines).

        V_c = V_old + clip(V − V_old, ±ε_v)
        ½ · max((V − G)², (V_c − G)²)

    Without a range it is ½ · (V − G)².
    """
    error = (values - returns).square()
    if clip_range is None:
        nowhere = torch.zeros_like(values, dtype=torch.bool)
        return ValueTerms(error / 2, nowhere, nowhere)
    low, high = old_values - clip_range, old_values + clip_range
    # A clamp between bounds: V_old + (V − V_old) differs from V by rounding inside the window.
    clipped_error = (torch.clamp(values, low, high) - returns).square()
    return ValueTerms(
        torch.maximum(error, clipped_error) / 2,
        clipped_error > error,
        (values < low) | (values > high),
    )
