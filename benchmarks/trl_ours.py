"""Our side of `trl_step.py`: the engine's own trainer.

python -m benchmarks.trl_ours ORDER.json
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import tensor

from benchmarks.trl_task import (
    CLIP_RANGE,
    GAMMA,
    KL_COEF,
    LAM,
    LORA_ALPHA,
    LORA_RANK,
    VALUE_CLIP_RANGE,
    VALUE_COEF,
    FixedBatch,
    LossAnswer,
    StepAnswer,
    Steps,
    carry_out,
    peak_memory_bytes,
    reward,
)
from ppo_engine.config import TrainConfig
from ppo_engine.losses import clipped_value_error, log_ratio, surrogate_terms
from ppo_engine.machine import faster_precision, gemm_gflops
from ppo_engine.masking import token_mean
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.reports import StepReport
from ppo_engine.rows import Prompt
from ppo_engine.trainer import Trainer

CONFIG = Path(__file__).parent / "step_config.json"
SHARED = {
    "clip_low": CLIP_RANGE,
    "clip_high": CLIP_RANGE,
    "value_clip_range": VALUE_CLIP_RANGE,
    "value_coef": VALUE_COEF,
    "kl_coef": KL_COEF,
    "gamma": GAMMA,
    "lam": LAM,
    "temperature": 1.0,
    "lora": {"rank": LORA_RANK, "alpha": LORA_ALPHA, "target_modules": "auto", "last_layers": None},
    "reward_scaling": "none",
    "weight_decay": 0.0,
    "lr_schedule": "constant",
    "warmup_fraction": 0.0,
}
"""What both sides do alike; the rest is that of `step_config.json`."""


class RewardFunction:
    """The reward function as a scorer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        """Of every call."""

    def grade(self, texts: Sequence[str], _items: Sequence[Mapping[str, Any]]) -> list[float]:
        """A reward per text."""
        start = time.perf_counter()
        rewards = [reward(text) for text in texts]
        self.seconds.append(time.perf_counter() - start)
        return rewards


def take_steps(steps: Steps) -> StepAnswer:
    """The engine's step, as a job takes it."""
    config = _config(steps)
    base = _endless(BaseModel.load(Path(steps.model), precision=config.precision, device="cpu"))
    policy = Policy(base, config.lora, temperature=config.temperature, seed=steps.seed)
    scorer = RewardFunction()
    trainer = Trainer(policy, scorer, _encoded(steps.prompts), config, seed=steps.seed)
    reports: list[StepReport] = []
    seconds = []
    start = time.perf_counter()
    for report in trainer.steps():
        end = time.perf_counter()
        seconds.append(_by_phase(report, end - start))
        reports.append(report)
        start = end
    timed = slice(steps.warmup_steps, None)
    adapter, critic = policy.adapter_parameters(), policy.value_parameters()
    return StepAnswer(
        seconds=seconds[timed],
        tokens=_new_tokens(reports)[timed],
        rewards=[report.values["reward_mean"] or 0.0 for report in reports],
        kl_to_reference=[report.values["kl_reference_per_sequence"] or 0.0 for report in reports],
        reward_seconds=sum(scorer.seconds) / len(scorer.seconds),
        peak_memory_bytes=peak_memory_bytes(),
        trained_parameters=sum(p.numel() for p in [*adapter.values(), *critic.values()]),
        critic_parameters=sum(p.numel() for p in critic.values()),
        note=f"{config.precision}; {config.critic} critic; micro-batches of "
        f"{config.micro_batch_size} rows; the first step's self-check, "
        f"{_check_seconds(reports[0]):.1f} s, is left out",
    )


def _settings() -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(CONFIG.read_text(encoding="utf-8"))
    return settings | SHARED


def _config(steps: Steps) -> TrainConfig:
    return TrainConfig.from_dict(
        _settings()
        | {
            "batch_size": steps.rows,
            "epochs": steps.epochs,
            "minibatches": steps.minibatches,
            "micro_batch_size": steps.rows // steps.minibatches,
            "total_steps": steps.warmup_steps + steps.timed_steps,
            "max_response_tokens": steps.response_tokens,
            "learning_rate": steps.learning_rate,
            "value_learning_rate": steps.value_learning_rate,
            "precision": _precision(steps),
        }
    )


def _precision(steps: Steps) -> str:
    """By default the faster one, by the measurement that a job begins with."""
    return faster_precision(gemm_gflops("cpu")) if steps.dtype == "default" else steps.dtype


def _endless(base: BaseModel) -> BaseModel:
    """The model without a token that ends a response: the only one named cannot be drawn."""
    return dataclasses.replace(base, stop_ids=(base.model.get_output_embeddings().out_features,))


def _encoded(prompts: Sequence[Sequence[int]]) -> list[EncodedPrompt]:
    nothing = Prompt(messages=(), item={})
    return [
        EncodedPrompt(prompt=nothing, line=line, token_ids=tuple(token_ids))
        for line, token_ids in enumerate(prompts, start=1)
    ]


def _by_phase(report: StepReport, step_seconds: float) -> dict[str, float]:
    seconds = {part: report.values[f"seconds.{part}"] or 0.0 for part in ("sample", "learn")}
    before_learning = sum(report.values[f"seconds.{part}"] or 0.0 for part in ("score", "estimate"))
    return {**seconds, "score": before_learning, "step": step_seconds - _check_seconds(report)}


def _check_seconds(report: StepReport) -> float:
    """Of the self-check; only a run's first step has one."""
    return report.values["seconds.check"] or 0.0


def _new_tokens(reports: Sequence[StepReport]) -> list[int]:
    """Of each step; reports count from the start of the run."""
    totals = [0, *(int(report.values["response_tokens"] or 0) for report in reports)]
    return [after - before for before, after in pairwise(totals)]


@torch.no_grad()
def fixed_loss(batch: FixedBatch) -> LossAnswer:
    """The batch's losses by the engine's formulas; old log-probabilities come from here."""
    base = BaseModel.load(Path(batch.model), precision="fp32", device="cpu")
    lora = TrainConfig.from_dict(_settings()).lora
    policy = Policy(base, lora, temperature=1.0, seed=0)
    longest = max(map(len, batch.prompts))
    gaps = [longest - len(prompt) for prompt in batch.prompts]
    tokens = tensor(
        [
            [base.pad_id] * gap + prompt + response
            for gap, prompt, response in zip(gaps, batch.prompts, batch.responses, strict=True)
        ]
    )
    attention_mask = torch.arange(tokens.shape[1])[None, :] >= tensor(gaps)[:, None]
    mask = torch.ones_like(tensor(batch.responses)).bool()

    logprobs = policy.evaluate(tokens, attention_mask, mask).logprobs
    old_logprobs = logprobs - tensor(batch.log_ratios)
    surrogate = surrogate_terms(
        log_ratio(logprobs, old_logprobs),
        tensor(batch.advantages),
        clip_low=CLIP_RANGE,
        clip_high=CLIP_RANGE,
        dual_clip=None,
    )
    value = clipped_value_error(
        tensor(batch.values),
        tensor(batch.old_values),
        tensor(batch.returns),
        clip_range=VALUE_CLIP_RANGE,
    )
    policy_loss = -token_mean(surrogate.objective, mask)
    value_loss = token_mean(value.error, mask)
    return LossAnswer(
        logprobs=logprobs.tolist(),
        old_logprobs=old_logprobs.tolist(),
        policy_loss=policy_loss.item(),
        value_loss=value_loss.item(),
        loss=(policy_loss + VALUE_COEF * value_loss).item(),
    )


if __name__ == "__main__":
    carry_out(fixed_loss, take_steps)
