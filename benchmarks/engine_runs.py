"""Runs of the engine without the service: the run files a worker would write, side by side."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.spec import parse_spec, resolve
from trimtab.home import models_folder
from trimtab.model_cache import find
from worker.translate import RunInputs, run_file

PROMPTS = Path(__file__).parents[1] / "trimtab" / "demo_data"
FILE_ID = "file-" + "0" * 32
"""Jobs name files by id; here they lie beside the run."""


def prepare(folder: Path, spec: Mapping[str, Any], *, seed: int, device: str) -> Path:
    """A run directory for this job request, ready for `python -m ppo_engine`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for name in ("prompts.jsonl", "heldout.jsonl"):
        shutil.copyfile(PROMPTS / name, folder / "data" / name)
    checked = parse_spec({**spec, "training_file": FILE_ID, "validation_file": FILE_ID})
    prompts = len((PROMPTS / "prompts.jsonl").read_text(encoding="utf-8").splitlines())
    model = find(str(spec["model"]), models_folder())
    content = run_file(
        resolve(checked, prompts=prompts, seed=seed),
        RunInputs(
            job_id=folder.name,
            attempt=1,
            device=device,
            base_model={name: str(model[name]) for name in ("id", "path", "sha256")},
            training_file="data/prompts.jsonl",
            validation_file="data/heldout.jsonl",
            start_adapter=None,
            resume_from=None,
        ),
    )
    (folder / "run.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def run_all(folders: Iterable[Path], *, parallel: int) -> None:
    """Every run to its end, so many at a time."""
    waiting = list(folders)
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < parallel:
            folder = waiting.pop(0)
            running.append((folder, _start(folder)))
        folder, process = running.pop(0)
        if process.wait() not in (0, STOPPED):
            raise SystemExit(f"{folder} failed:\n{(folder / 'trainer.log').read_text()[-2000:]}")
        print(f"{folder.name} ended", flush=True)


STOPPED = 75
"""Exit code of a run that a guard paused."""


def _start(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "trainer.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "ppo_engine", str(folder / "run.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What a run told of this kind, in order."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = map(json.loads, text.splitlines())
    return [line for line in lines if line["kind"] == kind]


def samples_of(folder: Path, step: int) -> list[str]:
    """The stored answers of a step."""
    text = gzip.decompress((folder / "samples" / f"{step}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line)["completion"] for line in text.splitlines()]
