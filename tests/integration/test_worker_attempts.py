"""One attempt in this process, with the fake trainer, a real Postgres and a real Redis."""

import csv
import dataclasses
import errno
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from sqlalchemy import Connection, text, update
from structlog.testing import capture_logs

from core import attempts, models
from core.db import Database
from core.dispatch import feed_key
from core.events import feed_payload
from core.rows import Job
from core.states import JobStatus
from core.storage import ArtifactStore, sha256_of
from tests.factories import visible_passes
from tests.fakes.bench import (
    Bench,
    assert_no_holes,
    expected_rewards,
    expected_state,
    holder,
    rewards,
)
from tests.fakes.waiting import wait_until
from worker import supervisor


class FullStore(ArtifactStore):
    """A store from which nothing can be fetched: the disk is full."""

    def fetch(self, *_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_job_ends_with_its_adapter_and_its_history(bench: Bench) -> None:
    job = bench.make_job(steps=5)

    done = bench.run_job(job)

    assert done.status is JobStatus.SUCCEEDED, done.error_message
    assert bench.final_state(job.id) == expected_state(5)
    assert rewards(bench.curves(job.id)) == expected_rewards(5)
    assert [one.step for one in bench.checkpoints(job.id)] == [5, 4, 2]
    assert bench.codes(job.id) == [
        "job.created",
        "job.claimed",
        "checkpoint.saved",
        "checkpoint.saved",
        "checkpoint.saved",
        "job.succeeded",
    ]
    assert done.usage["response_tokens"] == 5 * 8
    assert done.usage["device_seconds"] > 0
    assert done.fine_tuned_model == f"ft:{job.model}:{bench.tenant.slug}::{job.id.hex}"
    assert_no_holes(bench.feed(job.id), done)
    assert not bench.scratch.exists() or not any(bench.scratch.iterdir())


def test_what_a_trainer_told_last_is_stored_before_the_job_ends(bench: Bench) -> None:
    job = bench.make_job(steps=5)

    done = bench.run_job(job, tick_seconds=30.0)  # longer than the trainer lives

    assert done.status is JobStatus.SUCCEEDED
    assert rewards(bench.curves(job.id)) == expected_rewards(5)


def test_the_stream_carries_what_the_database_holds(bench: Bench) -> None:
    job = bench.make_job(steps=3)

    bench.run_job(job)

    with redis.Redis.from_url(bench.redis_url, decode_responses=True) as client:
        entries = client.xrange(feed_key(job.id))
        assert client.ttl(feed_key(job.id)) > 0
    held = [feed_payload(item) for item in bench.feed(job.id) if item.attempt > 0]
    assert [(key, json.loads(fields["item"])) for key, fields in entries] == [
        (payload["id"], payload) for payload in held
    ]


def test_every_pass_keeps_its_histogram(bench: Bench) -> None:
    job = bench.make_job(steps=2)

    bench.run_job(job)

    with bench.database.begin() as tx:
        passes = visible_passes(tx, job.id)
    assert [(one.step, one.epoch, one.minibatch) for one in passes] == [(1, 0, 0), (2, 0, 0)]
    assert all(len(one.histogram) == 4 * 24 for one in passes)


def test_the_adapter_is_one_tar_with_its_files_at_the_root(bench: Bench) -> None:
    first, second = bench.make_job(steps=2), bench.make_job(steps=2)

    for job in (first, second):
        bench.run_job(job)

    artifact = bench.artifacts(first.id)["adapter.tar"]
    assert (artifact.role, artifact.media_type) == ("adapter", "application/x-tar")
    content = b"".join(bench.store.read(artifact.uri))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        entries = archive.getmembers()
    assert [one.name for one in entries] == ["adapter_config.json", "adapter_model.safetensors"]
    assert {(one.mtime, one.uid, one.gid, one.mode) for one in entries} == {(0, 0, 0, 0o644)}
    assert bench.artifacts(second.id)["adapter.tar"].sha256 == artifact.sha256


def test_results_are_listed_with_their_digests(bench: Bench) -> None:
    job = bench.make_job(steps=2)

    bench.run_job(job)

    found = bench.artifacts(job.id)
    assert set(found) == {
        "adapter.tar",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "metrics.csv",
        "samples/1.jsonl.gz",
        "samples/2.jsonl.gz",
        "training/config.json",
    }
    for artifact in found.values():
        path = bench.store.root / artifact.uri
        assert (sha256_of(path), path.stat().st_size) == (artifact.sha256, artifact.bytes)


def test_the_curves_come_as_a_table(bench: Bench) -> None:
    bench.plan(exit_at=4, exit={"code": 1, "reason": "broke"}, attempts=[1])
    job = bench.make_job(steps=5)
    run_until_final(bench, job)

    text = b"".join(bench.store.read(bench.artifacts(job.id)["metrics.csv"].uri)).decode()

    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["step"], row["attempt"]) for row in rows] == [
        ("1", "1"),
        ("2", "1"),
        ("3", "2"),
        ("4", "2"),
        ("5", "2"),
    ]
    assert [float(row["reward_mean"]) for row in rows] == expected_rewards(5)


