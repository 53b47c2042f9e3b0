"""KL estimators per sampled token, and the controllers of the penalty's coefficient."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ppo_engine.config import KlEstimator
from ppo_engine.errors import InvalidConfig

_LARGEST_ERROR = 0.2
"""Bound on the relative error the adaptive controller reacts to."""


def k1(log_ratio_to_ref: Tensor) -> Tensor:
    """D = log π(y|s) − log π_ref(y|s); unbiased for KL(π‖ref), of either sign."""
    return log_ratio_to_ref


def k2(log_ratio_to_ref: Tensor) -> Tensor:
    """D²/2; biased, never negative (Schulman's note on approximating KL, 2020)."""
    return log_ratio_to_ref.square() / 2


def k3(log_ratio_to_ref: Tensor) -> Tensor:
    """e^(−D) − 1 + D; unbiased and never negative (Schulman's note on approximating KL, 2020)."""
    return torch.expm1(-log_ratio_to_ref) + log_ratio_to_ref


def reward_kl(estimator: KlEstimator, log_ratio_to_ref: Tensor, exact: Tensor) -> Tensor:
    """The penalty per sampled token that goes into the reward, detached; [B, T].

    `exact` is the whole distribution's KL(π‖π_ref) at each position.
    """
    match estimator:
        case KlEstimator.K1:
            return k1(log_ratio_to_ref)
        case KlEstimator.K2:
            return k2(log_ratio_to_ref)
        case KlEstimator.K3:
            return k3(log_ratio_to_ref)
        case KlEstimator.EXACT:
            return exact


def loss_kl(estimator: KlEstimator, log_ratio_to_ref: Tensor, log_ratio: Tensor) -> Tensor:
    """The penalty per token as a loss whose expected gradient is that of KL(π‖π_ref); [B, T].

        k2:  sg[ρ] · D²/2          k3:  ρ · (e^(−D) − 1 + D),  the gradient through ρ too

    `log_ratio` is log π − log π_old: tokens come from the old policy, so each is weighted with ρ.
    Plain k1 has gradient 0 in expectation, plain k3 that of the other direction KL(π_ref‖π)
    (arXiv:2506.09477); both are refused as losses.  Nothing is clamped: the gradient would die
    where the policy has run away.
    """
    ratio = torch.exp(log_ratio)
    match estimator:
        case KlEstimator.K2:
            return ratio.detach() * k2(log_ratio_to_ref)
        case KlEstimator.K3:
            return ratio * k3(log_ratio_to_ref)
        case _:
            raise InvalidConfig(
                f"{estimator} in the loss does not control the KL; take k2 or k3",
                param="kl_estimator",
            )


class KlController(Protocol):
    """Decides β, the weight of the KL penalty in the token reward."""

    coef: float
    """β for the next step."""

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Take in the KL to the reference of a step's responses, in nats per response."""

    def scale(self, factor: float) -> None:
        """Multiply β, when a guard asks for it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class FixedKl:
    """β never changes."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Nothing: β is fixed."""

    def scale(self, factor: float) -> None:
        """Multiply β, when a guard asks for it."""
        self.coef *= factor

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.coef = float(state["coef"])


class AdaptiveKl:
    """β grows while the KL is above its target and shrinks below (arXiv:1909.08593, sec. 2.2).

        e = clip(KL / target − 1, ±0.2)
        β ← β · (1 + e · episodes / horizon)

    KL and target in nats per response.
    """

    def __init__(self, coef: float, *, target_kl_per_sequence: float, horizon: int) -> None:
        self.coef = coef
        self._target = target_kl_per_sequence
        self._horizon = horizon

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Move β by the step's KL, measured over `episodes` responses."""
        error = kl_per_sequence / self._target - 1
        error = min(max(error, -_LARGEST_ERROR), _LARGEST_ERROR)
        self.coef *= 1 + error * episodes / self._horizon

    def scale(self, factor: float) -> None:
        """Multiply β, when a guard asks for it."""
        self.coef *= factor

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.coef = float(state["coef"])
