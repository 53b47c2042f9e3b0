"""From the API's words to the engine's: the only module that knows both vocabularies."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.hyperparameters import AUTO, MEASURED, PpoHyperparameters, final_values
from core.spec import Resolved
from ppo_engine.config import TrainConfig

PROTOCOL_VERSION = 1

RENAMED = {"clip_low": "clip_range", "clip_high": "clip_range_high", "lam": "lambda"}
"""Engine settings that the API calls otherwise; `total_steps` is counted by `core.spec`."""

_STAND_INS = {"precision": "fp32", "micro_batch_size": 1}
"""For settings that the engine measures, while the others are checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Where a run directory's trainer finds what it needs; paths as the trainer reads them."""

    job_id: str
    attempt: int
    device: str
    base_model: Mapping[str, str]
    """`id`, `path` and `sha256`."""
    training_file: str
    validation_file: str | None
    start_adapter: str | None
    """The adapter that training starts from and is held to; None for the bare base model."""
    resume_from: str | None


def engine_config(resolved: Resolved) -> dict[str, Any]:
    """The settings of the engine's run; its InvalidConfig if they cannot work together.

    A job that was resolved before a setting existed runs with that setting's default.
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    defaults = final_values(PpoHyperparameters())
    chosen = defaults | resolved.hyperparameters | {"total_steps": resolved.total_steps}
    chosen["lora"] = _engine_lora(chosen["lora"])
    settings = {name: chosen[RENAMED.get(name, name)] for name in names}
    left_to_engine = {name: AUTO for name in MEASURED if settings[name] == AUTO}
    stand_in = {name: _STAND_INS[name] for name in left_to_engine}
    return TrainConfig.from_dict(settings | stand_in).to_dict() | left_to_engine


def _engine_lora(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's settings; jobs that were resolved before `layers` existed adapt all."""
    others = {name: value for name, value in lora.items() if name != "layers"}
    layers = lora.get("layers", "all")
    return others | {"last_layers": None if layers == "all" else layers["last"]}


def run_file(resolved: Resolved, inputs: RunInputs) -> dict[str, Any]:
    """The contents of `run.json` for a training run."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "kind": "train",
        "job_id": inputs.job_id,
        "attempt": inputs.attempt,
        "seed": resolved.seed,
        "device": inputs.device,
        "base_model": dict(inputs.base_model),
        "data": {"train": inputs.training_file, "validation": inputs.validation_file},
        "config": engine_config(resolved),
        "reward": resolved.reward,
        "start_adapter": inputs.start_adapter,
        "resume_from": inputs.resume_from,
        "out": ".",
    }


def spec_param(param: str) -> str:
    """Where in a job request stands what the engine calls so."""
    if param == "reward" or param.startswith("reward."):
        return f"method.ppo.{param}"
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    name, *rest = param.split(".")
    if name not in names:
        return param
    return ".".join(["method.ppo.hyperparameters", RENAMED.get(name, name), *rest])
