import dataclasses
from typing import Any

import pytest

from core.hyperparameters import PpoHyperparameters
from core.spec import Resolved, parse_spec, resolve
from ppo_engine.config import TrainConfig
from tests.factories import spec_dict
from worker.translate import RENAMED, RunInputs, engine_config, run_file, spec_param

NOT_ENGINE_SETTINGS = {"n_epochs", "max_steps", "seed"}
"""They become the number of steps, and the seed of the run."""

CHANGES: dict[str, Any] = {
    "clip_range": 0.3,
    "clip_range_high": 0.35,
    "dual_clip": 3.0,
    "value_clip_range": 0.4,
    "kl_coef": 0.2,
    "kl_estimator": "k2",
    "kl_placement": "loss",
    "kl_controller": "adaptive",
    "target_kl_per_sequence": 3.0,
    "kl_horizon": 500,
    "target_kl": 0.5,
    "advantage_estimator": "grpo",
    "group_size": 2,
    "gamma": 0.9,
    "lambda": 0.8,
    "lambda_value": 1.0,
    "standardize_advantages": False,
    "reward_scaling": "none",
    "missing_stop_penalty": 1.0,
    "overlong_buffer": {"tokens": 4, "penalty": 1.0},
    "mask_truncated": True,
    "bootstrap_truncated": True,
    "importance_weight_cap": 2.0,
    "critic": "adapter",
    "value_coef": 0.5,
    "entropy_coef": 0.01,
    "critic_warmup_steps": 3,
    "batch_size": 16,
    "epochs": 3,
    "minibatches": 2,
    "n_epochs": 2,
    "max_steps": 77,
    "micro_batch_size": 2,
    "loss_aggregation": "sequence_mean_token_mean",
    "learning_rate": 1e-4,
    "value_learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_fraction": 0.2,
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "max_prompt_tokens": 100,
    "max_response_tokens": 50,
    "temperature": 0.7,
    "lora": {"rank": 4},
    "precision": "bf16",
    "seed": 99,
    "checkpoint_interval": 3,
    "eval_interval": 3,
    "eval_samples": 3,
    "stored_samples": 3,
    "guards": {"preset": "strict"},
}


def resolved(**hyperparameters: Any) -> Resolved:
    return resolve(parse_spec(spec_dict(**hyperparameters)), prompts=64, seed=1)


def run_of(settings: Resolved) -> dict[str, Any]:
    inputs = RunInputs(
        job_id="j",
        attempt=2,
        device="cpu",
        base_model={"id": "m", "path": "/m", "sha256": "0"},
        training_file="data/train.jsonl",
        validation_file=None,
        start_adapter="start/adapter",
        resume_from="resume/ck-4",
    )
    return run_file(settings, inputs)


def spec_names() -> set[str]:
    return {field.alias or name for name, field in PpoHyperparameters.model_fields.items()}


def test_every_spec_field_is_tried_below() -> None:
    assert set(CHANGES) == spec_names()


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_spec_field_changes_the_run(name: str) -> None:
    assert run_of(resolved(**{name: CHANGES[name]})) != run_of(resolved())


def test_every_engine_setting_comes_from_one_spec_field() -> None:
    engine = {field.name for field in dataclasses.fields(TrainConfig)}

    translated = {RENAMED.get(name, name) for name in engine - {"total_steps"}}

    assert translated == spec_names() - NOT_ENGINE_SETTINGS
    assert len(translated) == len(engine) - 1


def test_settings_keep_their_values_under_the_engines_names() -> None:
    config = engine_config(resolved(clip_range=0.1, clip_range_high=0.3, **{"lambda": 0.9}))

    assert (config["clip_low"], config["clip_high"], config["lam"]) == (0.1, 0.3, 0.9)
    assert config["total_steps"] == 2


def test_the_adapted_layers_are_translated() -> None:
    every = engine_config(resolved())
    top = engine_config(resolved(lora={"layers": {"last": 3}}))
    of_old_job = resolved()
    del of_old_job.hyperparameters["lora"]["layers"]

    assert every["lora"]["last_layers"] is None
    assert top["lora"]["last_layers"] == 3
    assert engine_config(of_old_job) == every


def test_the_config_is_one_the_engine_takes() -> None:
    settings = engine_config(resolved(precision="fp32", micro_batch_size=4))

    assert TrainConfig.from_dict(settings).batch_size == 32


def test_what_the_engine_measures_is_left_to_it() -> None:
    settings = engine_config(resolved())

    assert (settings["precision"], settings["micro_batch_size"]) == ("auto", "auto")
    assert engine_config(resolved(precision="bf16"))["precision"] == "bf16"


def test_the_run_file_says_all_of_the_run() -> None:
    run = run_of(resolved())

    assert run["protocol_version"] == 1
    assert (run["kind"], run["attempt"], run["seed"]) == ("train", 2, 1)
    assert run["data"] == {"train": "data/train.jsonl", "validation": None}
    assert run["resume_from"] == "resume/ck-4"
    assert run["start_adapter"] == "start/adapter"
    assert run["reward"]["type"] == "sentiment"


@pytest.mark.parametrize(
    ("engine", "spec"),
    [
        ("clip_low", "method.ppo.hyperparameters.clip_range"),
        ("lam", "method.ppo.hyperparameters.lambda"),
        ("kl_coef", "method.ppo.hyperparameters.kl_coef"),
        ("lora.layers", "method.ppo.hyperparameters.lora.layers"),
        ("reward.pattern", "method.ppo.reward.pattern"),
        ("training_file", "training_file"),
    ],
)
def test_faults_are_shown_where_the_user_wrote_them(engine: str, spec: str) -> None:
    assert spec_param(engine) == spec
