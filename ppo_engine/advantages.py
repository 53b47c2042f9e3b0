"""Advantage estimates: from token rewards and values, or from the scores of a prompt's group."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ppo_engine.masking import zero_outside


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float | Tensor
) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        δ_t = r_t + γ·V(s_{t+1}) − V(s_t)
        A_t = δ_t + γλ·A_{t+1}

    Tensors are [B, T] (`lam` a number or [B]).  Columns outside the mask are skipped without
    discount; nothing follows the last response token.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = torch.where(response_mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(response_mask[:, t], advantages[:, t], next_advantage)
    return zero_outside(advantages, response_mask)


LENGTH_ADAPTIVE_ALPHA = 0.05
"""α of `length_adaptive_lam` (VAPO, arXiv:2504.05118)."""
_GROUP_EPSILON = 1e-6


def length_adaptive_lam(response_mask: Tensor, *, alpha: float = LENGTH_ADAPTIVE_ALPHA) -> Tensor:
    """λ of each row by its length L: 1 − 1/(α·L), never below 0 (VAPO, arXiv:2504.05118).  [B].

    Short responses would get a negative λ from the formula as printed.
    """
    lengths = response_mask.sum(dim=1).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def rloo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Score minus the mean of the group's other scores (arXiv:2402.14740).  [B] in and out.

        A_i = n/(n−1) · (S_i − mean of the group)

    A group of one has nobody to compare with and gets 0.
    """
    groups = _Groups.of(scores, group_ids)
    return (groups.centred * groups.sizes / (groups.sizes - 1).clamp(min=1)).to(scores.dtype)


def grpo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Score in standard deviations of its group (arXiv:2402.03300, sec. 4.1.2).  [B] in and out.

        A_i = (S_i − mean of the group) / (std of the group + 1e-6),   std with n − 1

    Groups with equal scores get 0.
    """
    groups = _Groups.of(scores, group_ids)
    deviation = (groups.sums(groups.centred.square()) / (groups.sizes - 1).clamp(min=1)).sqrt()
    return (groups.centred / (deviation + _GROUP_EPSILON)).to(scores.dtype)


def has_equal_scores(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Whether all of a row's group have one score, so that the group teaches nothing.  [B] bool."""
    index = torch.unique(group_ids, return_inverse=True)[1]
    low, high = (
        torch.zeros_like(scores).scatter_reduce(0, index, scores, kind, include_self=False)[index]
        for kind in ("amin", "amax")
    )
    return low == high


@dataclass(frozen=True, slots=True)
class _Groups:
    """Scores of samples that share a prompt."""

    index: Tensor
    """[B] int64; the group of each row, from 0."""
    sizes: Tensor
    """[B]; members of the row's group."""
    centred: Tensor
    """[B] float64; the score minus the group's mean, exactly 0 where all are equal."""

    @classmethod
    def of(cls, scores: Tensor, group_ids: Tensor) -> Self:
        """The groups of these rows, in whatever order they stand."""
        index = torch.unique(group_ids, return_inverse=True)[1]
        wide = scores.double()
        sizes = torch.bincount(index)[index]
        means = torch.zeros_like(wide).index_add(0, index, wide)[index] / sizes
        centred = torch.where(has_equal_scores(scores, group_ids), 0.0, wide - means)
        return cls(index, sizes, centred)

    def sums(self, values: Tensor) -> Tensor:
        """Of each row's group, [B]."""
        return torch.zeros_like(values).index_add(0, self.index, values)[self.index]
