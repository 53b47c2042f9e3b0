"""The numbers of one step, read off its rollout and its passes; names as in `reports.METRICS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_engine.advantages import has_equal_scores
from ppo_engine.clip_stats import classify, is_clipped, token_rows
from ppo_engine.config import TrainConfig
from ppo_engine.degeneration import (
    distinct_2,
    identical_response_fraction,
    longest_token_run_mean,
    repeated_4gram_fraction,
)
from ppo_engine.losses import log_ratio
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
    """Rewards, lengths, variety, and the distances to reference and sampler, before the update."""
    samples = rollout.samples
    scores = rollout.scores.float()
    lengths = samples.response_mask.sum(dim=1).float()
    stopped = (~samples.is_truncated).float()
    return {
        "reward_mean": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "reward_p05": scores.quantile(0.05).item(),
        "reward_p95": scores.quantile(0.95).item(),
        "reward_limited_fraction": rollout.limited_score_fraction,
        "response_tokens_mean": lengths.mean().item(),
        "response_tokens_p95": lengths.quantile(0.95).item(),
        "reward_length_correlation": _correlation(scores, lengths),
        "truncated_response_fraction": 1 - stopped.mean().item(),
        "stopped_response_fraction": stopped.mean().item(),
        "advantage_std": rollout.raw_advantage_std,
        "zero_advantage_group_fraction": _equal_groups(rollout),
        **_distances(rollout),
        **_variety(rollout),
    }


def _distances(rollout: Rollout) -> dict[str, float | None]:
    """How far the old policy is from the reference, and the trainer from the sampler."""
    mask = rollout.samples.response_mask
    kl = rollout.old_logprobs - rollout.kl_reference_logprobs
    mismatch = (rollout.old_logprobs - rollout.samples.behavior_logprobs).abs()
    return {
        "kl_reference_per_sequence": kl.sum(dim=1).mean().item(),
        "kl_reference_per_token": token_mean(kl, mask).item(),
        "kl_reference_exact_per_token": token_mean(rollout.kl_exact, mask).item(),
        "reference_perplexity": token_mean(-rollout.kl_reference_logprobs, mask).exp().item(),
        "entropy": token_mean(rollout.entropy, mask).item(),
        "sampler_mismatch_mean": token_mean(mismatch, mask).item(),
        "sampler_mismatch_ratio": token_mean(mismatch.exp(), mask).item(),
    }


def _variety(rollout: Rollout) -> dict[str, float | None]:
    """How much the responses repeat themselves and each other."""
    samples = rollout.samples
    rows = samples.tokens[:, samples.prompt_columns :].cpu()
    responses = [
        row[mask].tolist() for row, mask in zip(rows, samples.response_mask.cpu(), strict=True)
    ]
    return {
        "distinct_2": distinct_2(responses),
        "repeated_4gram_fraction": repeated_4gram_fraction(responses),
        "longest_token_run_mean": longest_token_run_mean(responses),
        "identical_response_fraction": identical_response_fraction(
            samples.texts, samples.group_ids.tolist()
        ),
    }


def _equal_groups(rollout: Rollout) -> float | None:
    """Share of prompts whose responses all got one score; None where prompts have one response."""
    group_ids = rollout.samples.group_ids
    groups = int(group_ids.unique().numel())
    if groups == len(group_ids):
        return None
    equal = has_equal_scores(rollout.scores, group_ids)
    equal_groups: int = group_ids[equal].unique().numel()
    return equal_groups / groups


def update_values(
    rollout: Rollout, result: UpdateResult, config: TrainConfig
) -> dict[str, float | None]:
    """Losses, clip statistics over all passes, and how well the critic did."""
    drifts = [each.values["update_kl_k3"] for each in result.passes]
    known = [drift for drift in drifts if drift is not None]
    return {
        **merge_passes(result.passes),
        "update_kl_k3_max": max(known) if known else None,
        "nonfinite_passes": float(
            sum(each.sums.tokens > 0 and not each.sums.grad_norms for each in result.passes)
        ),
        "skipped_passes": float(sum(each.skipped for each in result.passes)),
        "policy_loss": result.losses.policy.item(),
        "kl_loss": result.losses.kl.item() if config.kl_placement == "loss" else None,
        **_critic_values(rollout, result, config),
    }


def _critic_values(
    rollout: Rollout, result: UpdateResult, config: TrainConfig
) -> dict[str, float | None]:
    """What is known of the critic; nothing where there is none."""
    names = (
        *("value_loss", "value_explained_variance", "value_bias", "return_std"),
        *("value_clip_fraction", "value_out_of_range_fraction"),
    )
    if not config.has_critic:
        return dict.fromkeys(names)
    mask = rollout.samples.response_mask
    returns, values = rollout.returns[mask], rollout.old_values[mask]
    return {
        "value_loss": result.losses.value.item(),
        "value_explained_variance": _explained_variance(values, returns),
        "value_bias": (values - returns).mean().item(),
        "return_std": returns.std(correction=0).item(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is stored of a step's responses: texts, and their tokens one by one."""

    samples: tuple[dict[str, Any], ...]
    tokens: tuple[dict[str, Any], ...]


