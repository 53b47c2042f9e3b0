"""Real worker and dispatcher processes around the fake trainer, killed at the wrong moment."""

import signal

import redis

from core.states import JobStatus
from tests.conftest import Servers
from tests.fakes.bench import (
    Bench,
    assert_as_if_uninterrupted,
    assert_no_holes,
    expected_rewards,
    expected_state,
    is_alive,
    kill,
    one,
    pool_child,
    rewards,
)
from tests.fakes.waiting import wait_until


def test_two_jobs_posted_at_once_both_finish(bench: Bench) -> None:
    bench.start_dispatcher()
    bench.start_worker()

    posted = [bench.make_job(steps=5), bench.make_job(steps=5)]

    for job in posted:
        bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
        assert bench.final_state(job.id) == expected_state(5)


def test_sigterm_to_the_worker_saves_and_counts_no_crash(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6, checkpoint_interval=100)
    bench.start_dispatcher()
    worker = bench.start_worker()
    bench.wait_for_step(job.id, 3)

    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) is not None

    waiting = bench.job(job.id)
    assert (waiting.status, waiting.saved_step, waiting.crashes) == (JobStatus.QUEUED, 3, 0)
    assert bench.trainers() == []
    bench.plan()
    bench.start_worker()
    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert bench.attempts(job.id)[-1].resumed_from_step == 3
    assert bench.final_state(job.id) == expected_state(6)
    assert rewards(bench.curves(job.id)) == expected_rewards(6)
    assert_no_holes(bench.feed(job.id), done)


def test_a_killed_trainer_resumes_from_its_checkpoint(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    bench.start_worker()
    bench.wait_for_step(job.id, 3)

    kill(one(bench.trainers()))
    wait_until(lambda: bench.job(job.id).crashes == 1)
    bench.plan()
    bench.forget_backoff()

    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert [a.resumed_from_step for a in bench.attempts(job.id)] == [0, 2]
    assert_as_if_uninterrupted(bench, done, steps=6)


def test_a_killed_pool_child_is_released_by_the_parent(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    worker = bench.start_worker(lease_seconds=60)
    bench.wait_for_step(job.id, 3)
    trainer = one(bench.trainers())

    kill(pool_child(worker))

    wait_until(lambda: bench.job(job.id).crashes == 1, seconds=5)
    wait_until(lambda: not is_alive(trainer), seconds=5)
    assert bench.attempts(job.id)[0].end_reason == "worker_lost"
    bench.plan()
    bench.forget_backoff()
    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert_as_if_uninterrupted(bench, done, steps=6)


def test_a_killed_worker_takes_its_trainer_along_and_is_reaped(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    worker = bench.start_worker()
    bench.wait_for_step(job.id, 3)
    trainer, child = one(bench.trainers()), pool_child(worker)

    kill(worker)

    wait_until(lambda: not is_alive(trainer) and not is_alive(child), seconds=5)
    wait_until(lambda: bench.job(job.id).crashes == 1, seconds=10)
    assert bench.attempts(job.id)[0].end_reason == "lease_expired"
    bench.plan()
    bench.forget_backoff()
    bench.start_worker()
    done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    assert_as_if_uninterrupted(bench, done, steps=6)


def test_a_cancelled_running_job_stops_at_the_next_step(bench: Bench) -> None:
    bench.plan(step_seconds=0.05)
    job = bench.make_job(steps=1000)
    bench.start_dispatcher()
    bench.start_worker()
    bench.wait_for_step(job.id, 3)

    bench.cancel(job.id)

    done = bench.wait_for_status(job.id, JobStatus.CANCELLED, seconds=5)
    assert bench.trainers() == []
    assert bench.checkpoints(job.id)
    assert "adapter.tar" not in bench.artifacts(job.id)
    assert_no_holes(bench.feed(job.id), done)


def test_a_wiped_redis_loses_no_job(bench: Bench, servers: Servers) -> None:
    bench.plan(hold_at=2)
    running, waiting = bench.make_job(steps=4), bench.make_job(steps=4)
    bench.start_dispatcher()
    bench.start_worker()
    wait_until(lambda: {bench.job(j.id).step for j in (running, waiting)} == {0, 1})
    wait_until(lambda: bench.job(waiting.id).dispatched_at is not None)

    with redis.Redis.from_url(servers.redis_admin_url) as admin:
        admin.flushall()
    bench.plan()

    for job in (running, waiting):
        done = bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
        assert_as_if_uninterrupted(bench, done, steps=4)
        assert done.attempt == 1


def test_a_stopped_supervisor_comes_back_too_late(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6)
    bench.start_dispatcher()
    late = bench.start_worker(worker_label="late")
    bench.wait_for_step(job.id, 3)
    late_child, late_trainer = pool_child(late), one(bench.trainers())

    late_child.send_signal(signal.SIGSTOP)
    wait_until(lambda: bench.job(job.id).crashes == 1, seconds=10)
    bench.plan()
    wait_until(lambda: not is_alive(late_trainer), seconds=5)
    bench.start_worker(worker_label="next")
    bench.forget_backoff()
    bench.wait_for_status(job.id, JobStatus.SUCCEEDED)
    late_child.send_signal(signal.SIGCONT)

    wait_until(lambda: "attempt.lost" in bench.logs())
    done = bench.job(job.id)
    assert done.worker_label == "next"
    assert_as_if_uninterrupted(bench, done, steps=6)
