"""What the worker relies on, asked of the engine and of the fake trainer of the fault tests alike.

The protocol is described in `docs/trainer-protocol.md`.
"""

import base64
import gzip
import hashlib
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.run_folder import (
    TRAIN_CONFIG,
    RunFolder,
    fake_trainer_command,
    make_run_folder,
    write_plan,
)
from tests.tiny_model import make_tiny_model

STEPS = 3
MANY_STEPS = 20
STOPPED = 75
LONG = {"total_steps": MANY_STEPS, "checkpoint_interval": 1000}
HISTOGRAM_ROWS = 6
FLOAT_BYTES = 4
ENGINE_EXISTS = importlib.util.find_spec("ppo_engine.__main__") is not None


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A trainer under test, and a base model that it accepts."""

    command: list[str]
    base_model: dict[str, str]

    def run_folder(self, path: Path, **changes: Any) -> RunFolder:
        return make_run_folder(path, base_model=self.base_model, **changes)


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        pytest.param(
            "engine", marks=pytest.mark.skipif(not ENGINE_EXISTS, reason="no engine to run")
        ),
    ],
)
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    if request.param == "fake":
        plan = tmp_path_factory.mktemp("plan") / "plan.json"
        write_plan(plan, step_seconds=0.05)
        nothing = {"id": "tests/none", "path": "/nowhere", "sha256": "0" * 64}
        return Trainer(command=fake_trainer_command(plan), base_model=nothing)
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    entry = json.loads((model / "model.json").read_text())
    base_model = {"id": entry["id"], "path": str(model), "sha256": entry["sha256"]}
    return Trainer(command=[sys.executable, "-m", "ppo_engine"], base_model=base_model)


@pytest.fixture(scope="module")
def finished(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = trainer.run_folder(tmp_path_factory.mktemp("finished") / "attempt-1")
    assert run.train(trainer.command) == 0, (run.path / "trainer.log").read_text()
    return run


def test_a_finished_run_says_so_in_exit_json(finished: RunFolder) -> None:
    exit_file = finished.exit()

    assert set(exit_file) == {"code", "reason", "error"}
    assert (exit_file["code"], exit_file["error"]) == (0, None)


def test_lines_are_numbered_from_one_and_end_with_the_final_line(finished: RunFolder) -> None:
    lines = finished.lines()

    assert [line["line"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["kind"] == "final"
    assert all(isinstance(line["at"], float) for line in lines)
    assert all(a["step"] <= b["step"] for a, b in itertools.pairwise(lines))


def test_every_step_has_one_metrics_line_with_finite_numbers(finished: RunFolder) -> None:
    metrics = finished.lines_of("metrics")

    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert {"reward_mean", "kl_reference_per_sequence"} <= set(line["values"])
        assert all(v is None or isinstance(v, int | float) for v in line["values"].values())


def test_token_counts_only_grow(finished: RunFolder) -> None:
    for name in ("prompt_tokens", "response_tokens"):
        counts = [line["values"][name] for line in finished.lines_of("metrics")]

        assert counts == sorted(set(counts))


def test_every_pass_has_a_clip_line_with_a_histogram(finished: RunFolder) -> None:
    passes = finished.lines_of("clip")

    assert {line["step"] for line in passes} == set(range(1, STEPS + 1))
    assert len({(line["step"], line["epoch"], line["minibatch"]) for line in passes}) == len(passes)
    assert {(line["epoch"], line["minibatch"]) for line in passes} >= {(0, 0)}
    for line in passes:
        sums = base64.b64decode(line["histogram"], validate=True)
        assert len(sums) > 0
        assert len(sums) % (HISTOGRAM_ROWS * FLOAT_BYTES) == 0
        assert sum(line["values"]["counts"].values()) > 0


def test_a_checkpoint_line_names_a_complete_folder(finished: RunFolder) -> None:
    checkpoints = finished.lines_of("checkpoint")

    steps = {line["step"] for line in checkpoints}
    assert TRAIN_CONFIG["checkpoint_interval"] in steps
    for line in checkpoints:
        folder = finished.path / line["path"]
        assert line["path"] == f"ck-{line['step']}"
        manifest = verified_manifest(folder, line["manifest_sha256"])
        assert manifest["step"] == line["step"]
        assert set(manifest["files"]) == files_below(folder) - {"manifest.json"}
        for name, described in manifest["files"].items():
            assert described["sha256"] == sha256(folder / name)
            assert described["bytes"] == (folder / name).stat().st_size


def test_metrics_of_a_step_come_before_its_checkpoint(finished: RunFolder) -> None:
    for checkpoint in finished.lines_of("checkpoint"):
        before = finished.lines()[: checkpoint["line"]]

        steps = [line["step"] for line in before if line["kind"] == "metrics"]
        assert steps == list(range(1, checkpoint["step"] + 1))


def test_a_sample_line_names_rows_with_text_and_reward(finished: RunFolder) -> None:
    samples = finished.lines_of("sample")

    assert samples
    for line in samples:
        text = gzip.decompress((finished.path / line["path"]).read_bytes())
        rows = [json.loads(row) for row in text.splitlines()]
        assert rows
        for row in rows:
            assert {"row", "prompt_id", "messages", "completion", "finish_reason"} <= set(row)
            assert isinstance(row["reward"], float)


def test_the_final_manifest_lists_every_file_of_the_result(finished: RunFolder) -> None:
    final = finished.lines_of("final")[0]
    folder = finished.path / final["path"]

    manifest = verified_manifest(folder, final["manifest_sha256"])

    assert manifest["schema_version"] == 1
    assert manifest["step"] == STEPS
    assert {file["path"] for file in manifest["files"]} == files_below(folder) - {"manifest.json"}
    for file in manifest["files"]:
        assert file["sha256"] == sha256(folder / file["path"])
        assert file["bytes"] == (folder / file["path"]).stat().st_size
        assert file["role"] in {"adapter", "tokenizer", "card", "training", "export"}
        assert "/" in file["media_type"]
    adapter = {file["path"] for file in manifest["files"] if file["role"] == "adapter"}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= adapter


@pytest.fixture(scope="module")
def paused(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A long run, paused after its first steps by the stop file."""
    run = trainer.run_folder(tmp_path_factory.mktemp("paused") / "attempt-1", config=LONG)
    with running(run, trainer) as process:
        run.wait_for_step(1)
        run.ask_to_stop("pause")
        assert process.wait(timeout=60) == STOPPED
    return run


