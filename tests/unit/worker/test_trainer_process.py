import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fakes.waiting import wait_until
from worker.errors import BrokenTrainer
from worker.trainer_process import (
    Stop,
    TrainerEnd,
    TrainerProcess,
    parse_exit,
    trainer_environment,
)

SHOW_ENVIRONMENT = "import json, os; open('environment', 'w').write(json.dumps(dict(os.environ)))"
SLEEP = "import time; open('ready', 'w'); time.sleep(60)"
READ_INPUT = "import sys; open('ready', 'w'); sys.stdin.read(); open('over', 'w')"
FORK = (
    "import subprocess, sys, time;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "open('child.tmp', 'w').write(str(child.pid));"
    "import os; os.rename('child.tmp', 'child'); time.sleep(60)"
)


@contextmanager
def trainer(program: str, folder: Path) -> Iterator[TrainerProcess]:
    """A child that runs a few lines of Python; it ignores the argument run.json."""
    process = TrainerProcess([sys.executable, "-c", program], folder)
    try:
        yield process
    finally:
        process.kill()


def test_a_trainer_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("DATABASE_URL", "REDIS_URL", "TRIMTAB_API_PASSWORD", "AWS_SECRET_ACCESS_KEY")
    for name in secrets:
        monkeypatch.setenv(name, "hush")

    with trainer(SHOW_ENVIRONMENT, tmp_path) as process:
        assert process.wait(10)

    seen = json.loads((tmp_path / "environment").read_text())
    assert "hush" not in seen.values()
    assert seen["HOME"] == str(tmp_path / "home")
    assert seen["TMPDIR"] == str(tmp_path / "tmp")
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_only_listed_variables_are_inherited(tmp_path: Path) -> None:
    parent = {"PATH": "/bin", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "1"}
    parent["EDITOR"] = "ed"

    seen = trainer_environment(parent, tmp_path)

    assert {name: seen.get(name) for name in parent} == parent | {"EDITOR": None}


def test_a_trainer_leads_its_own_group(tmp_path: Path) -> None:
    with trainer(SLEEP, tmp_path) as process:
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)


def test_killing_takes_the_whole_group(tmp_path: Path) -> None:
    with trainer(FORK, tmp_path) as process:
        wait_until((tmp_path / "child").exists)
        grandchild = psutil.Process(int((tmp_path / "child").read_text()))

        process.kill()

        wait_until(lambda: not psutil.pid_exists(grandchild.pid) or is_zombie(grandchild))


def test_closing_the_pipe_is_the_end_of_input(tmp_path: Path) -> None:
    with trainer(READ_INPUT, tmp_path) as process:
        wait_until((tmp_path / "ready").exists)
        assert not process.wait(0.1)

        process.close()

        assert process.wait(10)
        assert (tmp_path / "over").exists()


def test_a_pause_is_a_file_and_a_signal(tmp_path: Path) -> None:
    with trainer(SLEEP, tmp_path) as process:
        wait_until((tmp_path / "ready").exists)

        process.ask_to_stop(Stop.PAUSE)

        assert process.wait(10)
        assert process.end() == TrainerEnd(code=-signal.SIGTERM, reason="SIGTERM", error=None)
    assert (tmp_path / "stop").read_text() == "pause"


def test_a_cancel_is_a_file_only(tmp_path: Path) -> None:
    with trainer(SLEEP, tmp_path) as process:
        wait_until((tmp_path / "ready").exists)

        process.ask_to_stop(Stop.CANCEL)

        assert not process.wait(0.2)
    assert (tmp_path / "stop").read_text() == "cancel"


def test_exit_json_wins_over_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text('{"code": 75, "reason": "pause", "error": null}')

    with trainer("raise SystemExit(1)", tmp_path) as process:
        assert process.wait(10)

        assert process.end() == TrainerEnd(code=75, reason="pause", error=None)


def test_without_exit_json_the_exit_code_counts(tmp_path: Path) -> None:
    with trainer("raise SystemExit(3)", tmp_path) as process:
        assert process.wait(10)

        assert process.end() == TrainerEnd(code=3, reason="exit code 3", error=None)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"code": "0", "reason": "", "error": null}', '{"code": 0, "error": []}']
)
def test_a_broken_exit_json_is_refused(text: str) -> None:
    with pytest.raises(BrokenTrainer):
        parse_exit(text)


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
