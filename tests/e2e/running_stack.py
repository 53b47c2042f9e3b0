"""A `trimtab up` process for tests, and the whole family of processes under it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from tests.fakes.waiting import wait_until
from trimtab.client import Client
from trimtab.stack import SECRETS, free_port
from trimtab.state import StateHome

START_SECONDS = 90
STOP_SECONDS = 60
JOB_SECONDS = 180

QUICK = {
    "TRIMTAB_TICK_SECONDS": "0.2",
    "TRIMTAB_HEARTBEAT_SECONDS": "0.5",
    "TRIMTAB_LEASE_SECONDS": "4",
    "TRIMTAB_REAP_SECONDS": "0.5",
    "TRIMTAB_REDISPATCH_SECONDS": "1",
    "OMP_NUM_THREADS": "1",
}


def trimtab_environment(home: Path, models: Path, **more: str) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if name not in SECRETS}
    places = {"TRIMTAB_HOME": str(home), "TRIMTAB_MODELS": str(models)}
    return {**outside, **QUICK, **places, **more}


class RunningStack:
    """`trimtab up`, started and ready; its family is every process that it may leave behind."""

    def __init__(self, home: Path, models: Path, *, workers: int = 1) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        home.mkdir(parents=True, exist_ok=True)
        arguments = ["up", "--port", str(self.port), "--workers", str(workers)]
        with (home / "up.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trimtab.cli.main", *arguments],
                env=trimtab_environment(home, models),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A suite that runs in the background has it ignored, and hands that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )
        wait_until(self._is_ready, seconds=START_SECONDS)

    def _is_ready(self) -> bool:
        output = (self.home / "up.log").read_text()
        assert self._process.poll() is None, output
        address = self.home / "api-url"  # one of a stack that was killed may lie there
        return address.exists() and address.read_text().strip() == self.url

    def client(self) -> Client:
        return Client(self.url, (self.home / "api-key").read_text().strip())

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit code, after the signal and the end of the process."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        return self._process.wait(STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.end()


@contextmanager
def removed_afterwards(home: Path) -> Iterator[Path]:
    """A home whose servers' data is deleted at the end, wherever it lies."""
    try:
        yield home
    finally:
        StateHome(home).remove()


def uppercase_job(model_id: str, **hyperparameters: Any) -> dict[str, Any]:
    """A job that a tiny random model learns in seconds: answer in capital letters."""
    return {
        "model": model_id,
        "seed": 3,
        "method": {
            "type": "ppo",
            "ppo": {
                "reward": {"type": "regex", "pattern": "[A-Z]", "mode": "count", "max_count": 8},
                "hyperparameters": {
                    "batch_size": 32,
                    "minibatches": 2,
                    "epochs": 2,
                    "max_steps": 3,
                    "kl_coef": 0.0,
                    "learning_rate": 0.003,
                    "value_learning_rate": 0.01,
                    "critic_warmup_steps": 0,
                    "warmup_fraction": 0.0,
                    "target_kl": None,
                    "max_prompt_tokens": 64,
                    "max_response_tokens": 8,
                    "precision": "fp32",
                    "lora": {"rank": 8, "alpha": 32.0},
                    "checkpoint_interval": 2,
                    "eval_interval": 1000,
                    "eval_samples": 4,
                    "stored_samples": 2,
                    **hyperparameters,
                },
            },
        },
    }


def write_prompts(path: Path, count: int, *, start: int = 0) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Say word number {start + n}."}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
