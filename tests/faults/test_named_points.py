"""Deaths at named points: within a checkpoint, between a result and its row, with a full disk."""

import signal
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from core.db import Database
from core.states import JobStatus
from tests.fakes.bench import (
    Bench,
    assert_as_if_uninterrupted,
    kill,
    pool_child,
)
from tests.fakes.waiting import wait_until
from worker.sweep import sweep

WRONG_CLOCK = Path(__file__).parents[1] / "fakes" / "wrong_clock"
FILE_LIMIT = 100_000


@pytest.mark.parametrize("point", ["draft", "name", "line"])
def test_a_trainer_killed_within_a_checkpoint_resumes_from_the_one_before(
    bench: Bench, point: str
) -> None:
    bench.plan(die_in_save={"step": 4, "point": point}, attempts=[1])
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    bench.start_worker()

    wait_until(lambda: bench.job(job.id).crashes == 1)
    bench.forget_backoff()

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert [one.resumed_from_step for one in bench.attempts(job.id)] == [0, 2]
    assert_as_if_uninterrupted(bench, done, steps=6)


@pytest.mark.parametrize(
    ("point", "resumed_from"),
    [("*/attempt-1/ck-4/manifest.json", 2), ("*/attempt-1/result/metrics.csv", 6)],
)
def test_files_published_by_a_killed_worker_count_for_nothing_until_their_row_exists(
    bench: Bench, worker_database: Database, point: str, resumed_from: int
) -> None:
    """And what nobody names is swept: of the result, and of the checkpoint."""
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    bench.start("tests.fakes.dying_worker", test_die_behind=point)
    wait_until(lambda: bench.job(job.id).crashes == 1)
    (orphaned,) = bench.store.root.glob(f"jobs/{job.id}/{point.removeprefix('*/')}")
    for process in bench.processes[1:]:
        kill(process)

    bench.forget_backoff()
    bench.start_worker()

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert [one.resumed_from_step for one in bench.attempts(job.id)] == [0, resumed_from]
    assert_as_if_uninterrupted(bench, done, steps=6)
    sweep(worker_database, bench.store, kept_for=timedelta(0))
    assert not orphaned.exists()
    assert_as_if_uninterrupted(bench, done, steps=6)


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_intact(bench: Bench) -> None:
    bench.plan(hold_at=4, padding=2 * FILE_LIMIT)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    worker = bench.start_worker()
    bench.wait_for_step(job.id, 3)
    child = pool_child(worker)
    unlimited = child.rlimit(psutil.RLIMIT_FSIZE)

    child.rlimit(psutil.RLIMIT_FSIZE, (FILE_LIMIT, unlimited[1]))
    bench.plan(padding=2 * FILE_LIMIT)
    wait_until(lambda: bench.job(job.id).crashes == 1)
    child.rlimit(psutil.RLIMIT_FSIZE, unlimited)
    bench.forget_backoff()

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    first, second = bench.attempts(job.id)
    assert first.end_reason == "disk_full"
    assert second.resumed_from_step == 2
    assert_as_if_uninterrupted(bench, done, steps=6)


def test_sigterm_during_a_database_write_saves_and_counts_no_crash(bench: Bench) -> None:
    bench.plan(hold_at=3)
    job = bench.make_job(steps=6, checkpoint_interval=100)
    bench.start_dispatcher()
    worker = bench.start_worker(lease_seconds=30)
    bench.wait_for_step(job.id, 2)

    with bench.locked("metric"):
        bench.plan(hold_at=5)
        wait_until(lambda: someone_waits_for_a_lock(bench))
        worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=20) is not None
    waiting = bench.job(job.id)
    assert (waiting.status, waiting.saved_step, waiting.crashes) == (JobStatus.QUEUED, 4, 0)
    bench.plan()
    bench.start_worker()
    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert bench.attempts(job.id)[-1].resumed_from_step == 4
    assert_as_if_uninterrupted(bench, done, steps=6)


def test_a_worker_whose_clock_is_an_hour_ahead_holds_its_job_like_any_other(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    bench.start_worker(lease_seconds=20, pythonpath=WRONG_CLOCK)
    bench.wait_for_step(job.id, 3)
    with bench.database.begin() as tx:
        lease = tx.execute(
            text("select lease_until - now() from job where id = :id"), {"id": job.id}
        ).scalar_one()

    bench.plan()

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert timedelta(0) < lease <= timedelta(seconds=20)
    assert done.attempt == 1
    assert_as_if_uninterrupted(bench, done, steps=6)


def someone_waits_for_a_lock(bench: Bench) -> bool:
    """Whether a session of the worker's role is blocked."""
    with bench.database.begin() as tx:
        found = tx.execute(
            text(
                "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = "
                "current_database()"
            )
        )
        return found.first() is not None
