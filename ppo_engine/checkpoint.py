"""Save and restore everything a run needs to go on as if it had never stopped.

A checkpoint is a folder of safetensors and JSON, never pickle; floats in JSON survive exactly.  On
a CPU with the same environment a resumed run is bit-identical to an uninterrupted one.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppo_engine import native
from ppo_engine.errors import InvalidConfig
from ppo_engine.export import BaseModelRef, read_adapter, write_adapter
from ppo_engine.folders import MANIFEST, files_of, sha256_of, whole_folder, write_json
from ppo_engine.snapshot import Snapshot, optimizer_tensors, restore_optimizer
from ppo_engine.trainer import Progress, Trainer

FORMAT = 2
"""Raised when older checkpoints can no longer be read."""
_LAST_GOOD = "last_good.safetensors"
"""The state a guard may roll back to, where it can."""


def save_checkpoint(trainer: Trainer, folder: Path, base_model: BaseModelRef) -> str:
    """Write the run's state into a new folder; the digest of its manifest."""
    with whole_folder(folder) as temporary:
        write_adapter(trainer.policy, temporary / "adapter", base_model)
        _save_tensors(trainer.policy.value_parameters(), temporary / "critic.safetensors")
        _save_tensors(optimizer_tensors(trainer), temporary / "optimizer.safetensors")
        states = {name: each.get_state() for name, each in trainer.generators.items()}
        _save_tensors(states, temporary / "generators.safetensors")
        if (last_good := trainer.health.last_good) is not None:
            _save_tensors(last_good.tensors, temporary / _LAST_GOOD)
        write_json(temporary / "state.json", _state(trainer))
        manifest = {
            "format": FORMAT,
            "step": trainer.progress.step,
            "environment": environment(trainer),
            "files": {
                name: {
                    "sha256": sha256_of(temporary / name),
                    "bytes": (temporary / name).stat().st_size,
                }
                for name in files_of(temporary)
            },
        }
        write_json(temporary / MANIFEST, manifest)
    return sha256_of(folder / MANIFEST)


def restore_checkpoint(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Bring a fresh trainer to the saved state; what differs in the environment since then."""
    manifest = _verified_manifest(folder)
    read_adapter(trainer.policy, folder / "adapter")
    for name, tensor in load_file(folder / "critic.safetensors").items():
        trainer.policy.value_parameters()[name].data.copy_(tensor)
    for name, tensor in load_file(folder / "generators.safetensors").items():
        trainer.generators[name].set_state(tensor)
    state = json.loads((folder / "state.json").read_text())
    _restore_state(trainer, state)
    restore_optimizer(trainer, load_file(folder / "optimizer.safetensors"))
    if (last_good := state["last_good"]) is not None:
        trainer.health.last_good = Snapshot(
            step=last_good["step"],
            tensors=load_file(folder / _LAST_GOOD, device=trainer.policy.device.type),
            state=last_good["state"],
        )
    now = environment(trainer)
    return {
        name: {"saved": saved, "now": now.get(name)}
        for name, saved in manifest["environment"].items()
        if saved != now.get(name)
    }


def environment(trainer: Trainer) -> dict[str, Any]:
    """What bit-identical results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "safetensors": safetensors.__version__,
        "device": trainer.policy.device.type,
        "precision": trainer.config.precision,
        "micro_batch_size": trainer.config.micro_batch_size,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.variant(),
        "threads": torch.get_num_threads(),
        "world_size": 1,
    }


def _verified_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise InvalidConfig(
            "the checkpoint was written by another version of Trimtab; start a new job",
            param="resume_from",
        )
    for name, entry in manifest["files"].items():
        if sha256_of(folder / name) != entry["sha256"]:
            raise InvalidConfig(f"the checkpoint's file {name} is damaged", param="resume_from")
    return manifest


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _state(trainer: Trainer) -> dict[str, Any]:
    last_good = trainer.health.last_good
    return {
        "progress": dataclasses.asdict(trainer.progress),
        "prompt_position": trainer.prompts.position,
        "kl_controller": trainer.kl_controller.state(),
        "reward_std": trainer.reward_std.state(),
        "skipped_in_a_row": trainer.updater.skipped_in_a_row,
        "learning_rate_scale": trainer.updater.learning_rate_scale,
        "health": trainer.health.state(),
        "last_good": last_good and {"step": last_good.step, "state": last_good.state},
    }


def _restore_state(trainer: Trainer, state: dict[str, Any]) -> None:
    trainer.progress = Progress(**state["progress"])
    trainer.prompts.position = state["prompt_position"]
    trainer.kl_controller.load(state["kl_controller"])
    trainer.reward_std.load(state["reward_std"])
    trainer.updater.skipped_in_a_row = state["skipped_in_a_row"]
    trainer.updater.learning_rate_scale = state["learning_rate_scale"]
    trainer.health.load(state["health"])
