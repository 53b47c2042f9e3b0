"""The PPO loop: sample, score, estimate, learn, report."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_engine.advantages import gae, grpo, length_adaptive_lam, rloo
from ppo_engine.allocator import keep_freed_memory
from ppo_engine.config import AdvantageEstimator, TrainConfig
from ppo_engine.errors import SelfCheckFailed
from ppo_engine.health import Health, firing_event, self_check_event
from ppo_engine.kl import AdaptiveKl, FixedKl, KlController, reward_kl
from ppo_engine.layout import Layout
from ppo_engine.losses import importance_weights
from ppo_engine.masking import standardize, zero_outside
from ppo_engine.measurements import kept_responses, mean, rollout_values, update_values
from ppo_engine.policy import Estimates, Policy
from ppo_engine.prompts import EncodedPrompt, PromptStream
from ppo_engine.reports import EngineEvent, StepReport
from ppo_engine.rewards import (
    RunningStd,
    bootstrap_truncated,
    overlong_penalty,
    shape_scores,
    token_rewards,
)
from ppo_engine.rollout import Rollout, Samples
from ppo_engine.sampling import Sampler
from ppo_engine.scoring import Scorer, checked_scores
from ppo_engine.selfcheck import SelfCheck, self_check
from ppo_engine.snapshot import take_snapshot
from ppo_engine.update import EarlyEnd, Updater, UpdateResult, make_optimizer


@dataclass(slots=True)
class Progress:
    """Where a run stands; all of it goes into a checkpoint."""

    step: int = 0
    """Updates finished."""
    prompt_tokens: int = 0
    """Prompt tokens read so far, in training."""
    response_tokens: int = 0
    """Response tokens sampled so far, in training."""


@dataclass(slots=True)
class Stopwatch:
    """Seconds of each named part, one after the other."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, part: str) -> None:
        """The time since the last lap belongs to `part`."""
        now = time.perf_counter()
        self.seconds[part] = now - self._since
        self._since = now