def test_a_pause_saves_the_last_step_and_exits_75(paused: RunFolder) -> None:
    checkpoint = paused.lines()[-1]

    assert (paused.exit()["code"], paused.exit()["error"]) == (STOPPED, None)
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["step"] == paused.lines_of("metrics")[-1]["step"] < MANY_STEPS


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    trainer: Trainer, paused: RunFolder, tmp_path: Path
) -> None:
    uninterrupted = trainer.run_folder(tmp_path / "whole" / "attempt-1", config=LONG)
    assert uninterrupted.train(trainer.command) == 0
    saved = paused.lines()[-1]

    resumed = trainer.run_folder(
        tmp_path / "resumed" / "attempt-2",
        config=LONG,
        attempt=2,
        resume_from=str(paused.path / saved["path"]),
    )
    assert resumed.train(trainer.command) == 0

    assert adapter_sha256(resumed) == adapter_sha256(uninterrupted)
    assert metric_values(paused) + metric_values(resumed) == metric_values(uninterrupted)
    assert resumed.lines()[0]["line"] == 1


def test_a_finish_saves_and_exports_what_there_is(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1", config=LONG)

    with running(run, trainer) as process:
        run.wait_for_step(1)
        run.ask_to_stop("finish")
        assert process.wait(timeout=60) == 0

    *_, checkpoint, final = run.lines()
    assert run.exit() == {"code": 0, "reason": "done", "error": None}
    assert (checkpoint["kind"], final["kind"]) == ("checkpoint", "final")
    assert checkpoint["step"] == final["step"] == len(run.lines_of("metrics")) < MANY_STEPS
    saved = run.path / checkpoint["path"] / "adapter" / "adapter_model.safetensors"
    assert sha256(saved) == adapter_sha256(run)


def test_a_finish_that_came_before_the_start_costs_one_step(
    trainer: Trainer, paused: RunFolder, tmp_path: Path
) -> None:
    saved = paused.lines()[-1]
    run = trainer.run_folder(
        tmp_path / "attempt-2",
        config=LONG,
        attempt=2,
        resume_from=str(paused.path / saved["path"]),
    )
    run.ask_to_stop("finish")

    assert run.train(trainer.command) == 0
    assert run.lines()[-1]["step"] == saved["step"] + 1


def test_a_cancel_ends_the_run_without_saving(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1", config=LONG)

    with running(run, trainer) as process:
        run.wait_for_step(1)
        run.ask_to_stop("cancel")
        assert process.wait(timeout=60) == STOPPED

    assert (run.exit()["code"], run.exit()["error"]) == (STOPPED, None)
    assert run.lines_of("checkpoint") == []
    assert not list(run.path.glob("ck-*"))


def test_the_terminate_signal_pauses(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1", config=LONG)

    with running(run, trainer) as process:
        run.wait_for_step(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == STOPPED

    assert run.exit()["code"] == STOPPED
    assert run.lines()[-1]["kind"] == "checkpoint"


def test_a_trainer_dies_when_its_input_ends(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1", config=LONG)

    with running(run, trainer) as process:
        run.wait_for_step(1)
        assert process.stdin is not None
        process.stdin.close()
        code = process.wait(timeout=10)

    assert code != 0
    assert not (run.path / "exit.json").exists()


def test_impossible_settings_end_with_64(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1", config={"clip_low": 1.5})

    assert run.train(trainer.command) == 64

    assert run.exit()["code"] == 64
    assert run.exit()["error"]["code"] == "invalid_config"
    assert run.exit()["error"]["param"] == "clip_low"
    assert "1.5" in run.exit()["error"]["message"]


def test_another_version_of_the_protocol_ends_with_64(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1", protocol_version=2)

    assert run.train(trainer.command) == 64
    assert run.lines() == []


def test_an_unusable_row_ends_with_65(trainer: Trainer, tmp_path: Path) -> None:
    run = trainer.run_folder(tmp_path / "attempt-1")
    (run.path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"me')

    assert run.train(trainer.command) == 65

    assert run.exit()["error"]["code"] == "invalid_training_file"
    assert "line 2" in run.exit()["error"]["message"]


@contextmanager
def running(run: RunFolder, trainer: Trainer) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer that is killed if the test has not ended it."""
    with run.start(trainer.command) as process:
        try:
            yield process
        finally:
            process.kill()


def verified_manifest(folder: Path, digest: str) -> dict[str, Any]:
    text = (folder / "manifest.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == digest
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def adapter_sha256(run: RunFolder) -> str:
    return sha256(run.path / "final" / "adapter" / "adapter_model.safetensors")


def metric_values(run: RunFolder) -> list[dict[str, float | None]]:
    """The values of each step without those that measure time or memory."""
    timed = ("seconds.", "tokens_per_second", "peak_memory")
    return [
        {name: value for name, value in line["values"].items() if not name.startswith(timed)}
        for line in run.lines_of("metrics")
    ]
