"""Valid small runs in which much is clipped, with every token stored."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from ppo_engine.config import TrainConfig
from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES
from ppo_engine.reports import PassReport, StepReport
from ppo_engine.trainer import Trainer
from tests.tiny_run import tiny_config, tiny_trainer

CLIPPED = {each.value for each in CLIPPED_CLASSES}
ROWS = 12
ALL = 100
CONFIG = tiny_config(
    batch_size=ROWS,
    minibatches=4,
    epochs=1,
    micro_batch_size=3,
    max_response_tokens=10,
    learning_rate=0.03,
    max_grad_norm=100.0,
    clip_low=0.1,
    clip_high=0.15,
    dual_clip=1.3,
    stored_samples=ALL,
    total_steps=1,
    eval_interval=1000,
)


def trainer_of(folder: Path, config: TrainConfig) -> Trainer:
    """Some of its responses stop by themselves, some are cut."""
    trainer = tiny_trainer(folder, config)
    trainer.policy.base = dataclasses.replace(
        trainer.policy.base, stop_ids=tuple(range(0, 258, 12))
    )
    return trainer


def step_of(folder: Path, config: TrainConfig) -> StepReport:
    return next(trainer_of(folder, config).steps())


def counts_of(tokens: Any) -> dict[str, int]:
    return dict.fromkeys(TOKEN_CLASSES, 0) | Counter(token["class"] for token in tokens)


def counts_of_passes(passes: tuple[PassReport, ...]) -> dict[str, int]:
    return {name: sum(each.counts[name] for each in passes) for name in TOKEN_CLASSES}