def test_a_crash_costs_at_most_the_steps_since_the_last_checkpoint(bench: Bench) -> None:
    bench.plan(die_at=4, attempts=[1])
    job = bench.make_job(steps=6)

    crashed = bench.run_job(job)
    forget_backoff(bench)
    done = bench.run_job(job)

    assert (crashed.status, crashed.crashes, crashed.saved_step) == (JobStatus.QUEUED, 1, 2)
    assert crashed.not_before is not None
    assert done.status is JobStatus.SUCCEEDED
    assert bench.final_state(job.id) == expected_state(6)
    assert rewards(bench.curves(job.id)) == expected_rewards(6)
    assert [one.resumed_from_step for one in bench.attempts(job.id)] == [0, 2]
    assert bench.attempts(job.id)[0].end_reason == "SIGKILL"
    assert_no_holes(bench.feed(job.id), done)


def test_a_poison_job_fails_after_three_crashes(bench: Bench) -> None:
    bench.plan(die_at=2)
    job = bench.make_job(steps=6)

    done = run_until_final(bench, job)

    assert (done.status, done.attempt, done.error_code) == (JobStatus.FAILED, 3, "too_many_crashes")
    assert "memory runs out" in (done.error_message or "")
    assert bench.artifacts(job.id).keys() == {"samples/1.jsonl.gz"}


@pytest.mark.parametrize(
    ("code", "error", "expected"),
    [
        (64, {"code": "invalid_config", "message": "no", "param": "clip_low"}, "invalid_config"),
        (65, None, "invalid_training_file"),
        (70, {"code": "reward_failed", "message": "NaN", "param": "reward"}, "reward_failed"),
        (70, None, "internal_error"),
    ],
)
def test_some_ends_fail_the_job_at_once(
    bench: Bench, code: int, error: dict[str, str] | None, expected: str
) -> None:
    bench.plan(exit_at=2, exit={"code": code, "reason": expected, "error": error})
    job = bench.make_job(steps=4)

    done = bench.run_job(job)

    assert (done.status, done.error_code, done.crashes) == (JobStatus.FAILED, expected, 0)
    assert bench.attempts(job.id)[0].exit_code == code
    params = {"clip_low": "method.ppo.hyperparameters.clip_range", "reward": "method.ppo.reward"}
    assert done.error_param == (params[error["param"]] if error else None)


@pytest.mark.parametrize(("code", "reason"), [(69, "reward_unavailable"), (74, "disk_full")])
def test_some_ends_are_tried_again(bench: Bench, code: int, reason: str) -> None:
    bench.plan(exit_at=2, exit={"code": code, "reason": reason}, attempts=[1])
    job = bench.make_job(steps=4)

    waiting = bench.run_job(job)
    forget_backoff(bench)
    done = bench.run_job(job)

    assert (waiting.status, waiting.crashes) == (JobStatus.QUEUED, 1)
    assert bench.attempts(job.id)[0].end_reason == reason
    assert done.status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("code", "expected"), [(69, "reward_unavailable"), (74, "disk_full"), (1, "too_many_crashes")]
)
def test_the_last_crash_says_why_the_job_failed(bench: Bench, code: int, expected: str) -> None:
    bench.plan(exit_at=2, exit={"code": code, "reason": "ended"})
    job = bench.make_job(steps=4)

    done = run_until_final(bench, job)

    assert (done.status, done.attempt, done.error_code) == (JobStatus.FAILED, 3, expected)


