"""The PPO loop: sample, score, estimate, learn, report."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppo_engine.advantages import gae
from ppo_engine.config import TrainConfig
from ppo_engine.kl import AdaptiveKl, FixedKl, KlController, k1
from ppo_engine.layout import micro_batches
from ppo_engine.masking import standardize
from ppo_engine.measurements import mean, rollout_values, sample_rows, update_values
from ppo_engine.policy import Evaluation, Policy
from ppo_engine.prompts import EncodedPrompt, PromptStream
from ppo_engine.reports import EngineEvent, StepReport
from ppo_engine.rewards import RunningStd, shape_scores, token_rewards
from ppo_engine.rollout import Rollout, Samples
from ppo_engine.sampling import Sampler
from ppo_engine.scoring import Scorer, checked_scores
from ppo_engine.update import KlStop, Updater, make_optimizer


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
        self._seed = seed
        self._scorer = scorer
        self._validation = validation[: config.eval_samples]
        self._sampler = Sampler(policy=policy, max_response_tokens=config.max_response_tokens)

    def steps(self) -> Iterator[StepReport]:
        """A report per update, until `total_steps`; stop iterating to stop the run."""
        while self.progress.step < self.config.total_steps:
            yield self._update()

    def _update(self) -> StepReport:
        watch = Stopwatch()
        prompts = self.prompts.next_batch(self.config.batch_size)
        samples = self._sampler.sample(prompts, self.generators["sampling"])
        watch.lap("sample")
        scores = self._score(prompts, samples)
        watch.lap("score")
        rollout = self._estimate(samples, scores)
        watch.lap("estimate")
        result = self.updater.learn(
            rollout, step=self.progress.step + 1, generator=self.generators["shuffling"]
        )
        watch.lap("learn")
        values = rollout_values(rollout) | update_values(rollout, result, self.optimizer)
        values["kl_coef"] = self.kl_controller.coef
        self._advance(rollout, values["kl_reference_per_sequence"])
        values["valid_reward_mean"] = self._validate()
        watch.lap("validate")
        return StepReport(
            step=self.progress.step,
            values=values | self._effort(rollout, watch),
            passes=result.passes,
            events=() if result.kl_stop is None else (_kl_stop_event(result.kl_stop),),
            samples=sample_rows(prompts, rollout, self.config.stored_samples),
        )

    def _score(self, prompts: Sequence[EncodedPrompt], samples: Samples) -> Tensor:
        """Raw rewards, [B]."""
        items = [prompt.prompt.item for prompt in prompts]
        return checked_scores(self._scorer, samples.texts, items).to(self.policy.device)

    def _estimate(self, samples: Samples, scores: Tensor) -> Rollout:
        """Old and reference log-probabilities, token rewards, advantages and returns."""
        config = self.config
        shaped = shape_scores(
            self._scaled(scores),
            samples.is_truncated,
            missing_stop_penalty=config.missing_stop_penalty,
        )
        if self.progress.step == 0:
            self.policy.start_value_head_at(shaped.mean().item())
        old = self._evaluate(samples)
        with self.policy.reference():
            reference = self._evaluate(samples)
        rewards = token_rewards(
            shaped,
            k1(old.logprobs - reference.logprobs),
            samples.response_mask,
            kl_coef=self.kl_controller.coef,
        )
        raw_advantages = gae(
            rewards, old.values, samples.response_mask, gamma=config.gamma, lam=config.lam
        )
        advantages = raw_advantages
        if config.standardize_advantages:
            advantages = standardize(raw_advantages, samples.response_mask)
        return Rollout(
            samples=samples,
            old_logprobs=old.logprobs,
            kl_reference_logprobs=reference.logprobs,
            old_values=old.values,
            entropy=old.entropy,
            scores=scores,
            advantages=advantages,
            returns=raw_advantages + old.values,
            raw_advantage_std=raw_advantages[samples.response_mask].std(correction=0).item(),
        )

    def _scaled(self, scores: Tensor) -> Tensor:
        """Scores in units of their running standard deviation, these included."""
        if self.config.reward_scaling == "none":
            return scores
        self.reward_std.update(scores)
        return self.reward_std.scale(scores)

    @torch.no_grad()
    def _evaluate(self, samples: Samples) -> Evaluation:
        """All responses, in the micro-batches of the passes that will follow."""
        rows = torch.arange(len(samples.tokens), device=samples.tokens.device)
        parts = []
        for batch in micro_batches(rows, self.config.micro_batch_size):
            evaluation = self.policy.evaluate(
                samples.tokens[batch.rows],
                samples.attention_mask[batch.rows],
                samples.response_mask[batch.rows],
            )
            parts.append([tensor[batch.is_real] for tensor in evaluation])
        return Evaluation(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _advance(self, rollout: Rollout, kl_per_sequence: float | None) -> None:
        """Count the update, and let the KL coefficient follow what it measured."""
        if kl_per_sequence is not None:
            self.kl_controller.update(kl_per_sequence, len(rollout.scores))
        self.progress.step += 1
        response_tokens = int(rollout.samples.response_mask.sum())
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


def _kl_stop_event(stop: KlStop) -> EngineEvent:
    return EngineEvent(
        level="info",
        code="guard.fired",
        message=(
            f"update KL {stop.update_kl_k3:.4f} exceeded {stop.threshold:.4f} (1.5 × target_kl) "
            f"in epoch {stop.epoch}, minibatch {stop.minibatch}: this pass and the rest of the "
            "step were left out"
        ),
        data={
            "guard": "target_kl",
            "action": "stop_epochs",
            "epoch": stop.epoch,
            "minibatch": stop.minibatch,
            "update_kl_k3": stop.update_kl_k3,
            "threshold": stop.threshold,
        },
    )
