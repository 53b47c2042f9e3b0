"""What the sampler returns (`Samples`) and what one update learns from (`Rollout`).

Legend: B sequences, P prompt tokens (padded left), T response tokens (padded right), V vocabulary.
Column t of every [B, T] tensor belongs to response token t; `old_values[:, t]` is the value of the
state in which that token was chosen.  Outside `response_mask` every [B, T] tensor is zero, so the
ratio there is exp(0) = 1, its gradient is zero, and no formula mentions padding.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Responses of one step as the sampler drew them."""

    tokens: Tensor
    """[B, P+T] int64; the generated ids themselves, never re-tokenised text."""
    attention_mask: Tensor
    """[B, P+T] bool; True = real token.  From lengths: padding may equal the stop token."""
    response_mask: Tensor
    """[B, T] bool; True = token the policy sampled, the first stop token included."""
    behavior_logprobs: Tensor
    """[B, T] fp32; log-probability under the policy that sampled."""
    is_truncated: Tensor
    """[B] bool; True = ended by length, not by a stop token."""
    texts: tuple[str, ...]
    """The responses as text, without the stop token; what graders see."""
    group_ids: Tensor
    """[B] int64; equal for samples of one prompt."""
    adapter_version: int
    """State of the adapter that sampled: optimizer steps taken before."""

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together."""
        rows, columns = self.response_mask.shape
        if self.tokens.shape != self.attention_mask.shape:
            raise ValueError("tokens and attention_mask differ in shape")
        if self.tokens.shape[0] != rows or self.tokens.shape[1] <= columns:
            raise ValueError("tokens must be [B, P+T] with P >= 1")
        _check_zero_outside(self.behavior_logprobs, self.response_mask, "behavior_logprobs")

    @property
    def prompt_columns(self) -> int:
        """P, the padded prompt length."""
        return self.tokens.shape[1] - self.response_mask.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What some rows of a rollout are compared with, [B, T] fp32, zero outside the mask."""

    old_logprobs: Tensor
    kl_reference_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    importance_weights: Tensor
    """1 where the run uses none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Scored responses with everything an update needs, computed once at its start."""

    samples: Samples
    """What was sampled."""
    old_logprobs: Tensor
    """[B, T] fp32; the ratio's denominator: the trainer's log-probabilities before the update."""
    kl_reference_logprobs: Tensor
    """[B, T] fp32; under the frozen reference, the base with the adapter off."""
    kl_exact: Tensor
    """[B, T] fp32; KL(π_old‖π_ref) over the whole vocabulary, a diagnostic."""
    old_values: Tensor
    """[B, T] fp32; the critic's values before the update."""
    entropy: Tensor
    """[B, T] fp32; entropy of the old policy in nats."""
    scores: Tensor
    """[B] fp32; the grader's rewards, raw."""
    rewards: Tensor
    """[B, T] fp32; token rewards as the learner sees them."""
    advantages: Tensor
    """[B, T] fp32; as the loss uses them."""
    returns: Tensor
    """[B, T] fp32; targets of the critic."""
    importance_weights: Tensor
    """[B, T] fp32; old over behavior probability, capped; 1 where the run uses none."""
    loss_mask: Tensor
    """[B, T] bool; the response tokens that are learned from."""
    raw_advantage_std: float
    """Standard deviation of the advantages before standardizing."""
    limited_score_fraction: float
    """Share of scores that scaling had to bound."""
    boundary: Tensor
    """[B, P+T, H]; what the lowest adapted layer reads; H = 0 where nothing is saved by it."""
    adapter_version: int
    """State of the adapter that the tensors above were computed with."""

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together, or are not zero outside the responses."""
        if self.adapter_version != self.samples.adapter_version:
            raise ValueError(
                f"sampled by adapter version {self.samples.adapter_version}, "
                f"evaluated by {self.adapter_version}"
            )
        mask = self.samples.response_mask
        if bool((self.loss_mask & ~mask).any()):
            raise ValueError("loss_mask must lie within response_mask")
        for name in (
            "old_logprobs",
            "kl_reference_logprobs",
            "kl_exact",
            "old_values",
            "rewards",
            "advantages",
            "returns",
            "importance_weights",
        ):
            _check_zero_outside(getattr(self, name), mask, name)

    def boundary_of(self, rows: Tensor) -> Tensor | None:
        """What the lowest adapted layer reads of the numbered rows; None where it is the first."""
        return self.boundary[rows] if self.boundary.shape[-1] else None

    def targets(self, rows: Tensor, mask: Tensor) -> Targets:
        """Of the numbered rows, under a mask that may leave some tokens out."""
        names = (field.name for field in dataclasses.fields(Targets))
        return Targets(
            **{name: torch.where(mask, getattr(self, name)[rows], 0.0) for name in names}
        )


def _check_zero_outside(values: Tensor, mask: Tensor, name: str) -> None:
    if values.shape != mask.shape:
        raise ValueError(f"{name} is {tuple(values.shape)}, expected {tuple(mask.shape)}")
    if torch.any(torch.where(mask, 0.0, values) != 0):
        raise ValueError(f"{name} must be zero outside response_mask")