def test_a_full_disk_of_the_worker_says_why_the_job_failed(bench: Bench) -> None:
    job = bench.make_job(steps=4)

    with bench.parts() as parts:
        full = dataclasses.replace(parts, store=FullStore(bench.store.root))
        for _ in range(3):
            forget_backoff(bench)
            supervisor.run_job(full, job.id, task_id="task", is_told_to_go=lambda: False)

    done = bench.job(job.id)
    assert (done.status, done.error_code) == (JobStatus.FAILED, "disk_full")


def test_too_little_memory_is_tried_once_with_half_the_micro_batch(bench: Bench) -> None:
    bench.plan(exit_at=2, exit={"code": 71, "reason": "out_of_memory"})
    job = bench.make_job(steps=4, hyperparameters={"minibatches": 1, "micro_batch_size": 4})

    waiting = bench.run_job(job)
    done = bench.run_job(job)

    assert (waiting.status, waiting.crashes) == (JobStatus.QUEUED, 0)
    assert waiting.resolved["hyperparameters"]["micro_batch_size"] == 2
    assert (done.status, done.error_code) == (JobStatus.FAILED, "out_of_memory")


@pytest.mark.parametrize("what", ["line", "checkpoint", "final"])
def test_a_trainer_that_breaks_the_protocol_has_crashed(bench: Bench, what: str) -> None:
    bench.plan(spoil=what, attempts=[1])
    job = bench.make_job(steps=4)

    waiting = bench.run_job(job)
    forget_backoff(bench)
    done = bench.run_job(job)

    assert (waiting.status, waiting.crashes) == (JobStatus.QUEUED, 1)
    assert bench.attempts(job.id)[0].end_reason == "broken_trainer"
    assert done.status is JobStatus.SUCCEEDED
    assert bench.final_state(job.id) == expected_state(4)


