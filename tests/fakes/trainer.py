"""A trainer without a model: it keeps the file protocol and hashes from step to step.

    python tests/fakes/trainer.py [--plan PLAN.json] RUN.json

Its state after step s is sha256(state after s - 1, s), begun from the seed and the training file;
the adapter holds the last state. So the adapter's hash proves that no step was lost or done twice.
The plan, read afresh at every step, makes it misbehave:

    step_seconds    how long a step takes
    hold_at         wait before this step until the plan no longer says so
    attempts        the attempts for which the keys below count; all when absent
    die_at          kill itself with SIGKILL before this step
    die_in_save     the same in the checkpoint of `step`: "draft" (half written), "name" (before it
                    has its name) or "line" (before it is told)
    exit_at, exit   end before this step with this {code, reason, error}
    ignore_stop     go on training when asked to stop
    padding         bytes of nothing in each checkpoint
    spoil           "checkpoint", "final" or "line": write a wrong hash, or a line that is no JSON
"""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import signal
import struct
import sys
import threading
import time
import types
from base64 import b64encode
from pathlib import Path
from typing import Any, NoReturn

INVALID_CONFIG, INVALID_TRAINING_FILE, STOPPED = 64, 65, 75
HISTOGRAM_BINS = 4


def first_state(seed: int, training_file: bytes) -> str:
    """The state before the first step."""
    return hashlib.sha256(f"{seed}:".encode() + training_file).hexdigest()


def next_state(state: str, step: int) -> str:
    """The state after a step."""
    return hashlib.sha256(f"{state}:{step}".encode()).hexdigest()


def state_after(steps: int, *, seed: int, training_file: bytes) -> str:
    """What an uninterrupted run of so many steps ends with."""
    state = first_state(seed, training_file)
    for step in range(1, steps + 1):
        state = next_state(state, step)
    return state


def reward_of(state: str) -> float:
    """The reward that the fake reports in a state: a number that tells states apart."""
    return int(state[:8], 16) / 2**32