def kept_responses(
    prompts: Sequence[EncodedPrompt],
    rollout: Rollout,
    result: UpdateResult,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    decode: Callable[[int], str],
) -> Kept:
    """`stored_samples` responses: half of them the most clipped, the others drawn at random.

    `prompts` has one entry per response.
    """
    seen = rollout.loss_mask & (result.last.epoch >= 0)[:, None]
    clipped = _clipped_counts(rollout, result, seen, config)
    rows = _kept_rows(clipped, config.stored_samples, generator)
    by_row = _token_rows(rollout, result, seen, config, rows)
    samples = tuple(
        _sample_row(prompts[row], rollout, row, clipped[row], tokens)
        for row, tokens in zip(rows, by_row, strict=True)
    )
    tokens = tuple(
        {"row": row, "text": decode(token["token_id"]), **token}
        for row, tokens in zip(rows, by_row, strict=True)
        for token in tokens
    )
    return Kept(samples=samples, tokens=tokens)


def _clip_rule(config: TrainConfig) -> dict[str, Any]:
    return {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
    }


def _clipped_counts(
    rollout: Rollout, result: UpdateResult, seen: Tensor, config: TrainConfig
) -> list[int]:
    """Clipped tokens of each response, as its last pass met them."""
    drift = log_ratio(result.last.logprobs, rollout.old_logprobs)
    classes = classify(drift, rollout.advantages, **_clip_rule(config))
    counts: list[int] = (is_clipped(classes) & seen).sum(dim=1).tolist()
    return counts


def _kept_rows(clipped: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Numbers of the responses to keep, ascending."""
    by_clipping = sorted(range(len(clipped)), key=lambda row: -clipped[row])
    chosen = by_clipping[: min(count, len(clipped)) // 2]
    others = by_clipping[len(chosen) :]
    drawn = torch.randperm(len(others), generator=generator)[: count - len(chosen)]
    return sorted([*chosen, *(others[int(index)] for index in drawn)])


def _sample_row(
    prompt: EncodedPrompt, rollout: Rollout, row: int, clipped: int, tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    samples = rollout.samples
    kl = (rollout.old_logprobs[row] - rollout.kl_reference_logprobs[row]).sum()
    return {
        "row": row,
        "prompt_id": prompt.line,
        "messages": list(prompt.prompt.messages),
        "completion": samples.texts[row],
        "finish_reason": "length" if bool(samples.is_truncated[row]) else "stop",
        "reward": rollout.scores[row].item(),
        "kl_reference": kl.item(),
        "tokens": int(samples.response_mask[row].sum()),
        "clipped_tokens": clipped,
        "ratio_max": max((token["ratio"] for token in tokens), default=None),
    }


def _token_rows(
    rollout: Rollout, result: UpdateResult, seen: Tensor, config: TrainConfig, rows: Sequence[int]
) -> list[list[dict[str, Any]]]:
    """The numbered responses' tokens as the last pass that learned from them met them."""
    samples, last = rollout.samples, result.last
    columns = {
        "token_id": samples.tokens[:, samples.prompt_columns :],
        "behavior_logprob": samples.behavior_logprobs,
        "old_logprob": rollout.old_logprobs,
        "logprob": last.logprobs,
        "kl_reference_logprob": rollout.kl_reference_logprobs,
        "reward": rollout.rewards,
        "value": rollout.old_values,
        "return": rollout.returns,
        "position": samples.response_mask.cumsum(dim=1) - 1,
        "epoch": last.epoch[:, None].expand_as(seen),
        "minibatch": last.minibatch[:, None].expand_as(seen),
        "advantage": rollout.advantages,
    }
    tables = []
    for row in rows:
        mask = seen[row]
        chosen = {name: column[row][mask].cpu() for name, column in columns.items()}
        clipping = token_rows(
            logprobs=chosen["logprob"],
            old_logprobs=chosen["old_logprob"],
            advantages=chosen.pop("advantage"),
            **_clip_rule(config),
        )
        flat = {name: column.tolist() for name, column in chosen.items()}
        tables.append(
            [
                {**{name: values[index] for name, values in flat.items()}, **clip}
                for index, clip in enumerate(clipping)
            ]
        )
    return tables


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