class Trainer:
    """One PPO run; `steps()` drives it.

    Its random numbers come from generators of its own, so that a checkpoint can hold them.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer,
        prompts: Sequence[EncodedPrompt],
        config: TrainConfig,
        *,
        seed: int,
        validation: Sequence[EncodedPrompt] = (),
    ) -> None:
        if policy.device.type == "cpu":
            keep_freed_memory()
        self.policy = policy
        self.config = config
        self.progress = Progress()
        self.prompts = PromptStream(prompts, seed=seed)
        self.optimizer = make_optimizer(policy, config)
        self.updater = Updater(policy, self.optimizer, config)
        self.kl_controller = _kl_controller(config)
        self.reward_std = RunningStd()
        self.generators = {
            "sampling": torch.Generator().manual_seed(seed),
            "shuffling": torch.Generator().manual_seed(seed + 1),
        }
        self.health = Health(config)
        self.checked: SelfCheck | None = None
        """What the self-check found, once it has run in this process."""
        self._seed = seed
        self._scorer = scorer
        self._validation = validation[: config.eval_samples]
        self._sampler = Sampler(policy=policy, max_response_tokens=config.max_response_tokens)

    @property
    def finished_steps(self) -> int:
        """Updates done."""
        return self.progress.step

    def steps(self) -> Iterator[StepReport]:
        """A report per update, until `total_steps`; stop iterating to stop the run."""
        while self.progress.step < self.config.total_steps:
            yield self._update()

    def _update(self) -> StepReport:
        watch = Stopwatch()
        prompts, samples = self._sample()
        watch.lap("sample")
        scores = self._score(prompts, samples)
        watch.lap("score")
        rollout = self._estimate(samples, scores)
        watch.lap("estimate")
        events = self._check_before_the_first(rollout)
        watch.lap("check")
        result = self.updater.learn(
            rollout,
            step=self.progress.step + 1,
            kl_coef=self.kl_controller.coef,
            generator=self.generators["shuffling"],
        )
        watch.lap("learn")
        values = self._values(rollout, result)
        kept = kept_responses(
            prompts,
            rollout,
            result,
            self.config,
            generator=torch.Generator().manual_seed(self._seed + self.progress.step),
            decode=lambda token: self.policy.base.tokenizer.decode([token]),
        )
        self._advance(rollout, values["kl_reference_per_sequence"])
        values["valid_reward_mean"] = self._validate()
        watch.lap("validate")
        values |= self._effort(rollout, watch)
        judgement = self.health.judge(self, values, result)
        return StepReport(
            step=self.progress.step,
            values=values,
            passes=result.passes,
            events=(*events, *_events_of(result), *judgement.events),
            samples=kept.samples,
            tokens=kept.tokens,
            wants_pause=judgement.wants_pause,
        )

    def _sample(self) -> tuple[list[EncodedPrompt], Samples]:
        """The step's responses, and the prompt of each of them."""
        prompts = self.prompts.next_batch(self.config.batch_size)
        samples = self._sampler.sample(
            prompts, self.generators["sampling"], group_size=self.config.group_size
        )
        return [prompts[group] for group in samples.group_ids.tolist()], samples

    def _score(self, prompts: Sequence[EncodedPrompt], samples: Samples) -> Tensor:
        """Raw rewards, [B]."""
        items = [prompt.prompt.item for prompt in prompts]
        return checked_scores(self._scorer, samples.texts, items).to(self.policy.device)

    def _estimate(self, samples: Samples, scores: Tensor) -> Rollout:
        """Old and reference log-probabilities, token rewards, advantages and returns."""
        config, mask = self.config, samples.response_mask
        shaped, limited = self._shaped(scores, samples)
        if self.progress.step == 0:
            self.policy.start_value_head_at(shaped.mean().item())
        old = self._evaluate(samples)
        rewards = self._token_rewards(shaped, old, samples)
        raw = raw_advantages(rewards, old, samples, config)
        loss_mask = mask & ~samples.is_truncated[:, None] if config.mask_truncated else mask
        advantages = raw.advantages
        if config.standardize_advantages:
            advantages = standardize(advantages, loss_mask)
        weights = mask.float()
        if config.importance_weight_cap is not None:
            weights = importance_weights(
                old.logprobs, samples.behavior_logprobs, mask, cap=config.importance_weight_cap
            )
        return Rollout(
            samples=samples,
            old_logprobs=old.logprobs,
            kl_reference_logprobs=old.kl_reference_logprobs,
            kl_exact=old.kl_exact,
            old_values=old.values,
            entropy=old.entropy,
            scores=scores,
            rewards=rewards,
            advantages=advantages,
            returns=raw.returns,
            importance_weights=weights,
            loss_mask=loss_mask,
            boundary=old.boundary,
            raw_advantage_std=raw.advantages[mask].std(correction=0).item(),
            limited_score_fraction=limited,
            adapter_version=self.policy.adapter_version,
        )

    def _shaped(self, scores: Tensor, samples: Samples) -> tuple[Tensor, float]:
        """Scores as the learner sees them, and the share of them that scaling had to bound."""
        config = self.config
        limited = 0.0
        shaped = scores
        if config.reward_scaling == "running_std":
            self.reward_std.update(scores)
            limited = self.reward_std.is_limited(scores).float().mean().item()
            shaped = self.reward_std.scale(scores)
        shaped = shape_scores(
            shaped, samples.is_truncated, missing_stop_penalty=config.missing_stop_penalty
        )
        if config.overlong_buffer is not None:
            shaped = shaped + overlong_penalty(
                samples.response_mask.sum(dim=1),
                max_response_tokens=config.max_response_tokens,
                buffer_tokens=config.overlong_buffer.tokens,
                penalty=config.overlong_buffer.penalty,
            )
        return shaped, limited

    def _token_rewards(self, shaped: Tensor, old: Estimates, samples: Samples) -> Tensor:
        """Score, KL penalty if it belongs here, and the value of going on where length cut."""
        config, mask = self.config, samples.response_mask
        penalty = torch.zeros_like(old.logprobs)
        if config.kl_placement == "reward":
            to_reference = old.logprobs - old.kl_reference_logprobs
            penalty = reward_kl(config.kl_estimator, to_reference, old.kl_exact)
        rewards = token_rewards(shaped, penalty, mask, kl_coef=self.kl_controller.coef)
        if not config.bootstrap_truncated:
            return rewards
        return bootstrap_truncated(
            rewards, old.last_values, samples.is_truncated, mask, gamma=config.gamma
        )

    @torch.no_grad()
    def _evaluate(self, samples: Samples) -> Estimates:
        """All responses, in the micro-batches of the passes that will follow."""
        rows = torch.arange(len(samples.tokens), device=samples.tokens.device)
        layout = Layout(self.policy, samples, self.config.micro_batch_size)
        order, parts = [], []
        for batch in layout.micro_batches(rows):
            estimates = self.policy.estimate(
                samples.tokens[batch.rows],
                samples.attention_mask[batch.rows],
                samples.response_mask[batch.rows] & batch.is_real[:, None],
                shape=batch.shape,
                with_last_values=self.config.bootstrap_truncated,
            )
            order.append(batch.rows[batch.is_real])
            parts.append([tensor[batch.is_real] for tensor in estimates])
        back = torch.cat(order).argsort()
        return Estimates(*(torch.cat(tensors)[back] for tensors in zip(*parts, strict=True)))

    def _check_before_the_first(self, rollout: Rollout) -> tuple[EngineEvent, ...]:
        """The self-check, before the run's first update; SelfCheckFailed if it finds a fault.

        What stands it is the first state a guard may roll back to.
        """
        if self.progress.step > 0:
            return ()
        generator = torch.Generator().manual_seed(self._seed + 2)
        found = self_check(self.policy, rollout, self.config, generator=generator)
        self.checked = found
        self.health.noise_limit = max(self.health.noise_limit, found.noise)
        event = self_check_event(found)
        if found.failures:
            raise SelfCheckFailed(f"{event.message} (measured: {json.dumps(found.numbers)})")
        if self.health.can_roll_back:
            self.health.last_good = take_snapshot(self, step=0)
        return (event,)

    def _values(self, rollout: Rollout, result: UpdateResult) -> dict[str, float | None]:
        """Every metric of the update but its effort and the validation."""
        adapter, *critic = self.optimizer.param_groups
        return {
            **rollout_values(rollout),
            **update_values(rollout, result, self.config),
            "kl_coef": self.kl_controller.coef,
            "learning_rate": adapter["lr"],
            "value_learning_rate": critic[0]["lr"] if critic else None,
            "noise_limit": self.health.noise_limit,
        }

    def _advance(self, rollout: Rollout, kl_per_sequence: float | None) -> None:
        """Count the update, and let the KL coefficient follow what it measured."""
        if kl_per_sequence is not None:
            self.kl_controller.update(kl_per_sequence, len(rollout.scores))
        self.progress.step += 1
        mask = rollout.samples.response_mask
        response_tokens = int(mask.sum())
        self.progress.response_tokens += response_tokens
        self.progress.prompt_tokens += int(rollout.samples.attention_mask.sum()) - response_tokens

    def _validate(self) -> float | None:
        """Mean reward on the validation prompts, if it is their turn; always the same draws."""
        step, config = self.progress.step, self.config
        is_due = step % config.eval_interval == 0 or step == config.total_steps
        if not self._validation or not is_due:
            return None
        generator = torch.Generator().manual_seed(self._seed)
        scores: list[float] = []
        for start in range(0, len(self._validation), config.batch_size):
            prompts = self._validation[start : start + config.batch_size]
            scores += self._score(prompts, self._sampler.sample(prompts, generator)).tolist()
        return mean(scores)

    def _effort(self, rollout: Rollout, watch: Stopwatch) -> dict[str, float | None]:
        """Time, tokens and memory of the update."""
        seconds = watch.seconds
        tokens = int(rollout.samples.response_mask.sum())
        return {
            "tokens_per_second": tokens / sum(seconds.values()),
            "prompt_tokens": float(self.progress.prompt_tokens),
            "response_tokens": float(self.progress.response_tokens),
            "peak_memory_bytes": float(self.policy.peak_memory_bytes()),
            **{f"seconds.{part}": value for part, value in seconds.items()},
        }


