"""No dead knob: every setting of a run changes what the run does."""

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch

from ppo_engine.config import TrainConfig
from ppo_engine.guards import GuardConfig, GuardRule
from ppo_engine.trainer import Trainer
from tests.tiny_run import AsciiShare, tiny_config, tiny_policy, tiny_prompts

# name: (settings it needs, its other value)
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "clip_low": ({}, 0.01),
    "clip_high": ({}, 0.01),
    "dual_clip": ({"clip_high": 0.0005}, 1.001),
    "value_clip_range": ({}, 0.001),
    "kl_coef": ({}, 0.5),
    "kl_estimator": ({"kl_coef": 5.0}, "k3"),
    "kl_placement": ({"kl_coef": 5.0, "kl_estimator": "k2"}, "loss"),
    "kl_controller": ({"kl_coef": 5.0, "kl_horizon": 6}, "adaptive"),
    "target_kl_per_sequence": (
        {"kl_controller": "adaptive", "kl_horizon": 6, "total_steps": 4},
        1e-6,
    ),
    "kl_horizon": ({"kl_controller": "adaptive", "kl_horizon": 6}, 60),
    "target_kl": ({}, 1e-6),
    "advantage_estimator": ({"group_size": 2}, "rloo"),
    "group_size": ({}, 2),
    "gamma": ({}, 0.5),
    "lam": ({}, 0.1),
    "lambda_value": ({}, 0.0),
    "standardize_advantages": ({}, False),
    "reward_scaling": ({"standardize_advantages": False}, "none"),
    "missing_stop_penalty": ({"stop_share": True}, 5.0),
    "overlong_buffer": ({"stop_share": True}, {"tokens": 7, "penalty": 5.0}),
    "mask_truncated": ({"stop_share": True}, True),
    "bootstrap_truncated": ({"stop_share": True}, True),
    "importance_weight_cap": ({}, 0.5),
    "critic": ({"value_coef": 5.0}, "detached_head"),
    "value_coef": ({}, 5.0),
    "entropy_coef": ({}, 0.5),
    "critic_warmup_steps": ({}, 1),
    "batch_size": ({}, 4),
    "epochs": ({}, 1),
    "minibatches": ({}, 3),
    "total_steps": ({}, 3),
    "loss_aggregation": ({"stop_share": True}, "sequence_mean_token_mean"),
    "learning_rate": ({}, 1e-4),
    "value_learning_rate": ({}, 1e-4),
    "lr_schedule": ({}, "linear"),
    "warmup_fraction": ({}, 1.0),
    "weight_decay": ({}, 1.0),
    "max_grad_norm": ({}, 1e-3),
    "max_response_tokens": ({}, 5),
    "temperature": ({}, 0.5),
    "lora": ({}, {"rank": 2, "alpha": 8.0, "target_modules": "auto", "last_layers": None}),
    "precision": ({}, "bf16"),
    "eval_interval": ({}, 1),
    "eval_samples": ({}, 1),
    "stored_samples": ({}, 1),
    "guards": (
        {},
        GuardConfig(
            preset="off",
            rules=(
                GuardRule(
                    signal="entropy",
                    window=1,
                    warn=-2.0,
                    critical=-1.0,
                    cooldown=0,
                    action="scale_lr",
                ),
            ),
        ).to_dict(),
    ),
}
ELSEWHERE = {
    "micro_batch_size": "changes memory and speed alone: tested to change no result",
    "max_prompt_tokens": "refuses prompts when they are read",
    "checkpoint_interval": "decides which folders are written",
}


def test_every_setting_is_tried() -> None:
    assert set(CHANGES) | set(ELSEWHERE) == {each.name for each in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_run(tiny_model, name: str) -> None:
    needs, value = CHANGES[name]
    base = tiny_config(total_steps=2).to_dict() | needs
    ends_early = base.pop("stop_share", False)

    before = unchanged(tiny_model, json.dumps(base), ends_early=ends_early)
    after = fingerprint(tiny_model, base | {name: value}, ends_early=ends_early)

    assert before != after


def test_the_same_settings_give_the_same_run(tiny_model) -> None:
    settings = tiny_config(total_steps=2).to_dict()

    first, second = (fingerprint(tiny_model, settings, ends_early=False) for _ in range(2))

    assert first == second


@functools.cache
def unchanged(folder, settings: str, *, ends_early: bool) -> tuple[Any, ...]:
    return fingerprint(folder, json.loads(settings), ends_early=ends_early)


def fingerprint(folder, settings: dict[str, Any], *, ends_early: bool) -> tuple[Any, ...]:
    """Everything a run tells and leaves, but its effort."""
    config = TrainConfig.from_dict(settings)
    policy = tiny_policy(folder, config)
    if ends_early:  # some responses stop by themselves, some are cut
        policy.base = dataclasses.replace(policy.base, stop_ids=tuple(range(0, 258, 12)))
    prompts = tiny_prompts(policy.base)
    trainer = Trainer(policy, AsciiShare(), prompts, config, seed=0, validation=prompts)
    reports = list(trainer.steps())
    effort = ("seconds.", "tokens_per_second", "peak_memory")
    values = [
        {name: x for name, x in each.values.items() if not name.startswith(effort)}
        for each in reports
    ]
    weights = [p.detach().clone() for p in trainer.policy.adapter_parameters().values()]
    return (
        values,
        [[each.sums for each in report.passes] for report in reports],
        [report.samples for report in reports],
        [torch.flatten(weight).tolist() for weight in weights],
    )
