"""The trainer as a child process: started without credentials, stopped on request, buried with us.

What it writes is read elsewhere: `worker/journal.py` (lines), `worker/workspace.py` (folders).
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from worker.errors import BrokenTrainer

ALLOWED_VARIABLES = frozenset(
    {
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "LANG",
        "LC_ALL",
        "LD_LIBRARY_PATH",
        "NVIDIA_VISIBLE_DEVICES",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "TZ",
    }
)
"""What a trainer inherits: where programs are, the language and devices."""

ALLOWED_PREFIXES = ("OMP_", "MKL_")
"""And how its threads behave."""

_PR_SET_PDEATHSIG = 1


class Stop(StrEnum):
    """What a trainer is asked to do at its next boundary; a later one replaces an earlier."""

    FINISH = "finish"
    """Save, export what there is, and end well."""
    PAUSE = "pause"
    """Save and end."""
    CANCEL = "cancel"
    """End."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerEnd:
    """How a trainer ended: what `exit.json` says, else what the process returned."""

    code: int
    reason: str
    error: Mapping[str, Any] | None


def trainer_environment(parent: Mapping[str, str], run_folder: Path) -> dict[str, str]:
    """The variables of a trainer: a few of ours, a home and a temporary folder of its own."""
    inherited = {
        name: value
        for name, value in parent.items()
        if name in ALLOWED_VARIABLES or name.startswith(ALLOWED_PREFIXES)
    }
    return {
        **inherited,
        "HOME": str(run_folder / "home"),
        "TMPDIR": str(run_folder / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class TrainerProcess:
    """A running trainer in a process group of its own.

    Start it from the main thread: the kernel's death signal follows the thread that forked.
    """

    def __init__(self, command: Sequence[str], run_folder: Path) -> None:
        self._folder = run_folder
        for name in ("home", "tmp"):
            (run_folder / name).mkdir(exist_ok=True)
        with (run_folder / "trainer.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the operator chose the command
                [*command, str(run_folder / "run.json")],
                cwd=run_folder,
                env=trainer_environment(os.environ, run_folder),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                # Nothing but two system calls between fork and exec.
                preexec_fn=DieWithParent(),  # noqa: PLW1509
            )

    @property
    def pid(self) -> int:
        """The process id, also the id of its group."""
        return self._process.pid

    def wait(self, seconds: float) -> bool:
        """Whether the trainer has ended, within so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_stop(self, wish: Stop) -> None:
        """Leave the wish in the `stop` file; a pause also as SIGTERM, which ends a sleep."""
        draft = self._folder / "stop.tmp"
        draft.write_text(wish)
        draft.replace(self._folder / "stop")
        if wish is Stop.PAUSE and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End the whole group at once and wait until the trainer is gone."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Let go of the pipe; a trainer that still runs dies of it."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def end(self) -> TrainerEnd:
        """How the trainer ended, after `wait` said that it has."""
        self.close()
        path = self._folder / "exit.json"
        if path.exists():
            return parse_exit(path.read_text())
        code = self._process.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return TrainerEnd(code=code, reason=reason, error=None)


def parse_exit(text: str) -> TrainerEnd:
    """The contents of an `exit.json`."""
    try:
        content = json.loads(text)
        code, reason, error = content["code"], content["reason"], content["error"]
    except (ValueError, KeyError, TypeError) as fault:
        raise BrokenTrainer("exit.json is not what the protocol says") from fault
    if not isinstance(code, int) or not isinstance(error, dict | None):
        raise BrokenTrainer("exit.json is not what the protocol says")
    return TrainerEnd(code=code, reason=str(reason), error=error)


class DieWithParent:
    """Called in a child, has the kernel kill it when the process that built this dies (Linux)."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __call__(self) -> None:
        """Ask the kernel; end at once if it is too late to ask."""
        if self._libc is None:
            return
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:  # the parent died before the call above
            os._exit(1)
