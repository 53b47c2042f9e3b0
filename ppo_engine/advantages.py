"""Advantage estimates from token rewards and values."""

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
