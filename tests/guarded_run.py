"""Valid small runs under guards: a test states its rules, and what matters to it besides."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_engine.config import TrainConfig
from ppo_engine.guards import GuardConfig, GuardRule
from ppo_engine.reports import EngineEvent, StepReport
from ppo_engine.snapshot import optimizer_tensors, trained_parameters
from ppo_engine.trainer import Trainer
from tests.tiny_run import tiny_config, tiny_trainer

ALWAYS = {"signal": "entropy", "window": 1, "warn": -2.0, "critical": -1.0, "cooldown": 0}
NEVER_AGAIN = 1000
TOKENS_PER_STEP = 2 * 4


def after_tokens(steps: int, action: str, **changes: Any) -> dict[str, Any]:
    """A rule that acts from this step on."""
    limit = steps * TOKENS_PER_STEP - 0.5
    rule = {"signal": "response_tokens", "warn": limit - 0.1, "critical": limit}
    return {**rule, "action": action, **changes}


def ruled(*rules: dict[str, Any], preset: Any = "off") -> GuardConfig:
    return GuardConfig(
        preset=preset, rules=tuple(GuardRule(**{**ALWAYS, **rule}) for rule in rules)
    )


def small_config(guards: GuardConfig, **changes: Any) -> TrainConfig:
    small = {
        "batch_size": 2,
        "minibatches": 1,
        "epochs": 1,
        "max_response_tokens": 4,
        "total_steps": 6,
        "eval_interval": NEVER_AGAIN,
        "checkpoint_interval": 1,
    }
    return tiny_config(**{**small, **changes}, guards=guards)


def trainer_of(folder: Path, *rules: dict[str, Any], scorer: Any = None, **changes: Any) -> Trainer:
    """A run whose responses never stop by themselves, so that its tokens can be counted."""
    guards = ruled(*rules, preset=changes.pop("preset", "off"))
    trainer = tiny_trainer(folder, small_config(guards, **changes), scorer=scorer)
    trainer.policy.base = dataclasses.replace(trainer.policy.base, stop_ids=(9999,))
    return trainer


def taken(trainer: Trainer, count: int) -> list[StepReport]:
    steps = trainer.steps()
    return [next(steps) for _ in range(count)]


def told(report: StepReport, code: str) -> list[EngineEvent]:
    return [event for event in report.events if event.code == code]


def column(reports: list[StepReport], name: str) -> list[float | None]:
    return [report.values[name] for report in reports]


def learned(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights and of Adam's state."""
    tensors: dict[str, Tensor] = {**trained_parameters(trainer)}
    tensors |= {f"adam {name}": x for name, x in optimizer_tensors(trainer).items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def is_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )
