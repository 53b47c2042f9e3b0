"""Epochs and passes over one rollout: the PPO update proper.

Formulas come from `losses`, statistics from `clip_stats`; here they are put together, summed with
one denominator per optimizer step, and turned into weights.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppo_engine.clip_stats import PassStatistics
from ppo_engine.config import TrainConfig
from ppo_engine.errors import NonfiniteLoss
from ppo_engine.layout import MicroBatch, micro_batches
from ppo_engine.losses import clipped_value_error, log_ratio, surrogate_terms
from ppo_engine.masking import row_weights, weighted_sum
from ppo_engine.policy import Evaluation, Policy
from ppo_engine.reports import PassReport
from ppo_engine.rollout import Rollout, Targets

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-5
"""Of the original PPO code, not PyTorch's 1e-8 (Huang et al. 2024, arXiv:2403.17031)."""
TARGET_KL_TOLERANCE = 1.5
"""Passes end when the update KL exceeds the target by this factor (Spinning Up, SB3)."""
MAX_SKIPPED_PASSES = 3
"""So many non-finite passes in a row end the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlStop:
    """A pass drifted too far, so it and the rest of the update were left out."""

    epoch: int
    minibatch: int
    update_kl_k3: float
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What the passes of one update met."""

    passes: tuple[PassReport, ...]
    """In order; each measured before its optimizer step."""
    kl_stop: KlStop | None
    """Set if `target_kl` ended the update early."""
    policy_loss: float
    """-Σ w·J, mean over the passes."""
    value_loss: float
    """Σ w·value error, mean over the passes."""


class PassLosses(NamedTuple):
    """The parts of a loss, each already summed with its weights."""

    policy: Tensor
    value: Tensor
    entropy: Tensor

    def total(self, config: TrainConfig) -> Tensor:
        """What is minimised (PPO, arXiv:1707.06347, eq. 9, with signs turned)."""
        return self.policy + config.value_coef * self.value - config.entropy_coef * self.entropy

    def detached(self) -> "PassLosses":
        """The same numbers, free of their graph."""
        return PassLosses(*(part.detach() for part in self))


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over adapter and value head, a group each; rates are set before every update."""
    groups = [
        {"params": list(policy.adapter_parameters().values()), "lr": config.learning_rate},
        {"params": list(policy.value_parameters().values()), "lr": config.value_learning_rate},
    ]
    return torch.optim.AdamW(
        groups, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=config.weight_decay
    )


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Share of both learning rates in effect during update `step`, counted from 1.

    Rises linearly over the warm-up, then follows the schedule; it never depends on passes.
    """
    warmup_steps = math.ceil(config.warmup_fraction * config.total_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    progress = (step - 1 - warmup_steps) / (config.total_steps - warmup_steps)
    match config.lr_schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))


