"""`trimtab demo`, whole, with the tiny model in place of the demo's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running_stack import (
    removed_afterwards,
    trimtab_environment,
    uppercase_job,
    write_prompts,
)
from tests.tiny_model import TINY_MODEL_ID


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A demo folder of our own."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_prompts(folder / "prompts.jsonl", 16)
    write_prompts(folder / "heldout.jsonl", 8, start=50)
    return folder


def run_demo(
    data: Path, models: Path, tmp_path: Path, **hyperparameters: Any
) -> subprocess.CompletedProcess[str]:
    spec = uppercase_job(TINY_MODEL_ID, **hyperparameters)
    (data / "job.json").write_text(json.dumps(spec))
    with removed_afterwards(tmp_path / "home") as home:
        return subprocess.run(
            [sys.executable, "-m", "trimtab.cli.main", "demo", "--data", str(data)],
            env=trimtab_environment(home, models, COLUMNS="100"),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def test_a_demo_that_learns_ends_well_and_leaves_the_adapter(
    data: Path, tiny_models: Path, tmp_path: Path
) -> None:
    done = run_demo(data, tiny_models, tmp_path, max_steps=30)

    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "step 30/30",
        "every sha256 verified",
        "The reward rose by",
        "8 held-out prompts",
        "Answers before and after",
        "Clipping: the range 0.2",
        "trimtab up",
    ):
        assert said in done.stdout
    out = tmp_path / "trimtab-demo"
    assert str(out / "adapter") in done.stdout
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert json.loads((out / "evaluation" / "summary.json").read_text())["difference"]["mean"] > 0


def test_a_demo_that_does_not_learn_says_so_and_fails(
    data: Path, tiny_models: Path, tmp_path: Path
) -> None:
    done = run_demo(data, tiny_models, tmp_path, max_steps=1, learning_rate=1e-9)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "did NOT rise beyond the noise" in done.stdout


def test_a_demo_whose_job_is_refused_tells_why(
    data: Path, tiny_models: Path, tmp_path: Path
) -> None:
    done = run_demo(data, tiny_models, tmp_path, clip_range=1.5)

    assert done.returncode == 2, done.stdout + done.stderr
    assert "clip_range" in done.stderr
    assert "Traceback" not in done.stderr
