"""Ringing, reaping and sweeping, against a real Postgres and a real Redis."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import text, update

from core import models
from core.db import Database
from core.rows import Job
from core.states import JobStatus
from tests.factories import claim_job
from tests.fakes.bench import Bench
from worker.dispatcher import RINGS_PER_SLOT, Dispatcher
from worker.settings import DispatcherSettings
from worker.sweep import is_older, sweep

LONG_AGO = time.time() - 48 * 3600


@pytest.fixture
def bench(owner_database: Database, bench: Bench) -> Bench:
    """Whose jobs are the only ones that a dispatcher sees."""
    with owner_database.begin() as tx:
        tx.execute(update(models.job).values(queue="of-another-test"))
    return bench


def make_dispatcher(bench: Bench, **over: Any) -> Dispatcher:
    fields: dict[str, Any] = {"redispatch_seconds": 0.2, "lease_seconds": 0.2} | over
    settings = DispatcherSettings(
        home=bench.home,
        database_url=SecretStr(bench.worker_url),
        redis_url=SecretStr(fields.pop("redis_url", bench.redis_url)),
        **fields,
    )
    return Dispatcher(settings)


@pytest.fixture
def dispatcher(bench: Bench) -> Iterator[Dispatcher]:
    made = make_dispatcher(bench)
    yield made
    made.close()


def rings(bench: Bench) -> int:
    with redis.Redis.from_url(bench.redis_url) as client:
        return int(client.llen("cpu"))


def backdate(bench: Bench, job: Job, column: str) -> None:
    """Let a moment of the job lie a minute further back."""
    moment = models.job.c[column]
    with bench.database.begin() as tx:
        tx.execute(
            update(models.job)
            .where(models.job.c.id == job.id)
            .values({column: moment - timedelta(minutes=1)})
        )


def test_a_waiting_job_is_rung_once(bench: Bench, dispatcher: Dispatcher) -> None:
    bench.make_job(steps=1)

    assert [dispatcher.ring(), dispatcher.ring()] == [1, 0]
    assert rings(bench) == 1


def test_two_dispatchers_ring_once(bench: Bench, dispatcher: Dispatcher) -> None:
    other = make_dispatcher(bench)
    bench.make_job(steps=1)

    assert dispatcher.ring() + other.ring() == 1
    other.close()


def test_a_lost_ring_is_repeated(bench: Bench, dispatcher: Dispatcher) -> None:
    job = bench.make_job(steps=1)
    dispatcher.ring()
    with redis.Redis.from_url(bench.redis_url) as client:
        client.delete("cpu")

    assert dispatcher.ring() == 0  # too early to call it lost
    backdate(bench, job, "dispatched_at")

    assert dispatcher.ring() == 1


def test_a_ring_that_still_waits_is_not_repeated(bench: Bench, dispatcher: Dispatcher) -> None:
    job = bench.make_job(steps=1)
    dispatcher.ring()

    backdate(bench, job, "dispatched_at")

    assert dispatcher.ring() == 0


def test_the_list_in_redis_stays_short(bench: Bench, dispatcher: Dispatcher) -> None:
    for _ in range(RINGS_PER_SLOT + 2):
        bench.make_job(steps=1)

    dispatcher.ring()
    dispatcher.ring()

    assert rings(bench) == RINGS_PER_SLOT


def test_without_redis_nothing_counts_as_rung(bench: Bench) -> None:
    job = bench.make_job(steps=1)
    nowhere = make_dispatcher(bench, redis_url="redis://127.0.0.1:1/0")

    nowhere.work()

    assert bench.job(job.id).dispatched_at is None
    nowhere.close()


def test_an_expired_lease_is_reaped_even_without_redis(bench: Bench) -> None:
    job = bench.make_job(steps=1)
    with bench.database.begin() as tx:
        claim_job(tx, job)
    backdate(bench, job, "lease_until")
    nowhere = make_dispatcher(bench, redis_url="redis://127.0.0.1:1/0")

    nowhere.work()

    released = bench.job(job.id)
    assert (released.status, released.crashes) == (JobStatus.QUEUED, 1)
    assert bench.codes(job.id)[-1] == "lease.expired"
    nowhere.close()


def test_after_its_own_connection_was_lost_nothing_is_reaped_for_one_lease(
    bench: Bench, dispatcher: Dispatcher
) -> None:
    """Perhaps another server took over, which has been up for long."""
    job = bench.make_job(steps=1)
    with bench.database.begin() as tx:
        claim_job(tx, job)
    backdate(bench, job, "lease_until")
    cut_off = make_dispatcher(bench, lease_seconds=60, tick_seconds=0.05)
    cut_off._wait()  # listens from now on
    assert cut_off._bell is not None
    with bench.database.begin() as tx:
        pid = cut_off._bell.info.backend_pid
        tx.execute(text("select pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    cut_off._wait()
    cut_off._settings = dispatcher._settings  # whose lease Postgres has been up for
    cut_off.work()

    assert bench.job(job.id).status is JobStatus.RUNNING
    dispatcher.work()
    assert bench.job(job.id).status is JobStatus.QUEUED
    cut_off.close()


def test_a_live_lease_is_left_alone(bench: Bench, dispatcher: Dispatcher) -> None:
    job = bench.make_job(steps=1)
    with bench.database.begin() as tx:
        claim_job(tx, job)

    dispatcher.reap()

    assert bench.job(job.id).status is JobStatus.RUNNING


def test_a_store_that_cannot_be_read_does_not_end_the_dispatcher(bench: Bench) -> None:
    job = bench.make_job(steps=1)
    made = make_dispatcher(bench, artifacts=Path("/", "x" * 300))  # longer than a name may be

    made.work()

    assert bench.job(job.id).dispatched_at is not None
    made.close()


def test_a_file_that_is_gone_is_not_old(tmp_path: Path) -> None:
    assert not is_older(tmp_path / "gone", time.time())


def age(path: Path) -> Path:
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def test_the_sweep_takes_only_old_files_without_a_row(
    bench: Bench, worker_database: Database
) -> None:
    done = bench.make_job(steps=2)
    bench.run_job(done)
    folder = bench.store.root / "jobs" / str(done.id) / "attempt-1"
    kept = {path for path in folder.rglob("*") if path.is_file()}
    orphan, young = folder / "ck-99" / "state.json", folder / "result" / "young"
    for path in (orphan, young):
        path.parent.mkdir(exist_ok=True)
        path.write_text("left behind")
    for path in (*kept, orphan):
        age(path)

    removed = sweep(worker_database, bench.store)

    assert removed == 1
    assert {path for path in folder.rglob("*") if path.is_file()} == kept | {young}
    assert not orphan.parent.exists()


def test_the_sweep_spares_a_held_attempt(bench: Bench, worker_database: Database) -> None:
    job = bench.make_job(steps=2)
    with bench.database.begin() as tx:
        claim_job(tx, job)
    key = f"jobs/{job.id}/attempt-1/ck-1/state.json"
    bench.store.put(key, [b"not yet a checkpoint"])
    age(bench.store.root / key)

    assert sweep(worker_database, bench.store) == 0


def test_the_sweep_never_follows_a_strange_folder(bench: Bench, worker_database: Database) -> None:
    stranger = bench.store.root / "jobs" / "no-uuid" / "attempt-x" / "file"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("whose?")
    age(stranger)

    assert sweep(worker_database, bench.store) == 0
    assert stranger.exists()