def test_a_checkpoint_that_rotted_on_disk_gives_way_to_the_one_before(bench: Bench) -> None:
    bench.plan(die_at=6, attempts=[1])
    job = bench.make_job(steps=8)
    bench.run_job(job)
    newest = bench.checkpoints(job.id)[0]
    (bench.store.root / newest.uri / "state.json").write_text('{"state": "x", "step": 4}')

    forget_backoff(bench)
    done = bench.run_job(job)

    assert newest.step == 4
    assert bench.attempts(job.id)[1].resumed_from_step == 2
    assert "checkpoint.corrupt" in bench.codes(job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert bench.final_state(job.id) == expected_state(8)
    assert rewards(bench.curves(job.id)) == expected_rewards(8)


def test_only_the_last_three_checkpoints_stay_whole(bench: Bench) -> None:
    job = bench.make_job(steps=10)

    bench.run_job(job)

    found = {one.step: one for one in bench.checkpoints(job.id)}
    assert {step: one.resumable for step, one in found.items()} == {
        2: False,
        4: False,
        6: True,
        8: True,
        10: True,
    }
    adapter = "adapter/adapter_model.safetensors"
    assert files_of(bench, found[2].uri) == {adapter}
    assert files_of(bench, found[6].uri) == {adapter, "manifest.json", "padding", "state.json"}


def test_a_cancelled_job_that_does_not_listen_is_killed(bench: Bench) -> None:
    bench.plan(hold_at=3, ignore_stop=True)
    job = bench.make_job(steps=4)

    def cancel_once_it_trains() -> bool:
        if bench.job(job.id).step == 2:
            bench.cancel(job.id)
        return False

    done = bench.run_job(job, is_told_to_go=cancel_once_it_trains, cancel_seconds=0.2)

    assert done.status is JobStatus.CANCELLED
    assert [one.step for one in bench.checkpoints(job.id)] == [2]
    assert bench.trainers() == []


def test_a_worker_told_to_go_leaves_a_checkpoint_and_no_blame(bench: Bench) -> None:
    bench.plan(hold_at=4)
    job = bench.make_job(steps=6, checkpoint_interval=100)

    waiting = bench.run_job(job, is_told_to_go=lambda: bench.job(job.id).step == 3)
    bench.plan()
    done = bench.run_job(job)

    assert (waiting.status, waiting.saved_step, waiting.crashes) == (JobStatus.QUEUED, 3, 0)
    assert done.status is JobStatus.SUCCEEDED
    assert bench.final_state(job.id) == expected_state(6)


class SlowDatabase(Database):
    """Answers, but later than a trainer tells its next step."""

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with super().begin() as tx:
            tx.execute(text("select pg_sleep(0.05)"))
            yield tx


def test_a_trainer_that_tells_faster_than_it_can_be_stored_stops_when_asked(bench: Bench) -> None:
    bench.plan(step_seconds=0.02)
    job = bench.make_job(steps=500, checkpoint_interval=1000)
    slow = SlowDatabase(bench.worker_url, pool_size=4)

    with bench.parts() as parts:
        supervisor.run_job(
            dataclasses.replace(parts, database=slow),
            job.id,
            task_id="task",
            is_told_to_go=lambda: bench.job(job.id).step > 3,
        )
    slow.dispose()

    waiting = bench.job(job.id)
    assert waiting.status is JobStatus.QUEUED
    assert 3 < waiting.saved_step < 500


def test_a_lost_attempt_kills_its_trainer_and_writes_nothing_more(bench: Bench) -> None:
    bench.plan(hold_at=3)
    job = bench.make_job(steps=4)
    seen: list[Job] = []

    def take_away() -> bool:
        now = bench.job(job.id)
        if now.step == 2 and not seen:
            with bench.database.begin() as tx:
                attempts.release(tx, holder(now), reason="taken")
            seen.append(bench.job(job.id))
        return False

    after = bench.run_job(job, is_told_to_go=take_away)

    assert after == seen[0]
    assert bench.trainers() == []


def test_a_worker_told_to_go_does_not_wait_for_ever_for_the_last_lines(bench: Bench) -> None:
    job = bench.make_job(steps=2)

    def trainer_has_ended() -> bool:
        return any(bench.scratch.rglob("exit.json"))

    with bench.locked("metric"), capture_logs() as lines:
        left = bench.run_job(job, is_told_to_go=trainer_has_ended, pause_seconds=0.1)

    assert left.status is JobStatus.RUNNING
    assert lines[-1]["event"] == "attempt.left_to_the_reaper"


def test_a_job_that_nobody_may_claim_is_left_alone(bench: Bench) -> None:
    job = bench.make_job(steps=2)
    done = bench.run_job(job)

    again = bench.run_job(job)

    assert again == done


def test_an_unknown_model_fails_the_job(bench: Bench) -> None:
    job = bench.make_job(steps=2, model="nobody/has-this")

    done = bench.run_job(job)

    assert (done.status, done.error_code) == (JobStatus.FAILED, "model_load_failed")


def test_a_damaged_training_file_fails_the_job(bench: Bench) -> None:
    job = bench.make_job(steps=2)
    for key in bench.store.keys("files"):
        (bench.store.root / key).write_bytes(b"something else")

    done = bench.run_job(job)

    assert (done.status, done.error_code) == (JobStatus.FAILED, "internal_error")


def test_a_training_file_that_is_not_there_is_looked_for_again(bench: Bench) -> None:
    job = bench.make_job(steps=2)
    for key in bench.store.keys("files"):
        bench.store.delete(key)

    waiting = bench.run_job(job)

    assert (waiting.status, waiting.crashes) == (JobStatus.QUEUED, 1)
    assert bench.attempts(job.id)[0].end_reason == "input_missing"


def files_of(bench: Bench, uri: str) -> set[str]:
    """What is stored below a checkpoint."""
    return {key.removeprefix(f"{uri}/") for key in bench.store.keys(uri)}


def run_until_final(bench: Bench, job: Job) -> Job:
    """The job after as many attempts as it takes."""

    def attempt() -> Job | None:
        forget_backoff(bench)
        done = bench.run_job(job)
        return done if done.finished_at else None

    return wait_until(attempt, seconds=30)


def forget_backoff(bench: Bench) -> None:
    """Let queued jobs start again at once."""
    with bench.database.begin() as tx:
        tx.execute(update(models.job).values(not_before=None))
