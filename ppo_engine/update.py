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
from ppo_engine.guards import Firing, pass_action
from ppo_engine.kl import loss_kl
from ppo_engine.layout import Layout, MicroBatch
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
class EarlyEnd:
    """A pass went too far, so it and the rest of the update were left out."""

    guard: str
    """`target_kl`, or the metric of a user's rule."""
    epoch: int
    minibatch: int
    value: float
    """The metric in that pass."""
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What the passes of one update met."""

    passes: tuple[PassReport, ...]
    """In order; each measured before its optimizer step."""
    early_end: EarlyEnd | None
    """Set if the update was ended early."""
    firings: tuple[Firing, ...]
    """What rules about single passes did."""
    losses: "PassLosses"
    """The parts of the loss, mean over the passes; CPU."""
    last: "LastLook"
    """The responses as the last passes saw them."""


class PassLosses(NamedTuple):
    """The parts of a loss, each already summed with its weights."""

    policy: Tensor
    """−Σ w·J."""
    value: Tensor
    """Σ w·value error."""
    entropy: Tensor
    """Σ w·H."""
    kl: Tensor
    """β·Σ w·KL term; 0 where KL is in the reward."""

    def total(self, config: TrainConfig) -> Tensor:
        """What is minimised (PPO, arXiv:1707.06347, eq. 9, with signs turned)."""
        return (
            self.policy
            + config.value_coef * self.value
            - config.entropy_coef * self.entropy
            + self.kl
        )

    def detached(self) -> "PassLosses":
        """The same numbers, free of their graph."""
        return PassLosses(*(part.detach() for part in self))


class LastLook(NamedTuple):
    """Each response as the last pass that contained it measured it."""

    logprobs: Tensor
    """[B, T] fp32."""
    epoch: Tensor
    """[B] int64; −1 where no pass was reached."""
    minibatch: Tensor
    """[B] int64."""


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over adapter and, if there is one, critic; rates are set before every update."""
    groups = [{"params": [policy.adapter_weights.together], "lr": config.learning_rate}]
    if policy.value_weights is not None:
        groups.append({"params": [policy.value_weights.together], "lr": config.value_learning_rate})
    return torch.optim.AdamW(
        groups,
        betas=ADAM_BETAS,
        eps=ADAM_EPSILON,
        weight_decay=config.weight_decay,
        fused=True,
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
        self.learning_rate_scale = 1.0
        """Factor on both learning rates; guards lower it."""

    def learn(
        self, rollout: Rollout, *, step: int, kl_coef: float, generator: torch.Generator
    ) -> UpdateResult:
        """All passes of update `step` (from 1), or fewer if the policy drifts too far."""
        self._prepare(step)
        passes: list[PassReport] = []
        losses: list[PassLosses] = []
        firings: list[Firing] = []
        early_end = None
        last = _nothing_seen(rollout)
        layout = Layout(self._policy, rollout.samples, self._config.micro_batch_size)
        for epoch, minibatch, rows in self._walks(len(rollout.scores), generator):
            plan = _Pass(rollout, layout, rows, epoch, minibatch, kl_coef, last)
            report, parts = self._pass(plan)
            losses.append(parts)
            early_end = self._early_end(report)
            rule = self._fired_rule(report) if early_end is None else None
            if early_end is not None or rule is not None:
                passes.append(dataclasses.replace(report, skipped=True))
            else:
                passes.append(report)
                self._step(report)
            if rule is not None:
                firings.append(rule)
            if early_end is not None or (rule is not None and rule.action == "stop_epochs"):
                break
        self._drop_gradients()
        return UpdateResult(
            passes=tuple(passes),
            early_end=early_end,
            firings=tuple(firings),
            losses=_mean_losses(losses),
            last=last,
        )

    def is_adapter_frozen(self, step: int) -> bool:
        """Whether update `step` trains the critic alone."""
        return step <= self._config.critic_warmup_steps and self._config.has_critic

    def _prepare(self, step: int) -> None:
        """Rates of this update; during the critic's warm-up the adapter stays as it is."""
        factor = learning_rate_factor(self._config, step) * self.learning_rate_scale
        adapter, *critic = self._optimizer.param_groups
        adapter["lr"] = factor * self._config.learning_rate
        for group in critic:
            group["lr"] = factor * self._config.value_learning_rate
        self._policy.set_adapter_trainable(trainable=not self.is_adapter_frozen(step))

    def _walks(self, rows: int, generator: torch.Generator) -> list[tuple[int, int, Tensor]]:
        """Epoch, minibatch and rows of every pass: each epoch a new order of all rows."""
        return [
            (epoch, minibatch, part.to(self._policy.device))
            for epoch in range(self._config.epochs)
            for minibatch, part in enumerate(
                torch.randperm(rows, generator=generator).split(self._config.minibatch_size)
            )
        ]

    def _pass(self, plan: "_Pass") -> tuple[PassReport, PassLosses]:
        """Gradients of one minibatch, left in place, and what it looked like."""
        config = self._config
        self._drop_gradients()
        statistics = PassStatistics(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            value_clip_range=config.value_clip_range,
            importance_weight_cap=config.importance_weight_cap,
        )
        weights = plan.row_weights(config)
        parts = [
            self._backward(plan, batch, weights, statistics)
            for batch in plan.layout.micro_batches(plan.rows)
        ]
        losses = PassLosses(*(torch.stack(terms).sum() for terms in zip(*parts, strict=True)))
        grad_norm = self._clipped_gradient_norm()
        is_finite = math.isfinite(grad_norm) and math.isfinite(losses.total(config).item())
        report = statistics.report(
            epoch=plan.epoch,
            minibatch=plan.minibatch,
            grad_norm=grad_norm,
            max_grad_norm=config.max_grad_norm,
            skipped=not is_finite,
        )
        return report, losses

    def _backward(
        self, plan: "_Pass", batch: MicroBatch, weights: Tensor, statistics: PassStatistics
    ) -> PassLosses:
        """Adds this micro-batch's gradient and counts its tokens; its share of each loss."""
        rollout = plan.rollout
        mask = rollout.loss_mask[batch.rows] & batch.is_real[:, None]
        current = self._policy.evaluate(
            rollout.samples.tokens[batch.rows],
            rollout.samples.attention_mask[batch.rows],
            mask,
            shape=batch.shape,
            boundary=rollout.boundary_of(batch.rows),
            entropy_gradient=self._config.entropy_coef != 0,
        )
        targets = rollout.targets(batch.rows, mask)
        losses = pass_losses(
            current, targets, mask, weights[batch.rows], self._config, kl_coef=plan.kl_coef
        )
        losses.total(self._config).backward()
        statistics.add(
            logprobs=current.logprobs.detach(),
            old_logprobs=targets.old_logprobs,
            advantages=targets.advantages,
            response_mask=mask,
            values=current.values.detach(),
            old_values=targets.old_values,
            returns=targets.returns,
            rows=batch.rows,
            importance_weights=targets.importance_weights,
        )
        plan.note(batch, current.logprobs.detach())
        return losses.detached()

    def _clipped_gradient_norm(self) -> float:
        """Norm of the whole gradient, before it was scaled down to `max_grad_norm`."""
        trained = self._policy.trained_weights()
        for weights in trained:
            weights.gather_gradients()
        parts = [part for weights in trained for part in weights.gradient_parts()]
        norm = nn.utils.get_total_norm(parts)
        together = [weights.together for weights in trained]
        nn.utils.clip_grads_with_norm_(together, self._config.max_grad_norm, norm)
        return norm.item()

    def _drop_gradients(self) -> None:
        for weights in self._policy.trained_weights():
            weights.drop_gradients()

    def _early_end(self, report: PassReport) -> EarlyEnd | None:
        """Set if this pass has drifted beyond 1.5 times `target_kl`; its gradient is dropped."""
        if self._config.target_kl is None:
            return None
        drift = report.values["update_kl_k3"]
        threshold = TARGET_KL_TOLERANCE * self._config.target_kl
        if drift is None or drift <= threshold:
            return None
        return EarlyEnd(
            guard="target_kl",
            epoch=report.epoch,
            minibatch=report.minibatch,
            value=drift,
            threshold=threshold,
        )

    def _fired_rule(self, report: PassReport) -> Firing | None:
        """A rule of the user that takes this pass out; broken ones are left to `_step`."""
        return None if report.skipped else pass_action(self._config.guards, report.values)

    def _step(self, report: PassReport) -> None:
        """One optimizer step, unless the pass must be skipped or has no tokens to learn from."""
        if report.sums.tokens == 0:
            return
        if not report.skipped:
            self._optimizer.step()
            self._policy.adapter_version += 1
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_PASSES:
            raise NonfiniteLoss(
                f"loss, gradient or ratio was not finite in {MAX_SKIPPED_PASSES} passes in a row; "
                "lower learning_rate or max_grad_norm, or try precision fp32"
            )


class _Pass(NamedTuple):
    """One optimizer step: its rows, and where its findings go."""

    rollout: Rollout
    layout: Layout
    rows: Tensor
    epoch: int
    minibatch: int
    kl_coef: float
    last: LastLook

    def row_weights(self, config: TrainConfig) -> Tensor:
        """Weight of a token by row of the whole rollout, [B]; 0 for rows of other passes."""
        weights = torch.zeros(
            len(self.rollout.scores), dtype=torch.float64, device=self.rows.device
        )
        weights[self.rows] = row_weights(
            self.rollout.loss_mask[self.rows],
            config.loss_aggregation,
            max_response_tokens=config.max_response_tokens,
        )
        return weights

    def note(self, batch: MicroBatch, logprobs: Tensor) -> None:
        """Keep what a micro-batch saw of its rows."""
        rows = batch.rows[batch.is_real]
        self.last.logprobs[rows] = logprobs[batch.is_real]
        self.last.epoch[rows] = self.epoch
        self.last.minibatch[rows] = self.minibatch


def _nothing_seen(rollout: Rollout) -> LastLook:
    nowhere = torch.full((len(rollout.scores),), -1, device=rollout.scores.device)
    return LastLook(torch.zeros_like(rollout.old_logprobs), nowhere, nowhere.clone())


def _mean_losses(losses: list[PassLosses]) -> PassLosses:
    return PassLosses(*(torch.stack(part).mean().cpu() for part in zip(*losses, strict=True)))


def pass_losses(
    current: Evaluation,
    targets: Targets,
    response_mask: Tensor,
    row_weights: Tensor,
    config: TrainConfig,
    *,
    kl_coef: float,
) -> PassLosses:
    """The weighted sums of one micro-batch; those of a pass add up to its loss."""
    drift = log_ratio(current.logprobs, targets.old_logprobs)
    surrogate = surrogate_terms(
        drift,
        targets.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    value = clipped_value_error(
        current.values, targets.old_values, targets.returns, clip_range=config.value_clip_range
    )
    weighted = targets.importance_weights * surrogate.objective
    return PassLosses(
        policy=-weighted_sum(weighted, response_mask, row_weights),
        value=weighted_sum(value.error, response_mask, row_weights),
        entropy=weighted_sum(current.entropy, response_mask, row_weights),
        kl=kl_coef
        * weighted_sum(_kl_term(current, targets, drift, config), response_mask, row_weights),
    )


def _kl_term(current: Evaluation, targets: Targets, drift: Tensor, config: TrainConfig) -> Tensor:
    """The penalty in the loss per token; zeros where it is in the reward."""
    if config.kl_placement == "reward":
        return torch.zeros_like(drift)
    to_reference = current.logprobs - targets.kl_reference_logprobs
    return loss_kl(config.kl_estimator, to_reference, drift)
