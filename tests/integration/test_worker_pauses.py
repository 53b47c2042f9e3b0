"""Pauses, limits and starts of real attempts, with the fake trainer."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from core import jobs, models, starts
from core.db import Database
from core.rows import Checkpoint, Job
from core.states import JobStatus
from core.storage import ArtifactStore
from tests.fakes.bench import (
    Bench,
    assert_as_if_uninterrupted,
    assert_no_holes,
    expected_state,
)
from worker import supervisor
from worker.sweep import sweep

TOKENS_PER_STEP = 8
"""What the fake trainer reports."""


def ask(bench: Bench, job: Job, wish: Callable[..., Job]) -> Job:
    with bench.database.begin() as tx:
        return wish(tx, job.id, tenant_id=job.tenant_id)


def at_step(bench: Bench, job: Job, step: int, *wishes: Callable[..., Job]) -> Callable[[], bool]:
    """Something for the worker to look at, which makes wishes once the job is at a step."""
    left = list(wishes)

    def look() -> bool:
        if left and bench.job(job.id).step == step:
            while left:
                ask(bench, job, left.pop(0))
        return False

    return look


def limited_job(bench: Bench, *, steps: int, **limits: Any) -> Job:
    spec = {**bench.make_job(steps=steps).spec, "limits": limits}
    return bench.make_job(steps=steps, checkpoint_interval=100, spec=spec)


def test_a_paused_job_rests_with_a_checkpoint_and_ends_as_if_it_had_not(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6, checkpoint_interval=100)

    paused = bench.run_job(job, is_told_to_go=at_step(bench, job, 3, jobs.pause))
    bench.plan()
    untouched = bench.run_job(job)
    ask(bench, job, jobs.resume)
    done = bench.run_job(job)

    assert (paused.status, paused.saved_step, paused.crashes) == (JobStatus.PAUSED, 3, 0)
    assert untouched == paused
    assert bench.attempts(job.id)[1].resumed_from_step == 3
    assert_as_if_uninterrupted(bench, done, steps=6)
    codes = bench.codes(job.id)
    assert codes[2:5] == ["job.pause_requested", "checkpoint.saved", "job.paused"]


def test_a_pause_that_is_withdrawn_too_late_sends_the_job_once_through_the_queue(
    bench: Bench,
) -> None:
    bench.plan(hold_at=3, ignore_stop=True)
    job = bench.make_job(steps=4)
    asked: list[bool] = []

    def withdraw_when_the_trainer_knows() -> bool:
        if not asked and bench.job(job.id).step == 2:
            ask(bench, job, jobs.pause)
            asked.append(True)
        if len(asked) == 1 and any(bench.scratch.rglob("stop")):
            ask(bench, job, jobs.resume)
            asked.append(True)
            bench.plan()  # from here on it obeys
        return False

    left = bench.run_job(job, is_told_to_go=withdraw_when_the_trainer_knows)
    done = bench.run_job(job)

    assert (left.status, left.crashes) == (JobStatus.QUEUED, 0)
    assert "job.pause_withdrawn" in bench.codes(job.id)
    assert_as_if_uninterrupted(bench, done, steps=4)


def test_a_pause_while_the_attempt_prepares_starts_no_trainer(bench: Bench) -> None:
    job = bench.make_job(steps=4)
    wishes = [jobs.pause]

    class PausingStore(ArtifactStore):
        def fetch(self, *args: Any, **kwargs: Any) -> Path:
            while wishes:
                ask(bench, job, wishes.pop())
            return super().fetch(*args, **kwargs)

    with bench.parts(heartbeat_seconds=0.001) as parts:
        pausing = dataclasses.replace(parts, store=PausingStore(bench.store.root))
        supervisor.run_job(pausing, job.id, task_id="task", is_told_to_go=lambda: False)

    assert bench.job(job.id).status is JobStatus.PAUSED


def test_a_cancel_overrides_a_pause_that_is_under_way(bench: Bench) -> None:
    bench.plan(hold_at=3, ignore_stop=True)
    job = bench.make_job(steps=4)

    done = bench.run_job(
        job,
        is_told_to_go=at_step(bench, job, 2, jobs.pause, jobs.cancel),
        cancel_seconds=0.2,
    )

    assert done.status is JobStatus.CANCELLED
    assert bench.trainers() == []


def test_a_job_that_ends_before_its_pause_succeeds_and_says_so(bench: Bench) -> None:
    bench.plan(hold_at=4, ignore_stop=True)
    job = bench.make_job(steps=4)

    def pause_then_let_go() -> bool:
        if bench.job(job.id).step == 3 and bench.job(job.id).stop_wanted is None:
            ask(bench, job, jobs.pause)
            bench.plan(ignore_stop=True)
        return False

    done = bench.run_job(job, is_told_to_go=pause_then_let_go)

    assert_as_if_uninterrupted(bench, done, steps=4)
    assert "before it could be paused" in bench.feed(job.id)[-1].message


# Limits.


def test_a_job_at_its_limit_pauses_and_a_resume_grants_as_much_again(bench: Bench) -> None:
    limit = 2 * TOKENS_PER_STEP
    job = limited_job(bench, steps=100, max_generated_tokens=limit)
    bench.plan(step_seconds=0.05)

    first = bench.run_job(job)
    ask(bench, job, jobs.resume)
    second = bench.run_job(job)

    assert (first.status, second.status) == (JobStatus.PAUSED, JobStatus.PAUSED)
    assert first.usage["response_tokens"] >= limit
    assert second.usage["response_tokens"] >= first.usage["response_tokens"] + limit
    assert first.saved_step == first.step < second.saved_step == second.step < 100
    assert bench.codes(job.id).count("limit.reached") == 2
    assert_no_holes(bench.feed(job.id), second)


def test_a_job_may_finish_at_its_limit_with_what_there_is(bench: Bench) -> None:
    job = limited_job(bench, steps=100, max_generated_tokens=2 * TOKENS_PER_STEP, on_limit="finish")
    bench.plan(step_seconds=0.05)

    done = bench.run_job(job)

    assert done.status is JobStatus.SUCCEEDED
    assert 2 <= done.step < 100
    assert bench.final_state(job.id) == expected_state(done.step)
    assert [one.step for one in bench.checkpoints(job.id)] == [done.step]
    assert bench.feed(job.id)[-1].data["reason"] == "limit_reached"


def test_running_time_counts_over_all_attempts(bench: Bench) -> None:
    job = limited_job(bench, steps=3, max_runtime_seconds=60)
    with bench.database.begin() as tx:
        tx.execute(
            update(models.job)
            .where(models.job.c.id == job.id)
            .values(usage={"device_seconds": 59.999})
        )
    bench.plan(hold_at=3)

    paused = bench.run_job(job)

    assert paused.status is JobStatus.PAUSED
    assert paused.limit_reached == "max_runtime_seconds"
    assert paused.usage["device_seconds"] >= 60


# Starting from a checkpoint.


@pytest.fixture
def source(bench: Bench) -> Checkpoint:
    """A checkpoint of a finished job."""
    job = bench.make_job(steps=8)
    bench.run_job(job)
    return next(one for one in bench.checkpoints(job.id) if one.step == 2)


def run_file_of(bench: Bench) -> dict[str, Any]:
    (path,) = bench.scratch.rglob("run.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_start_is_fetched_even_when_only_the_adapter_of_it_was_kept(
    bench: Bench, source: Checkpoint
) -> None:
    job = bench.make_job(steps=4, start=source)
    bench.plan(exit_at=1, exit={"code": 70, "reason": "enough"})  # leaves its run directory

    bench.run_job(job)

    run = run_file_of(bench)
    (adapter,) = bench.scratch.rglob("start/adapter/adapter_model.safetensors")
    assert not source.resumable
    assert (run["start_adapter"], run["resume_from"]) == ("start/adapter", None)
    assert adapter.read_text() == expected_state(2)


def test_a_resumed_job_is_still_given_its_start(bench: Bench, source: Checkpoint) -> None:
    bench.plan(exit_at=3, exit={"code": 1, "reason": "broke"})
    job = bench.make_job(steps=4, start=source)

    bench.run_job(job)
    with bench.database.begin() as tx:
        tx.execute(update(models.job).values(not_before=None))
    bench.run_job(job)

    runs = {
        path.parent.name: json.loads(path.read_text()) for path in bench.scratch.rglob("run.json")
    }
    assert runs["attempt-2"]["resume_from"] == "resume/ck-2"
    assert runs["attempt-2"]["start_adapter"] == "start/adapter"


def test_a_job_without_a_start_is_given_none(bench: Bench) -> None:
    job = bench.make_job(steps=4)
    bench.plan(exit_at=1, exit={"code": 70, "reason": "enough"})

    bench.run_job(job)

    assert run_file_of(bench)["start_adapter"] is None


def test_a_damaged_start_fails_the_job_and_names_the_checkpoint(
    bench: Bench, source: Checkpoint
) -> None:
    (bench.store.root / source.uri / "adapter" / "adapter_model.safetensors").write_text("x")
    job = bench.make_job(steps=4, start=source)

    done = bench.run_job(job)

    assert (done.status, done.error_code, done.error_param) == (
        JobStatus.FAILED,
        "model_load_failed",
        "model",
    )
    assert f"ftckpt_{source.job_id.hex}-1-2" in (done.error_message or "")


def test_a_start_that_is_not_there_is_looked_for_again(bench: Bench, source: Checkpoint) -> None:
    bench.store.delete_all(source.uri)
    job = bench.make_job(steps=4, start=source)

    waiting = bench.run_job(job)

    assert (waiting.status, waiting.crashes) == (JobStatus.QUEUED, 1)
    assert bench.attempts(job.id)[0].end_reason == "input_missing"


# Checkpoints.


def test_the_row_of_a_checkpoint_describes_the_tar_of_its_adapter(
    bench: Bench, source: Checkpoint
) -> None:
    with bench.database.begin() as tx:
        newest = starts.newest(tx, source.job_id)

    assert newest is not None
    assert newest.adapter is not None
    assert newest.step == 8
    final = bench.artifacts(source.job_id)
    assert newest.adapter.files == {
        "adapter_model.safetensors": final["adapter/adapter_model.safetensors"].sha256
    }
    assert newest.adapter.bytes == 10_240  # one record of a tar


def test_of_a_checkpoint_that_was_given_up_the_sweep_leaves_the_adapter(
    bench: Bench, worker_database: Database, source: Checkpoint
) -> None:
    """The worker died after the row was given up and before its files were."""
    state = bench.store.put(f"{source.uri}/state.json", [b"{}"])
    for key in bench.store.keys("jobs"):
        path = bench.store.root / key
        os.utime(path, (0, 0))

    removed = sweep(worker_database, bench.store)

    assert removed == 1
    assert state.key not in bench.store.keys("jobs")
    assert bench.store.keys(source.uri) == [f"{source.uri}/adapter/adapter_model.safetensors"]


def test_an_unfinished_job_goes_on_after_its_best_checkpoint_rotted(bench: Bench) -> None:
    bench.plan(exit_at=6, exit={"code": 1, "reason": "broke"}, attempts=[1])
    job = bench.make_job(steps=8)
    bench.run_job(job)
    newest = bench.checkpoints(job.id)[0]
    (bench.store.root / newest.uri / "manifest.json").unlink()

    with bench.database.begin() as tx:
        tx.execute(update(models.job).values(not_before=None))
    done = bench.run_job(job)

    assert newest.step == 4
    assert "checkpoint.corrupt" in bench.codes(job.id)
    assert_as_if_uninterrupted(bench, done, steps=8)
    best = [one for one in bench.checkpoints(job.id) if one.best]
    assert len(best) == 1
    assert (best[0].step, best[0].attempt) != (newest.step, newest.attempt)
