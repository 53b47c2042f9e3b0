"""The numbers of one step, read off its rollout and its passes; names as in `reports.METRICS`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_engine.masking import token_mean
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.reports import merge_passes
from ppo_engine.rollout import Rollout
from ppo_engine.update import UpdateResult

MIN_SPREAD = 1e-12
"""Variances below this count as zero: a ratio to them would be noise."""


def mean(numbers: Sequence[float]) -> float:
    """Arithmetic mean of at least one number."""
    return sum(numbers) / len(numbers)


def rollout_values(rollout: Rollout) -> dict[str, float | None]:
    """Rewards, lengths, and the distance to the reference, before the update."""
    samples = rollout.samples
    scores = rollout.scores.float()
    lengths = samples.response_mask.sum(dim=1).float()
    kl = rollout.old_logprobs - rollout.kl_reference_logprobs
    stopped = (~samples.is_truncated).float()
    return {
        "reward_mean": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "reward_p05": scores.quantile(0.05).item(),
        "reward_p95": scores.quantile(0.95).item(),
        "response_tokens_mean": lengths.mean().item(),
        "response_tokens_p95": lengths.quantile(0.95).item(),
        "reward_length_correlation": _correlation(scores, lengths),
        "truncated_response_fraction": 1 - stopped.mean().item(),
        "stopped_response_fraction": stopped.mean().item(),
        "kl_reference_per_sequence": kl.sum(dim=1).mean().item(),
        "kl_reference_per_token": token_mean(kl, samples.response_mask).item(),
        "entropy": token_mean(rollout.entropy, samples.response_mask).item(),
        "advantage_std": rollout.raw_advantage_std,
    }


def update_values(
    rollout: Rollout, result: UpdateResult, optimizer: torch.optim.Optimizer
) -> dict[str, float | None]:
    """Losses, clip statistics over all passes, and how well the critic did."""
    mask = rollout.samples.response_mask
    returns, values = rollout.returns[mask], rollout.old_values[mask]
    return {
        **merge_passes(result.passes),
        "policy_loss": result.policy_loss,
        "value_loss": result.value_loss,
        "value_explained_variance": _explained_variance(values, returns),
        "value_bias": (values - returns).mean().item(),
        "learning_rate": optimizer.param_groups[0]["lr"],
        "value_learning_rate": optimizer.param_groups[1]["lr"],
    }


def sample_rows(
    prompts: Sequence[EncodedPrompt], rollout: Rollout, count: int
) -> tuple[dict[str, Any], ...]:
    """The first `count` responses as text, with their scores."""
    samples = rollout.samples
    kl = (rollout.old_logprobs - rollout.kl_reference_logprobs).sum(dim=1)
    return tuple(
        {
            "row": row,
            "prompt_id": prompts[row].line,
            "messages": list(prompts[row].prompt.messages),
            "completion": samples.texts[row],
            "finish_reason": "length" if bool(samples.is_truncated[row]) else "stop",
            "reward": rollout.scores[row].item(),
            "kl_reference": kl[row].item(),
            "tokens": int(samples.response_mask[row].sum()),
        }
        for row in range(min(count, len(prompts)))
    )


def _explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 − var(G − V)/var(G); None where the returns do not vary."""
    spread = returns.var(correction=0)
    if spread <= MIN_SPREAD:
        return None
    return (1 - (returns - values).var(correction=0) / spread).item()


def _correlation(first: Tensor, second: Tensor) -> float | None:
    """Pearson's; None where one of them does not vary."""
    if min(first.var(correction=0).item(), second.var(correction=0).item()) <= MIN_SPREAD:
        return None
    return torch.corrcoef(torch.stack([first, second]))[0, 1].item()
