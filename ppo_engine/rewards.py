"""From raw scores to token rewards: scaling, shaping, then the KL penalty.

The user always sees raw scores; what is made here is what the learner sees.
"""

from typing import Any

import torch
from torch import Tensor

from ppo_engine.masking import zero_outside

_SCALED_LIMIT = 10.0
"""Bound on a scaled score, in standard deviations."""


class RunningStd:
    """Standard deviation of all scores so far, by which scores are divided (arXiv:2307.04964).

    The deviation is the population's; the mean is not removed.  Take a rollout's scores in with
    `update` before scaling them.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    def is_limited(self, scores: Tensor) -> Tensor:
        """Whether each score, in standard deviations, lies beyond the bound of ±10."""
        return (scores / (self.std or 1.0)).abs() > _SCALED_LIMIT

    @property
    def std(self) -> float:
        """Standard deviation so far; 0 before there are two different scores."""
        return float((self._squares / max(self._count, 1)) ** 0.5)

    def update(self, scores: Tensor) -> None:
        """Take scores in (Chan et al.'s update: batches of any size give the same result)."""
        new = scores.detach().double().cpu()
        count = new.numel()
        if not count:
            return
        mean = float(new.sum()) / count
        squares = float((new - mean).square().sum())
        total = self._count + count
        shift = mean - self._mean
        self._squares += squares + shift**2 * self._count * count / total
        self._mean += shift * count / total
        self._count = total

    def scale(self, scores: Tensor) -> Tensor:
        """Scores in standard deviations, bounded to ±10; at deviation 0 only bounded."""
        return (scores / (self.std or 1.0)).clamp(-_SCALED_LIMIT, _SCALED_LIMIT)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._count = int(state["count"])
        self._mean = float(state["mean"])
        self._squares = float(state["squares"])


def shape_scores(scores: Tensor, is_truncated: Tensor, *, missing_stop_penalty: float) -> Tensor:
    """Scores, with the penalty taken off where no stop token ended the response.  [B]."""
    return torch.where(is_truncated, scores - missing_stop_penalty, scores)


def overlong_penalty(
    lengths: Tensor, *, max_response_tokens: int, buffer_tokens: int, penalty: float
) -> Tensor:
    """What a long response loses: nothing before the buffer, then evenly down to −penalty.  [B].

        0                                               L ≤ T_max − b
        −penalty · (L − (T_max − b)) / b                in the buffer's b tokens before T_max

    The soft punishment of DAPO (arXiv:2503.14476, eq. 13), to be added to the score.
    """
    over = lengths - (max_response_tokens - buffer_tokens)
    return -penalty * (over / buffer_tokens).clamp(0.0, 1.0)


def bootstrap_truncated(
    token_rewards: Tensor,
    last_values: Tensor,
    is_truncated: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
) -> Tensor:
    """Rewards with γ·V(state after the last token) added there, where length cut the response.

    `last_values` and `is_truncated` are [B], the rest [B, T].
    """
    bonus = torch.where(is_truncated, gamma * last_values, 0.0)
    return token_rewards + is_last_token(response_mask) * bonus.unsqueeze(1)


def is_last_token(response_mask: Tensor) -> Tensor:
    """True at the last response token of each row; [B, T] bool."""
    position = response_mask.cumsum(dim=1)
    return response_mask & (position == position[:, -1:])


def token_rewards(
    scores: Tensor, kl_per_token: Tensor, response_mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Reward of each token: a KL penalty on all of them, the score on the last (arXiv:1909.08593).

        r_t = −β·k_t + [t is the last response token]·score

    `scores` are [B]; the rest is [B, T], zero outside the response.
    """
    penalty = -kl_coef * kl_per_token
    paid = is_last_token(response_mask) * scores.unsqueeze(1)
    return zero_outside(penalty + paid, response_mask)
