"""The checker sees a lost job when a safeguard is off, and nothing when it is on.

Each case is one scenario run twice; no chance is involved, so a checker gone blind fails here.
"""

from typing import Any
from uuid import UUID

import psutil
import pytest
import redis

from core.states import JobStatus
from tests.chaos.checker import Findings, check_jobs
from tests.conftest import Servers
from tests.fakes.bench import Bench
from tests.fakes.waiting import wait_until

NEVER_SECONDS = 1e6


def broken(found: Findings) -> dict[str, int]:
    """The promises that were broken."""
    return {name: count for name, count in found.counts().items() if count}


def start_worker(bench: Bench, *, without: str | None = None, **over: Any) -> psutil.Process:
    """A worker, or one that lacks a safeguard."""
    if without is None:
        return psutil.Process(bench.start_worker(**over).pid)
    started = bench.start("tests.fakes.mutant_worker", test_without=without, **over)
    return psutil.Process(started.pid)


@pytest.mark.parametrize(
    ("redispatch_seconds", "expected"), [(0.2, {}), (NEVER_SECONDS, {"lost": 1})]
)
def test_a_job_whose_ring_is_lost_needs_a_second_ring(
    bench: Bench, servers: Servers, redispatch_seconds: float, expected: dict[str, int]
) -> None:
    dispatcher = bench.start_dispatcher(redispatch_seconds=redispatch_seconds)
    first = bench.make_job(steps=2)
    wait_until(lambda: bench.job(first.id).dispatched_at)
    with redis.Redis.from_url(servers.redis_admin_url) as admin:
        admin.flushall()
    bench.start_worker()
    if not expected:
        bench.wait_for_status(first.id, JobStatus.SUCCEEDED)

    # A job that came later has been through the same dispatcher and the same worker.
    later = bench.make_job(steps=2)
    bench.wait_for_status(later.id, JobStatus.SUCCEEDED)

    assert dispatcher.poll() is None
    assert broken(check_jobs(bench, {first.id: 2, later.id: 2})) == expected


def let_a_supervisor_come_back_late(bench: Bench, *, without: str | None) -> UUID:
    """A job whose first supervisor wakes up with an unread step while the second one holds it."""
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    worker = start_worker(bench, without=without, worker_label="late")
    bench.wait_for_step(job.id, 3)
    (late,) = worker.children()
    late.suspend()
    wait_until(lambda: bench.job(job.id).crashes == 1)
    bench.plan(hold_at=5)
    bench.forget_backoff()
    bench.start_worker(worker_label="next")
    wait_until(lambda: bench.job(job.id).worker_label == "next" and bench.job(job.id).step == 4)
    wait_until(lambda: bench.told_step(job.id, attempt=1) == 4)
    late.resume()
    return job.id


def test_the_attempt_in_the_fence_keeps_a_late_supervisor_out(bench: Bench) -> None:
    job_id = let_a_supervisor_come_back_late(bench, without=None)

    wait_until(lambda: "attempt.lost" in bench.logs())
    bench.plan()
    bench.wait_for_status(job_id, JobStatus.SUCCEEDED)
    assert broken(check_jobs(bench, {job_id: 6})) == {}


def test_without_the_attempt_in_the_fence_a_late_supervisor_writes_a_step_twice(
    bench: Bench,
) -> None:
    job_id = let_a_supervisor_come_back_late(bench, without="fence")

    found = wait_until(lambda: check_jobs(bench, {job_id: 6}).duplicated)

    assert found == [f"{job_id}: step 4 is there twice"]


@pytest.mark.parametrize(("without", "expected"), [(None, {}), ("digest", {"wrong_hashes": 2})])
def test_a_corrupt_checkpoint_is_told_by_its_digest(
    bench: Bench, without: str | None, expected: dict[str, int]
) -> None:
    bench.plan(die_at=6, attempts=[1])
    job = bench.make_job(steps=8)
    bench.start_dispatcher()
    first = bench.start_worker()
    wait_until(lambda: bench.job(job.id).crashes == 1)
    first.kill()
    newest = bench.checkpoints(job.id)[0]
    (bench.store.root / newest.uri / "state.json").write_text('{"state": "another", "step": 4}')

    bench.forget_backoff()
    start_worker(bench, without=without)
    bench.wait_for_status(job.id, JobStatus.SUCCEEDED)

    assert newest.step == 4
    assert broken(check_jobs(bench, {job.id: 8})) == expected