class Updater:
    """Improves policy and critic on one rollout after another."""

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._config = config
        self.skipped_in_a_row = 0
        """Passes skipped since the last good one."""

    def learn(self, rollout: Rollout, *, step: int, generator: torch.Generator) -> UpdateResult:
        """All passes of update `step` (from 1), or fewer if the policy drifts too far."""
        self._prepare(step)
        passes: list[PassReport] = []
        losses: list[tuple[float, float]] = []
        kl_stop = None
        for epoch, minibatch, rows in self._walks(len(rollout.scores), generator):
            report, parts = self._pass(rollout, rows, epoch=epoch, minibatch=minibatch)
            losses.append((parts.policy.item(), parts.value.item()))
            kl_stop = self._kl_stop(report)
            if kl_stop is not None:
                passes.append(dataclasses.replace(report, skipped=True))
                break
            passes.append(report)
            self._step(report)
        self._optimizer.zero_grad()
        policy_losses, value_losses = zip(*losses, strict=True)
        return UpdateResult(
            passes=tuple(passes),
            kl_stop=kl_stop,
            policy_loss=sum(policy_losses) / len(losses),
            value_loss=sum(value_losses) / len(losses),
        )

    def _prepare(self, step: int) -> None:
        """Rates of this update; during the critic's warm-up the adapter stays as it is."""
        factor = learning_rate_factor(self._config, step)
        adapter, value_head = self._optimizer.param_groups
        adapter["lr"] = factor * self._config.learning_rate
        value_head["lr"] = factor * self._config.value_learning_rate
        self._policy.set_adapter_trainable(trainable=step > self._config.critic_warmup_steps)

    def _walks(self, rows: int, generator: torch.Generator) -> list[tuple[int, int, Tensor]]:
        """Epoch, minibatch and rows of every pass: each epoch a new order of all rows."""
        return [
            (epoch, minibatch, part.to(self._policy.device))
            for epoch in range(self._config.epochs)
            for minibatch, part in enumerate(
                torch.randperm(rows, generator=generator).split(self._config.minibatch_size)
            )
        ]

    def _pass(
        self, rollout: Rollout, rows: Tensor, *, epoch: int, minibatch: int
    ) -> tuple[PassReport, PassLosses]:
        """Gradients of one minibatch, left in place, and what it looked like."""
        config = self._config
        self._optimizer.zero_grad()
        weights = torch.zeros(len(rollout.scores), dtype=torch.float64, device=rows.device)
        weights[rows] = row_weights(
            rollout.samples.response_mask[rows],
            config.loss_aggregation,
            max_response_tokens=config.max_response_tokens,
        )
        statistics = PassStatistics(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            value_clip_range=config.value_clip_range,
        )
        parts = [
            self._backward(rollout, batch, weights, statistics)
            for batch in micro_batches(rows, config.micro_batch_size)
        ]
        losses = PassLosses(*(torch.stack(terms).sum() for terms in zip(*parts, strict=True)))
        grad_norm = self._clipped_gradient_norm()
        is_finite = math.isfinite(grad_norm) and math.isfinite(losses.total(config).item())
        report = statistics.report(
            epoch=epoch,
            minibatch=minibatch,
            grad_norm=grad_norm,
            max_grad_norm=config.max_grad_norm,
            skipped=not is_finite or statistics.log_ratio_clamped_count > 0,
        )
        return report, losses

    def _backward(
        self, rollout: Rollout, batch: MicroBatch, weights: Tensor, statistics: PassStatistics
    ) -> PassLosses:
        """Adds this micro-batch's gradient and counts its tokens; its share of each loss."""
        response_mask = rollout.samples.response_mask[batch.rows] & batch.is_real[:, None]
        current = self._policy.evaluate(
            rollout.samples.tokens[batch.rows],
            rollout.samples.attention_mask[batch.rows],
            response_mask,
        )
        targets = rollout.targets(batch.rows, response_mask)
        losses = pass_losses(current, targets, response_mask, weights[batch.rows], self._config)
        losses.total(self._config).backward()
        statistics.add(
            logprobs=current.logprobs,
            old_logprobs=targets.old_logprobs,
            advantages=targets.advantages,
            response_mask=response_mask,
            values=current.values,
            old_values=targets.old_values,
            returns=targets.returns,
        )
        return losses.detached()

    def _clipped_gradient_norm(self) -> float:
        """Norm of the whole gradient, before it was scaled down to `max_grad_norm`."""
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self._config.max_grad_norm)
        return norm.item()

    def _kl_stop(self, report: PassReport) -> KlStop | None:
        """Set if this pass has drifted beyond 1.5 times `target_kl`; its gradient is dropped."""
        if self._config.target_kl is None:
            return None
        drift = report.values["update_kl_k3"]
        threshold = TARGET_KL_TOLERANCE * self._config.target_kl
        if drift is None or drift <= threshold:
            return None
        return KlStop(
            epoch=report.epoch,
            minibatch=report.minibatch,
            update_kl_k3=drift,
            threshold=threshold,
        )

    def _step(self, report: PassReport) -> None:
        """One optimizer step, unless the pass must be skipped."""
        if not report.skipped:
            self._optimizer.step()
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_PASSES:
            raise NonfiniteLoss(
                f"loss, gradient or ratio was not finite in {MAX_SKIPPED_PASSES} passes in a row; "
                "lower learning_rate or max_grad_norm, or try precision fp32"
            )


def pass_losses(
    current: Evaluation,
    targets: Targets,
    response_mask: Tensor,
    row_weights: Tensor,
    config: TrainConfig,
) -> PassLosses:
    """The weighted sums of one micro-batch; those of a pass add up to its loss."""
    surrogate = surrogate_terms(
        log_ratio(current.logprobs, targets.old_logprobs),
        targets.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    value = clipped_value_error(
        current.values, targets.old_values, targets.returns, clip_range=config.value_clip_range
    )
    return PassLosses(
        policy=-weighted_sum(surrogate.objective, response_mask, row_weights),
        value=weighted_sum(value.error, response_mask, row_weights),
        entropy=weighted_sum(current.entropy, response_mask, row_weights),
    )