class RawAdvantages(NamedTuple):
    """Before they are standardized; [B, T] each, zero outside the response."""

    advantages: Tensor
    returns: Tensor
    """The critic's targets; zeros without a critic."""


def raw_advantages(
    rewards: Tensor, old: Estimates, samples: Samples, config: TrainConfig
) -> RawAdvantages:
    """Advantages by the run's estimator, from token rewards [B, T].

    Returns are A + V with A as GAE gives it, under λ of the critic where it has one of its own.
    """
    mask = samples.response_mask
    match config.advantage_estimator:
        case AdvantageEstimator.GAE:
            lam = length_adaptive_lam(mask) if isinstance(config.lam, str) else config.lam
            advantages = gae(rewards, old.values, mask, gamma=config.gamma, lam=lam)
            for_critic = advantages
            if config.lambda_value is not None:
                for_critic = gae(
                    rewards, old.values, mask, gamma=config.gamma, lam=config.lambda_value
                )
            return RawAdvantages(advantages, for_critic + old.values)
        case AdvantageEstimator.RLOO:
            of_rows = rloo(rewards.sum(dim=1), samples.group_ids)
        case AdvantageEstimator.GRPO:
            of_rows = grpo(rewards.sum(dim=1), samples.group_ids)
    advantages = zero_outside(of_rows[:, None].expand_as(rewards), mask)
    return RawAdvantages(advantages, torch.zeros_like(rewards))


def _kl_controller(config: TrainConfig) -> KlController:
    match config.kl_controller:
        case "fixed":
            return FixedKl(config.kl_coef)
        case "adaptive":
            return AdaptiveKl(
                config.kl_coef,
                target_kl_per_sequence=config.target_kl_per_sequence,
                horizon=config.kl_horizon,
            )


def _events_of(result: UpdateResult) -> tuple[EngineEvent, ...]:
    """What ended the update early, or left out a pass."""
    ends = () if result.early_end is None else (_early_end_event(result.early_end),)
    return (*ends, *map(firing_event, result.firings))


def _early_end_event(end: EarlyEnd) -> EngineEvent:
    return EngineEvent(
        level="info",
        code="guard.fired",
        message=(
            f"update KL {end.value:.4f} exceeded {end.threshold:.4f} (1.5 × target_kl) "
            f"in epoch {end.epoch}, minibatch {end.minibatch}: this pass and the rest of the "
            "step were left out"
        ),
        data={
            "guard": end.guard,
            "action": "stop_epochs",
            "epoch": end.epoch,
            "minibatch": end.minibatch,
            "update_kl_k3": end.value,
            "threshold": end.threshold,
        },
    )
