"""A run directory as the worker would prepare it, for tests that start a trainer themselves."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.waiting import wait_until

FAKE_TRAINER = Path(__file__).with_name("trainer.py")

PROMPTS = ("Tell me about your day.", "What is rain?", "Describe a cat.", "How do boats float?")

TRAIN_CONFIG: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "value_clip_range": 0.2,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "kl_controller": "fixed",
    "target_kl_per_sequence": 6.0,
    "kl_horizon": 10_000,
    "target_kl": None,
    "advantage_estimator": "gae",
    "group_size": 1,
    "gamma": 1.0,
    "lam": 0.95,
    "lambda_value": None,
    "standardize_advantages": True,
    "reward_scaling": "none",
    "missing_stop_penalty": 0.0,
    "overlong_buffer": None,
    "mask_truncated": False,
    "bootstrap_truncated": False,
    "importance_weight_cap": None,
    "critic": "shared_head",
    "value_coef": 0.1,
    "entropy_coef": 0.0,
    "critic_warmup_steps": 0,
    "batch_size": 4,
    "epochs": 2,
    "minibatches": 2,
    "total_steps": 3,
    "micro_batch_size": 2,
    "loss_aggregation": "token_mean",
    "learning_rate": 1e-3,
    "value_learning_rate": 1e-3,
    "lr_schedule": "linear",
    "warmup_fraction": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_prompt_tokens": 64,
    "max_response_tokens": 6,
    "temperature": 1.0,
    "lora": {"rank": 2, "alpha": 4.0, "target_modules": "auto", "last_layers": None},
    "precision": "fp32",
    "checkpoint_interval": 2,
    "eval_interval": 5,
    "eval_samples": 4,
    "stored_samples": 2,
    "guards": {"preset": "off", "rules": []},
}


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run directory and what its trainer has written so far."""

    path: Path

    def lines(self) -> list[dict[str, Any]]:
        """The complete lines of the journal."""
        journal = self.path / "metrics.jsonl"
        text = journal.read_text() if journal.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def lines_of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.lines() if line["kind"] == kind]

    def exit(self) -> dict[str, Any]:
        """The contents of `exit.json`."""
        content: dict[str, Any] = json.loads((self.path / "exit.json").read_text())
        return content

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """A trainer at work in this folder; closing its stdin ends it."""
        with (self.path / "trainer.log").open("ab") as log:
            return subprocess.Popen(
                [*command, str(self.path / "run.json")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.path,
            )

    def train(self, command: list[str]) -> int:
        """The exit code of a trainer left alone."""
        with self.start(command) as process:
            return process.wait(timeout=120)

    def wait_for_step(self, step: int) -> None:
        """Return when the trainer has reported so many steps."""
        wait_until(lambda: len(self.lines_of("metrics")) >= step, seconds=60)

    def ask_to_stop(self, wish: str) -> None:
        """Put a wish into the `stop` file."""
        (self.path / "stop.tmp").write_text(wish)
        (self.path / "stop.tmp").replace(self.path / "stop")


def make_run_folder(
    path: Path,
    *,
    base_model: dict[str, str],
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> RunFolder:
    """A run directory with four prompts and a small configuration, changed as told."""
    path.mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "protocol_version": 1,
        "kind": "train",
        "job_id": "0199c2a0-6d1e-7a53-b2b4-1f6f0c9d3a10",
        "attempt": 1,
        "seed": 7,
        "device": "cpu",
        "base_model": base_model,
        "data": {"train": "train.jsonl", "validation": None},
        "config": TRAIN_CONFIG | (config or {}),
        "reward": {"type": "length", "unit": "chars", "min": 4, "max": 12},
        "resume_from": None,
        "out": ".",
    }
    (path / "run.json").write_text(json.dumps(run | changes))
    return RunFolder(path=path)


def fake_trainer_command(plan: Path | None = None) -> list[str]:
    """How to start the fake trainer; its plan may be written and changed later."""
    return [sys.executable, str(FAKE_TRAINER), *(["--plan", str(plan)] if plan else [])]


def write_plan(path: Path, **plan: Any) -> None:
    """Tell running and coming fake trainers what to do from now on."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(plan))
    draft.replace(path)