class EndRun(Exception):
    """Ends the process with an exit code and what goes into `exit.json`."""

    def __init__(self, code: int, reason: str, error: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.error = error


class Lines:
    """The `metrics.jsonl` of one attempt."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._count = 0

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one numbered line in a single write."""
        self._count += 1
        line = {"line": self._count, "kind": kind, "step": step, "at": time.time(), **fields}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def write_raw(self, text: bytes) -> None:
        """Append something that keeps no protocol."""
        self._file.write(text)

    def sync(self) -> None:
        """Put everything written on disk."""
        os.fsync(self._file.fileno())


class FakeTrainer:
    """One run from its `run.json` to its `exit.json`."""

    def __init__(self, run_file: Path, plan_file: Path | None) -> None:
        self._folder = run_file.parent
        self._plan_file = plan_file
        self._run = json.loads(run_file.read_text())
        self._lines = Lines(self._folder / "metrics.jsonl")
        self._paused_by_signal = False

    def main(self) -> int:
        """Train, write `exit.json` and return its code."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        threading.Thread(target=_exit_at_end_of_input, daemon=True).start()
        try:
            self._train()
            code, reason, error = 0, "done", None
        except EndRun as end:
            code, reason, error = end.code, end.reason, end.error
        _write_json(self._folder / "exit.json", {"code": code, "reason": reason, "error": error})
        return code

    def _on_terminate(self, _signal: int, _frame: types.FrameType | None) -> None:
        self._paused_by_signal = True

    def _train(self) -> None:
        _refuse_other_version(self._run["protocol_version"])
        config = self._run["config"]
        _refuse_bad_config(config)
        training_file = self._path(self._run["data"]["train"]).read_bytes()
        _refuse_bad_rows(training_file)
        state, step = first_state(self._run["seed"], training_file), 0
        if self._run["resume_from"] is not None:
            saved = json.loads((self._path(self._run["resume_from"]) / "state.json").read_text())
            state, step = saved["state"], saved["step"]
        done_here = 0
        while step < config["total_steps"]:
            self._stop_if_asked(step, state)
            while self._plan().get("hold_at") == step + 1 and not self._is_to_finish():
                self._stop_if_asked(step, state)
                time.sleep(0.02)
            if done_here and self._is_to_finish():
                self._save(step, state)
                break
            done_here += 1
            self._misbehave(step + 1)
            step += 1
            state = next_state(state, step)
            self._report(step, state)
            if step % config["checkpoint_interval"] == 0 or step == config["total_steps"]:
                self._save(step, state)
        self._export(step, state)

    def _report(self, step: int, state: str) -> None:
        time.sleep(self._plan().get("step_seconds", 0.0))
        sums = struct.pack(f"<{6 * HISTOGRAM_BINS}f", *range(6 * HISTOGRAM_BINS))
        values = {
            "policy_clip_fraction": 0.1,
            "grad_norm": None,
            "counts": {"zero_advantage": 0, "in_range_positive": 8},
        }
        self._lines.write(
            "clip",
            step,
            epoch=0,
            minibatch=0,
            values=values,
            histogram=b64encode(sums).decode(),
        )
        self._write_sample(step, state)
        self._lines.write(
            "metrics",
            step,
            values={
                "reward_mean": reward_of(state),
                "kl_reference_per_sequence": 0.0 if step == 1 else 0.01 * step,
                "prompt_tokens": 16 * step,
                "response_tokens": 8 * step,
                "seconds.sample": 0.001,
            },
        )

    def _write_sample(self, step: int, state: str) -> None:
        row = {
            "row": 0,
            "prompt_id": "0",
            "messages": [{"role": "user", "content": "Say something."}],
            "completion": state,
            "finish_reason": "stop",
            "reward": reward_of(state),
            "kl_reference": 0.0,
            "tokens": 8,
        }
        path = self._folder / "samples" / f"{step}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n", mtime=0))
        self._lines.write("sample", step, path=f"samples/{step}.jsonl.gz")

    def _save(self, step: int, state: str) -> None:
        target = self._folder / f"ck-{step}"
        if target.exists():
            return
        draft = self._folder / f"ck-{step}.tmp-{os.getpid()}"
        draft.mkdir()
        (draft / "adapter").mkdir()
        (draft / "adapter" / "adapter_model.safetensors").write_text(state)
        self._die_in_save(step, "draft")
        _write_json(draft / "state.json", {"state": state, "step": step})
        (draft / "padding").write_bytes(bytes(self._faults().get("padding", 0)))
        names = ("adapter/adapter_model.safetensors", "padding", "state.json")
        files = {name: _described(draft / name) for name in names}
        manifest = {"files": files, "step": step, "environment": {"trainer": "fake"}}
        _write_json(draft / "manifest.json", manifest)
        self._die_in_save(step, "name")
        draft.rename(target)
        digest = _sha256(target / "manifest.json")
        self._die_in_save(step, "line")
        if self._spoils("checkpoint"):
            (target / "state.json").write_text("{}")
        self._lines.sync()
        self._lines.write("checkpoint", step, path=target.name, manifest_sha256=digest, good=True)

    def _export(self, step: int, state: str) -> None:
        draft = self._folder / f"final.tmp-{os.getpid()}"
        (draft / "adapter").mkdir(parents=True)
        (draft / "training").mkdir()
        (draft / "adapter" / "adapter_model.safetensors").write_text(state)
        _write_json(draft / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
        _write_json(draft / "training" / "config.json", self._run["config"])
        roles = {
            "adapter/adapter_config.json": ("adapter", "application/json"),
            "adapter/adapter_model.safetensors": ("adapter", "application/octet-stream"),
            "training/config.json": ("training", "application/json"),
        }
        files = [
            {"path": path, "role": role, "media_type": media_type, **_described(draft / path)}
            for path, (role, media_type) in roles.items()
        ]
        base = self._run["base_model"]
        manifest = {
            "schema_version": 1,
            "job_id": self._run["job_id"],
            "step": step,
            "base_model": {"id": base["id"], "sha256": base["sha256"]},
            "files": files,
        }
        _write_json(draft / "manifest.json", manifest)
        target = self._folder / "final"
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        digest = _sha256(target / "manifest.json")
        if self._spoils("final"):
            (target / "adapter" / "adapter_model.safetensors").write_text("something else")
        self._lines.write("final", step, path="final", manifest_sha256=digest)

    def _stop_if_asked(self, step: int, state: str) -> None:
        stop = self._folder / "stop"
        wish = stop.read_text() if stop.exists() else ""
        if self._plan().get("ignore_stop"):
            return
        if wish == "cancel":
            raise EndRun(STOPPED, "cancel")
        if wish == "pause" or self._paused_by_signal:
            if step > 0:
                self._save(step, state)
            raise EndRun(STOPPED, "pause")

    def _is_to_finish(self) -> bool:
        stop = self._folder / "stop"
        return stop.exists() and stop.read_text() == "finish"

    def _misbehave(self, step: int) -> None:
        plan = self._faults()
        if plan.get("die_at") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.get("exit_at") == step:
            end = plan["exit"]
            raise EndRun(end["code"], end["reason"], end.get("error"))
        if plan.get("spoil") == "line":
            self._lines.write_raw(b"not a line of the protocol\n")

    def _die_in_save(self, step: int, point: str) -> None:
        if self._faults().get("die_in_save") == {"step": step, "point": point}:
            os.kill(os.getpid(), signal.SIGKILL)

    def _spoils(self, what: str) -> bool:
        return bool(self._faults().get("spoil") == what)

    def _faults(self) -> dict[str, Any]:
        plan = self._plan()
        attempts = plan.get("attempts")
        return plan if attempts is None or self._run["attempt"] in attempts else {}

    def _plan(self) -> dict[str, Any]:
        if self._plan_file is None or not self._plan_file.exists():
            return {}
        plan: dict[str, Any] = json.loads(self._plan_file.read_text())
        return plan

    def _path(self, name: str) -> Path:
        return self._folder / name


def _refuse_other_version(version: int) -> None:
    """The fake speaks version 1."""
    if version != 1:
        message = f"protocol_version must be 1, got {version}"
        error = {"code": "invalid_config", "message": message, "param": "protocol_version"}
        raise EndRun(INVALID_CONFIG, "invalid_config", error)


def _refuse_bad_config(config: dict[str, Any]) -> None:
    """The one check of settings that the fake shares with the engine."""
    if not 0 < config["clip_low"] < 1:
        message = f"clip_low must lie in (0, 1), got {config['clip_low']}"
        error = {"code": "invalid_config", "message": message, "param": "clip_low"}
        raise EndRun(INVALID_CONFIG, "invalid_config", error)


def _refuse_bad_rows(training_file: bytes) -> None:
    """The one check of rows that the fake shares with the engine."""
    for number, line in enumerate(training_file.splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            message = f"line {number} is no JSON"
            error = {"code": "invalid_training_file", "message": message, "param": None}
            raise EndRun(INVALID_TRAINING_FILE, "invalid_training_file", error) from None


def _exit_at_end_of_input() -> NoReturn:
    """Ends the process when nobody holds the other end of standard input any more."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content))
    draft.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def main() -> int:
    """Run the fake trainer from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("run_file", type=Path)
    arguments = parser.parse_args()
    return FakeTrainer(arguments.run_file.resolve(), arguments.plan).main()


if __name__ == "__main__":
    sys.exit(main())
