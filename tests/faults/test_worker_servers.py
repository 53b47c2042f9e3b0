"""Jobs outlive the servers: a private Postgres and Redis with fsync, killed and restarted."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from kombu import Connection
from pydantic import SecretStr

from core.db import Database
from core.dispatch import TASK_NAME
from core.errors import DatabaseUnavailable
from core.states import JobStatus
from migrations import commands
from tests.fakes.bench import (
    Bench,
    assert_as_if_uninterrupted,
    bench_on,
)
from tests.fakes.waiting import wait_until
from trimtab.embedded import EmbeddedServers
from worker.celery_app import make_celery


@pytest.fixture
def bench(tmp_path: Path, own_servers: EmbeddedServers) -> Iterator[Bench]:
    with bench_on(own_servers, tmp_path / "home") as opened:
        yield opened
    with redis.Redis.from_url(own_servers.endpoints.redis_admin_url) as admin:
        admin.flushall()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "restarted"])
def test_a_postgres_that_goes_and_comes_back_costs_a_running_job_nothing(
    bench: Bench, own_servers: EmbeddedServers, number: signal.Signals
) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    bench.start_worker(lease_seconds=20)
    bench.wait_for_step(job.id, 3)
    before = own_servers.endpoints.postgres_pid

    os.kill(before, number)
    bench.plan()
    wait_until(lambda: own_servers.endpoints.postgres_pid != before)
    wait_until(lambda: answers(bench.database))

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert done.attempt == 1
    assert_as_if_uninterrupted(bench, bench.job(job.id), steps=6)


@pytest.mark.parametrize("steps", [20, 4], ids=["while it trains", "at its end"])
def test_a_postgres_that_stalls_below_the_lease_costs_a_running_job_nothing(
    bench: Bench, own_servers: EmbeddedServers, steps: int
) -> None:
    """Training goes on meanwhile; what was told is stored afterwards, and the end once."""
    bench.plan(hold_at=3)
    job = bench.make_job(steps=steps)
    bench.start_dispatcher()
    bench.start_worker(lease_seconds=60)
    bench.wait_for_step(job.id, 2)

    with frozen(own_servers.endpoints.postgres_pid):
        bench.plan(hold_at=15)
        told = min(steps, 14)
        wait_until(lambda: bench.told_step(job.id, attempt=1) == told)
    bench.plan()

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert done.attempt == 1
    assert_as_if_uninterrupted(bench, done, steps=steps)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The server and all its sessions, standing still."""
    server = psutil.Process(pid)
    everyone = [server, *server.children(recursive=True)]
    for process in everyone:
        process.suspend()
    try:
        yield
    finally:
        for process in everyone:
            process.resume()


def answers(database: Database) -> bool:
    """Whether Postgres takes connections."""
    try:
        with database.begin():
            return True
    except DatabaseUnavailable:
        return False


def test_a_killed_redis_costs_neither_running_nor_waiting_jobs_anything(
    bench: Bench, own_servers: EmbeddedServers
) -> None:
    bench.plan(hold_at=3)
    running = bench.make_job(steps=4)
    bench.start_dispatcher()
    bench.start_worker(lease_seconds=20)
    bench.wait_for_step(running.id, 2)
    before = own_servers.endpoints.valkey_pid

    os.kill(before, signal.SIGKILL)
    waiting = bench.make_job(steps=4)
    bench.plan()
    wait_until(lambda: own_servers.endpoints.valkey_pid != before)

    for job in (running, waiting):
        done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED, seconds=40)
        assert done.attempt == 1
        assert_as_if_uninterrupted(bench, bench.job(job.id), steps=4)


def test_messages_that_mean_nothing_change_nothing(bench: Bench) -> None:
    finished = bench.make_job(steps=1)
    bench.run_job(finished)
    before = bench.job(finished.id)
    app = make_celery(bench.redis_url, queue="cpu")
    for argument in ("no uuid", "0199c2a0-6d1e-7a53-b2b4-1f6f0c9d3a10", str(finished.id), None):
        app.send_task(TASK_NAME, args=[argument])
    app.send_task(TASK_NAME, args=[])
    app.send_task("trimtab.unknown_task", args=[])
    with Connection(bench.redis_url) as connection, connection.SimpleQueue("cpu") as queue:
        queue.put({"a": 1}, serializer="pickle")
    app.close()
    job = bench.make_job(steps=2)

    bench.start_dispatcher()
    worker = bench.start_worker()

    bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert worker.poll() is None
    assert bench.job(finished.id) == before


def test_history_survives_a_restart_of_everything(tmp_path: Path) -> None:
    embedded = EmbeddedServers(tmp_path / "servers")
    try:
        with embedded:
            points = embedded.endpoints
            commands.upgrade(
                points.owner_url,
                api_password=SecretStr(points.api_password),
                worker_password=SecretStr(points.worker_password),
            )
            with bench_on(embedded, tmp_path / "home") as bench:
                bench.plan(hold_at=4)
                done, halfway = bench.make_job(steps=3), bench.make_job(steps=6)
                bench.start_dispatcher()
                worker = bench.start_worker()
                bench.wait_for_status(done.id, JobStatus.SUCCEEDED)
                bench.wait_for_step(halfway.id, 3)
                told = bench.feed(done.id)
                worker.terminate()
                worker.wait(timeout=10)

        bench.processes.clear()
        with embedded:
            bench.database = Database(embedded.endpoints.owner_url, pool_size=4)
            bench.plan()
            bench.start_dispatcher()
            bench.start_worker()

            bench.wait_for_status(halfway.id, JobStatus.SUCCEEDED)

            assert bench.feed(done.id) == told
            for job, steps in ((done, 3), (halfway, 6)):
                assert_as_if_uninterrupted(bench, bench.job(job.id), steps=steps)
            bench.close()
            bench.database.dispose()
    finally:
        embedded.home.remove()
