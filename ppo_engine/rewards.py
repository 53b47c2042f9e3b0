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


def token_rewards(
    scores: Tensor, kl_per_token: Tensor, response_mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Reward of each token: a KL penalty on all of them, the score on the last (arXiv:1909.08593).

        r_t = −β·k_t + [t is the last response token]·score

    `scores` are [B]; the rest is [B, T], zero outside the response.
    """
    position = response_mask.cumsum(dim=1)
    is_last = response_mask & (position == position[:, -1:])
    penalty = -kl_coef * kl_per_token
    return zero_outside(penalty + is_last * scores.unsqueeze(1), response_mask)
