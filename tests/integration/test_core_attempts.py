import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Connection, func, select, update

from core import artifacts, attempts, feed, jobs, models
from core.attempts import Claim, Holder, JobError
from core.db import Database
from core.errors import AttemptLost, DatabaseUnavailable
from core.events import EventCode, NewEvent, Report
from core.rows import Job
from core.states import JobStatus, Phase, StopWanted
from tests.factories import (
    TTL,
    Tenant,
    artifact,
    claim_job,
    clip_pass,
    make_job,
    metric,
    stored_checkpoint,
    visible_passes,
)
from tests.fakes.waiting import wait_until

RACES = 100
LONG_AGO = timedelta(hours=-1)


@pytest.fixture
def job(database: Database, tenant: Tenant) -> Job:
    with database.begin() as tx:
        return make_job(tx, tenant, queue=tenant.slug)


@pytest.fixture
def held(worker_database: Database, job: Job) -> Claim:
    with worker_database.begin() as tx:
        return claim_job(tx, job)


def read(tx: Connection, job: Job) -> Job:
    return jobs.get(tx, job.id, tenant_id=job.tenant_id)


def beat(tx: Connection, holder: Holder, **over: object) -> attempts.Beat:
    return attempts.heartbeat(tx, holder, **{"ttl": TTL, "phase": Phase.TRAINING} | over)


def set_columns(database: Database, job: Job, **columns: object) -> None:
    with database.begin() as tx:
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(**columns))


def expire(database: Database, job: Job) -> None:
    set_columns(database, job, lease_until=func.now() + LONG_AGO)


def cancel(database: Database, job: Job) -> None:
    with database.begin() as tx:
        jobs.cancel(tx, job.id, tenant_id=job.tenant_id)


# Claim.


def test_a_claim_holds_the_job_under_the_next_number(worker_database: Database, job: Job) -> None:
    with worker_database.begin() as tx:
        held = attempts.claim(tx, job.id, task_id="task-1", worker_label="w1", ttl=TTL)
        assert held is not None
        (listed,) = jobs.attempts(tx, job.id)
        left = tx.execute(
            select(models.job.c.lease_until - func.now()).where(models.job.c.id == job.id)
        ).scalar_one()

    assert (held.holder.attempt, held.job.status, held.job.phase) == (1, "running", "starting")
    assert (held.job.claim_key, held.job.worker_label) == ("task-1", "w1")
    assert (listed.attempt, listed.kind, listed.resumed_from_step) == (1, "train", None)
    assert left == TTL
    assert [(item.id, item.code) for item in held.items] == [("1-2", "job.claimed")]


def test_a_job_that_is_held_over_or_unknown_cannot_be_claimed(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    def try_claim() -> Claim | None:
        with worker_database.begin() as tx:
            return attempts.claim(tx, job.id, task_id="late", worker_label="w", ttl=TTL)

    while_held = try_claim()
    with worker_database.begin() as tx:
        attempts.finish(tx, held.holder, artifacts=[], fine_tuned_model="ft:x")
    afterwards = try_claim()
    with worker_database.begin() as tx:
        unknown = attempts.claim(tx, uuid4(), task_id="t", worker_label="w", ttl=TTL)
    with database.begin() as tx:
        assert read(tx, job).attempt == 1

    assert (while_held, afterwards, unknown) == (None, None, None)


def test_a_job_that_backs_off_is_not_claimed_before_its_time(
    worker_database: Database, job: Job
) -> None:
    set_columns(worker_database, job, not_before=func.now() + timedelta(seconds=60))
    with worker_database.begin() as tx:
        early = attempts.claim(tx, job.id, task_id="t", worker_label="w", ttl=TTL)
    set_columns(worker_database, job, not_before=func.now())
    with worker_database.begin() as tx:
        late = attempts.claim(tx, job.id, task_id="t", worker_label="w", ttl=TTL)

    assert early is None
    assert late is not None


def test_of_two_claims_at_once_exactly_one_wins(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        ids = [make_job(tx, tenant).id for _ in range(RACES)]
    start = threading.Barrier(2)

    def claim_all(label: str) -> list[bool]:
        won = []
        for job_id in ids:
            start.wait()
            with worker_database.begin() as tx:
                held = attempts.claim(tx, job_id, task_id=label, worker_label=label, ttl=TTL)
                won.append(held is not None)
        return won

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(claim_all, ["a", "b"])

    assert [one + two for one, two in zip(first, second, strict=True)] == [1] * RACES


# Heartbeat.


def test_a_heartbeat_stores_rows_in_the_trainers_order(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    news = NewEvent(code=EventCode.SELF_CHECK_PASSED, message="fine", step=1, line=2)
    report = Report(
        items=(metric(1, 1, reward_mean=0.5), news, metric(4, 2, reward_mean=None)),
        passes=(clip_pass(3, 1), clip_pass(3, 1, minibatch=1)),
    )

    with worker_database.begin() as tx:
        answer = beat(tx, held.holder, step=2, report=report, usage={"response_tokens": 9})

    with database.begin() as tx:
        stored = feed.after(tx, job.id, 2)
        passes = visible_passes(tx, job.id)
        now = read(tx, job)
    assert stored == answer.items
    assert [(item.seq, item.kind, item.data) for item in stored] == [
        (3, "metrics", {"reward_mean": 0.5}),
        (4, "event", {}),
        (5, "metrics", {"reward_mean": None}),
    ]
    assert [(one.step, one.epoch, one.minibatch) for one in passes] == [(1, 0, 0), (1, 0, 1)]
    assert (now.step, now.phase, now.last_seq, now.usage) == (
        2,
        "training",
        5,
        {"response_tokens": 9},
    )


def test_a_bare_heartbeat_extends_the_lease_and_says_nothing(
    worker_database: Database, job: Job, held: Claim
) -> None:
    set_columns(worker_database, job, lease_until=func.now() + timedelta(seconds=1))

    with worker_database.begin() as tx:
        answer = beat(tx, held.holder, ttl=timedelta(seconds=90))
        left = tx.execute(
            select(models.job.c.lease_until - func.now()).where(models.job.c.id == job.id)
        ).scalar_one()

    assert answer == attempts.Beat(stop_wanted=None, finish_wanted=False, items=[])
    assert left == timedelta(seconds=90)


def test_a_step_never_goes_back(worker_database: Database, job: Job, held: Claim) -> None:
    with worker_database.begin() as tx:
        beat(tx, held.holder, step=7)
        beat(tx, held.holder, step=3)

        assert read(tx, job).step == 7


def test_a_heartbeat_said_twice_is_stored_once(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    first = Report(items=(metric(1, 1),), passes=(clip_pass(2, 1),))
    longer = Report(items=(metric(1, 1), metric(3, 2)), passes=(clip_pass(2, 1), clip_pass(4, 2)))

    for report in (first, longer):
        with worker_database.begin() as tx:
            beat(tx, held.holder, report=report)

    with database.begin() as tx:
        assert [item.step for item in feed.after(tx, job.id, 2)] == [1, 2]
        assert [one.step for one in visible_passes(tx, job.id)] == [1, 2]
        assert read(tx, job).last_seq == 4


def test_a_heartbeat_brings_the_wish_to_stop(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    cancel(database, job)

    with worker_database.begin() as tx:
        assert beat(tx, held.holder).stop_wanted == StopWanted.CANCEL


def test_text_that_postgres_cannot_hold_is_told_without_it(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    odd = NewEvent(
        code=EventCode.REWARD_ERRORS,
        message="a\x00b\ud800",
        data={"n\x00": ["\x00", float("nan")], "deep": {"x": float("inf")}},
    )

    with worker_database.begin() as tx:
        beat(tx, held.holder, report=Report(items=(odd,)))

    with database.begin() as tx:
        (item,) = feed.after(tx, job.id, 2)
    assert item.message == "ab?"
    assert item.data == {"n": ["", None], "deep": {"x": None}}


Write = Callable[[Connection, Holder], object]


@pytest.mark.parametrize(
    "write",
    [
        beat,
        lambda tx, holder: beat(tx, holder, report=Report(items=(metric(1, 1),))),
        lambda tx, holder: attempts.checkpoint(tx, holder, stored_checkpoint(1), ttl=TTL),
        lambda tx, holder: attempts.record_resume(tx, holder, step=0),
        lambda tx, holder: attempts.record_resume(tx, holder, step=3),
        lambda tx, holder: attempts.record_resolved(tx, holder, {"total_steps": 1}),
        attempts.prune_checkpoints,
        lambda tx, holder: attempts.store_artifacts(tx, holder, [artifact()]),
        lambda tx, holder: attempts.finish(tx, holder, artifacts=[], fine_tuned_model="x"),
        attempts.release,
        lambda tx, holder: attempts.release_crash(tx, holder, reason="trainer_died"),
        lambda tx, holder: attempts.fail(tx, holder, JobError(code="x", message="y")),
    ],
    ids=[
        "heartbeat",
        "rows",
        "checkpoint",
        "start",
        "resume",
        "resolved",
        "prune",
        "artifacts",
        "finish",
        "release",
        "crash",
        "fail",
    ],
)
def test_who_lost_the_job_writes_nothing(
    database: Database, worker_database: Database, job: Job, held: Claim, write: Write
) -> None:
    expire(worker_database, job)
    with worker_database.begin() as tx:
        attempts.release_crash(tx, held.holder, reason="lease_expired")
    for is_claimed_again in (False, True):
        if is_claimed_again:
            set_columns(worker_database, job, not_before=None)
            with worker_database.begin() as tx:
                claim_job(tx, job)
        with database.begin() as tx:
            before = read(tx, job)

        with pytest.raises(AttemptLost), worker_database.begin() as tx:
            write(tx, held.holder)

        with database.begin() as tx:
            assert read(tx, job) == before


def test_eight_writers_leave_no_hole_in_the_numbers(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    start = threading.Barrier(8)

    def write_some(writer: int) -> int:
        """Rows that were committed; every fifth transaction is rolled back."""
        committed = 0
        start.wait()
        for turn in range(25):
            news = NewEvent(code=EventCode.GUARD_FIRED, message=f"{writer}")
            report = Report(items=(news,) * (1 + turn % 3))
            with worker_database.engine.connect() as tx:
                beat(tx, held.holder, report=report)
                if turn % 5:
                    tx.commit()
                    committed += len(report.items)
        return committed

    with ThreadPoolExecutor(9) as pool:
        wish = pool.submit(cancel, database, job)
        committed = sum(pool.map(write_some, range(8)))
        wish.result()

    with database.begin() as tx:
        seqs = [item.seq for item in feed.after(tx, job.id, 0, limit=1000)]
        assert read(tx, job).last_seq == len(seqs)
    assert seqs == list(range(1, committed + 4))  # created, claimed, cancel requested


# Checkpoints and resume.


def test_a_checkpoint_exists_with_all_rows_before_it(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    with worker_database.begin() as tx:
        answer = attempts.checkpoint(
            tx,
            held.holder,
            stored_checkpoint(2),
            ttl=TTL,
            report=Report(items=(metric(1, 1), metric(2, 2))),
        )

    with database.begin() as tx:
        now = read(tx, job)
        assert [one.step for one in jobs.checkpoints(tx, job.id)] == [2]
        assert [one.step for one in feed.metrics(tx, job.id)] == [1, 2]
    assert (now.step, now.saved_step, now.last_seq) == (2, 2, 5)
    assert [item.code for item in answer.items] == ["", "", "checkpoint.saved"]


def test_a_checkpoint_said_twice_is_stored_once(
    worker_database: Database, job: Job, held: Claim
) -> None:
    with worker_database.begin() as tx:
        for _ in range(2):
            attempts.checkpoint(tx, held.holder, stored_checkpoint(2), ttl=TTL)

        assert len(jobs.checkpoints(tx, job.id)) == 1
        assert [item.code for item in feed.after(tx, job.id, 2)] == ["checkpoint.saved"]


def test_the_newest_checkpoint_that_may_be_used_comes_first(
    worker_database: Database, job: Job, held: Claim
) -> None:
    with worker_database.begin() as tx:
        for step in (1, 2, 3):
            attempts.checkpoint(tx, held.holder, stored_checkpoint(step), ttl=TTL)
        newest = attempts.resumable(tx, job.id)[0]

        told = attempts.give_up_checkpoint(tx, held.holder, newest, reason="wrong digest")

        assert newest.step == 3
        assert [one.step for one in attempts.resumable(tx, job.id)] == [2, 1]
        assert [(item.code, item.level) for item in told] == [("checkpoint.corrupt", "warn")]


def test_pruning_keeps_the_last_three_and_the_best(
    worker_database: Database, job: Job, held: Claim
) -> None:
    checkpoint = models.checkpoint
    with worker_database.begin() as tx:
        for step in range(1, 7):
            attempts.checkpoint(tx, held.holder, stored_checkpoint(step), ttl=TTL)
        tx.execute(
            update(checkpoint)
            .where(checkpoint.c.job_id == job.id, checkpoint.c.step == 1)
            .values(best=True)
        )

        given_up = attempts.prune_checkpoints(tx, held.holder)

        assert sorted(one.step for one in given_up) == [2, 3]
        assert [one.step for one in attempts.resumable(tx, job.id)] == [6, 5, 4, 1]
        assert attempts.prune_checkpoints(tx, held.holder) == []


def test_rows_that_a_resume_made_void_are_hidden(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    rows = Report(
        items=tuple(metric(step, step, first=1.0) for step in (1, 2, 3)),
        passes=tuple(clip_pass(step, step) for step in (1, 2, 3)),
    )
    with worker_database.begin() as tx:
        attempts.record_resume(tx, held.holder, step=0)
        beat(tx, held.holder, report=rows)
        attempts.release_crash(tx, held.holder, reason="trainer_died", backoff=timedelta(0))
        second = claim_job(tx, job)
        before = [one.step for one in feed.metrics(tx, job.id)]

        told = attempts.record_resume(tx, second.holder, step=1)
        beat(tx, second.holder, report=Report(items=(metric(1, 2, second=1.0),)))

    with database.begin() as tx:
        points = feed.metrics(tx, job.id)
        passes = [one.step for one in visible_passes(tx, job.id)]
        limited = feed.metrics(tx, job.id, from_step=2, to_step=2)
        everything = [item.kind for item in feed.after(tx, job.id, 0)]
    assert before == [1, 2, 3]
    assert [(one.attempt, one.step, one.values) for one in points] == [
        (1, 1, {"first": 1.0}),
        (2, 2, {"second": 1.0}),
    ]
    assert limited == points[1:]
    assert passes == [1]
    assert [(item.code, item.step) for item in told] == [("job.resumed", 1)]
    assert everything.count("metrics") == 4


def test_a_fresh_start_hides_all_of_the_attempt_before(
    worker_database: Database, job: Job, held: Claim
) -> None:
    with worker_database.begin() as tx:
        beat(tx, held.holder, report=Report(items=(metric(1, 1),)))
        attempts.release(tx, held.holder)
        second = claim_job(tx, job)

        told = attempts.record_resume(tx, second.holder, step=0)

        assert told == []
        assert feed.metrics(tx, job.id) == []


def test_measured_settings_are_kept_for_later_attempts(
    worker_database: Database, job: Job, held: Claim
) -> None:
    measured = job.resolved | {"total_steps": 3, "note": "halved"}

    with worker_database.begin() as tx:
        attempts.record_resolved(tx, held.holder, measured)
        attempts.release(tx, held.holder)
        again = claim_job(tx, job)

    assert (again.job.resolved, again.job.total_steps) == (measured, 3)


# The end.


def test_a_finished_job_has_its_results_and_stays_so(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    with worker_database.begin() as tx:
        ended = attempts.finish(
            tx,
            held.holder,
            artifacts=[artifact(), artifact("metrics.csv", "export")],
            fine_tuned_model="ft:model",
            report=Report(items=(metric(1, 1),)),
            usage={"prompt_tokens": 4},
        )

    with database.begin() as tx:
        now = read(tx, job)
        adapter = artifacts.adapter(tx, now)
        paths = [one.path for one in artifacts.of_job(tx, job.id)]
        result = artifacts.by_path(tx, job.id, "adapter.tar")
        by_id = artifacts.by_id(tx, result.id, tenant_id=job.tenant_id)
    assert (ended.status, now.status) == (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED)
    assert (now.fine_tuned_model, now.lease_until, now.phase) == ("ft:model", None, None)
    assert (now.usage, now.finished_at is None) == ({"prompt_tokens": 4}, False)
    assert paths == ["adapter.tar", "metrics.csv"]
    assert by_id == result == adapter.source
    assert adapter.checkpoint is None
    assert [item.code for item in ended.items] == ["", "job.succeeded"]


def test_finish_said_twice_finds_its_own_result(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    for _ in range(2):
        with worker_database.begin() as tx:
            ended = attempts.finish(
                tx, held.holder, artifacts=[artifact()], fine_tuned_model="ft:model"
            )

    assert ended.status == JobStatus.SUCCEEDED
    with database.begin() as tx:
        assert len(artifacts.of_job(tx, job.id)) == 1
        assert [item.code for item in feed.after(tx, job.id, 2)] == ["job.succeeded"]


def test_after_a_cancel_finish_never_becomes_success(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    cancel(database, job)

    with worker_database.begin() as tx:
        ended = attempts.finish(tx, held.holder, artifacts=[artifact()], fine_tuned_model="ft:x")

    with database.begin() as tx:
        now = read(tx, job)
        assert artifacts.of_job(tx, job.id) == []
    assert (ended.status, now.status) == (JobStatus.CANCELLED, JobStatus.CANCELLED)
    assert (now.fine_tuned_model, now.stop_wanted) == (None, None)


def test_cancel_racing_finish_never_answers_200_for_a_success(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    start = threading.Barrier(2)
    with database.begin() as tx:
        made = [make_job(tx, tenant) for _ in range(30)]
    with worker_database.begin() as tx:
        holders = [claim_job(tx, one).holder for one in made]

    def cancel_all() -> list[bool]:
        accepted = []
        for one in made:
            start.wait()
            try:
                cancel(database, one)
                accepted.append(True)
            except jobs.JobAlreadyFinished:
                accepted.append(False)
        return accepted

    def finish_all() -> list[JobStatus]:
        ended = []
        for holder in holders:
            start.wait()
            with worker_database.begin() as tx:
                end = attempts.finish(tx, holder, artifacts=[], fine_tuned_model="ft:x")
            ended.append(end.status)
        return ended

    with ThreadPoolExecutor(2) as pool:
        accepted, ended = pool.submit(cancel_all), pool.submit(finish_all)

    expected = {True: JobStatus.CANCELLED, False: JobStatus.SUCCEEDED}
    assert ended.result() == [expected[yes] for yes in accepted.result()]


def test_a_stopped_worker_hands_the_job_back_without_blame(
    worker_database: Database, job: Job, held: Claim
) -> None:
    with worker_database.begin() as tx:
        ended = attempts.release(tx, held.holder, exit_code=75)
        again = attempts.release(tx, held.holder, exit_code=75)
        now = read(tx, job)
        (listed,) = jobs.attempts(tx, job.id)

    assert (now.status, now.crashes, now.not_before) == (JobStatus.QUEUED, 0, None)
    assert (now.lease_until, now.dispatched_at) == (None, None)
    assert (listed.end_reason, listed.exit_code) == ("worker_stopped", 75)
    assert [(item.code, item.data["to"]) for item in ended.items] == [("worker.stopped", "queued")]
    assert again == replace(ended, items=[])


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [
        ("cancel", JobStatus.CANCELLED, "job.cancelled"),
        ("pause", JobStatus.PAUSED, "job.paused"),
    ],
)
@pytest.mark.parametrize("way", [attempts.release, attempts.release_crash])
def test_a_release_does_what_was_wanted(
    worker_database: Database,
    job: Job,
    held: Claim,
    wanted: str,
    status: JobStatus,
    code: str,
    way: Callable[..., attempts.Ended],
) -> None:
    set_columns(worker_database, job, stop_wanted=wanted)

    with worker_database.begin() as tx:
        ended = way(tx, held.holder, reason="ended")
        now = read(tx, job)

    assert (now.status, now.stop_wanted) == (status, None)
    assert [item.code for item in ended.items] == [code]


def crash(database: Database, job: Job, *, saves_at: int | None = None) -> Job:
    """One attempt that dies, perhaps after storing a checkpoint."""
    set_columns(database, job, not_before=None)
    with database.begin() as tx:
        held = claim_job(tx, job)
        if saves_at is not None:
            attempts.checkpoint(tx, held.holder, stored_checkpoint(saves_at), ttl=TTL)
        attempts.release_crash(
            tx, held.holder, reason="trainer_died", message="killed by signal 9", exit_code=-9
        )
        return read(tx, job)


def test_three_crashes_without_a_checkpoint_fail_the_job(
    worker_database: Database, job: Job
) -> None:
    seen = [crash(worker_database, job) for _ in range(3)]

    last = seen[-1]
    assert [one.status for one in seen] == ["queued", "queued", "failed"]
    assert [one.crashes for one in seen] == [1, 2, 3]
    assert last.error_code == "too_many_crashes"
    assert "killed by signal 9" in (last.error_message or "")


def test_the_last_crash_may_name_the_error(worker_database: Database, job: Job) -> None:
    for _ in range(2):
        crash(worker_database, job)
    set_columns(worker_database, job, not_before=None)

    with worker_database.begin() as tx:
        held = claim_job(tx, job)
        attempts.release_crash(tx, held.holder, reason="full", error_code="disk_full")
        last = read(tx, job)

    assert (last.status, last.error_code) == (JobStatus.FAILED, "disk_full")


def test_crashes_after_new_checkpoints_never_fail_the_job(
    worker_database: Database, job: Job
) -> None:
    seen = [crash(worker_database, job, saves_at=step) for step in range(1, 6)]

    assert {(one.status, one.crashes) for one in seen} == {(JobStatus.QUEUED, 1)}


def test_making_steps_without_saving_is_no_progress(worker_database: Database, job: Job) -> None:
    saved = crash(worker_database, job, saves_at=5)
    set_columns(worker_database, job, step=50)

    second, third = (crash(worker_database, job) for _ in range(2))

    assert [one.crashes for one in (saved, second, third)] == [1, 2, 3]
    assert third.status == JobStatus.FAILED


def test_a_crash_pauses_longer_each_time(worker_database: Database, job: Job) -> None:
    pauses = []
    for crashes_before in (0, 1, 100):
        # Crashes beyond three need wanted pauses in between; only the pause counts here.
        set_columns(worker_database, job, crashes=min(crashes_before, 1), crash_step=0)
        with worker_database.begin() as tx:
            held = claim_job(tx, job)
            backoff = timedelta(hours=9) if crashes_before == 100 else timedelta(seconds=5)
            attempts.release_crash(tx, held.holder, reason="trainer_died", backoff=backoff)
            waits = select(models.job.c.not_before - func.now()).where(models.job.c.id == job.id)
            pauses.append(tx.execute(waits).scalar_one().total_seconds())
        set_columns(worker_database, job, not_before=None)

    first, second, longest = pauses
    assert 5 * 0.75 <= first <= 5 * 1.25
    assert 10 * 0.75 <= second <= 10 * 1.25
    assert 300 * 0.75 <= longest <= 300 * 1.25


def test_a_failure_tells_why_and_is_not_tried_again(
    worker_database: Database, job: Job, held: Claim
) -> None:
    error = JobError(code="reward_failed", message="the reward raised", param="method.ppo.reward")

    with worker_database.begin() as tx:
        ended = attempts.fail(
            tx, held.holder, error, exit_code=70, report=Report(items=(metric(1, 1),))
        )
        now = read(tx, job)

    assert (now.status, now.finished_at is None) == (JobStatus.FAILED, False)
    assert (now.error_code, now.error_message, now.error_param) == (
        "reward_failed",
        "the reward raised",
        "method.ppo.reward",
    )
    assert ended.items[-1].message == "The job failed: the reward raised"
    assert ended.items[-1].level == "error"


def test_a_failure_of_a_cancelled_job_is_a_cancel(
    database: Database, worker_database: Database, job: Job, held: Claim
) -> None:
    cancel(database, job)

    with worker_database.begin() as tx:
        attempts.fail(tx, held.holder, JobError(code="reward_failed", message="x"))
        now = read(tx, job)

    assert (now.status, now.error_code) == (JobStatus.CANCELLED, None)


def test_a_lost_task_releases_what_it_held_and_only_once(
    worker_database: Database, job: Job
) -> None:
    with worker_database.begin() as tx:
        claim_job(tx, job, task_id="the-task")

        ended = attempts.release_claim(tx, "the-task", message="WorkerLostError")
        again = attempts.release_claim(tx, "the-task")
        other = attempts.release_claim(tx, "unknown")
        now = read(tx, job)

    assert ended is not None
    assert (ended.status, now.crashes) == (JobStatus.QUEUED, 1)
    assert (again, other) == (None, None)


def test_the_reaper_frees_only_jobs_whose_lease_ran_out(
    worker_database: Database, tenant: Tenant, database: Database
) -> None:
    with database.begin() as tx:
        dead, alive = make_job(tx, tenant), make_job(tx, tenant)
    with worker_database.begin() as tx:
        claim_job(tx, dead)
        claim_job(tx, alive)
    expire(worker_database, dead)

    with worker_database.begin() as tx:
        freed = attempts.reap(tx, ttl=timedelta(0))

    with database.begin() as tx:
        assert read(tx, alive).status == JobStatus.RUNNING
        now = read(tx, dead)
    assert [(one.job_id, one.status) for one in freed] == [(dead.id, JobStatus.QUEUED)]
    assert now.crashes == 1
    assert freed[0].items[-1].code == "lease.expired"


@pytest.mark.usefixtures("held")
def test_the_reaper_waits_one_lease_after_postgres_came_up(
    worker_database: Database, job: Job
) -> None:
    expire(worker_database, job)

    with worker_database.begin() as tx:
        freed = attempts.reap(tx, ttl=timedelta(days=9))
        assert read(tx, job).status == JobStatus.RUNNING

    assert freed == []


@pytest.mark.usefixtures("held")
def test_the_reaper_honours_a_wanted_cancel(
    database: Database, worker_database: Database, job: Job
) -> None:
    cancel(database, job)
    expire(worker_database, job)

    with worker_database.begin() as tx:
        attempts.reap(tx, ttl=timedelta(0))
        assert read(tx, job).status == JobStatus.CANCELLED


def test_a_holder_frozen_within_a_transaction_keeps_its_job_no_longer_than_a_statement_may_take(
    worker_url: str, worker_database: Database, job: Job, held: Claim
) -> None:
    """Its session holds the row, and the reaper passes over locked rows."""
    frozen = Database(worker_url, statement_timeout_seconds=1)
    expire(worker_database, job)

    def reaped() -> list[attempts.Ended]:
        with worker_database.begin() as tx:
            return attempts.reap(tx, ttl=timedelta(0))

    def come_back_late() -> None:
        with frozen.begin() as tx:
            beat(tx, held.holder)
            freed.extend(wait_until(reaped))
            tx.execute(select(1))

    freed: list[attempts.Ended] = []
    with pytest.raises(DatabaseUnavailable):
        come_back_late()
    frozen.dispose()

    assert [one.job_id for one in freed] == [job.id]


@pytest.mark.usefixtures("held")
def test_two_reapers_free_a_job_once(worker_database: Database, job: Job) -> None:
    expire(worker_database, job)

    with worker_database.begin() as first, worker_database.begin() as second:
        freed = [len(attempts.reap(tx, ttl=timedelta(0))) for tx in (first, second)]

    assert freed == [1, 0]


# Results during and after the run.


def test_a_path_is_taken_over_by_a_later_attempt_only(
    worker_database: Database, job: Job, held: Claim
) -> None:
    old, new = artifact("samples/1.jsonl.gz"), artifact("samples/1.jsonl.gz")
    with worker_database.begin() as tx:
        attempts.store_artifacts(tx, held.holder, [old])
        attempts.release(tx, held.holder)
        second = claim_job(tx, job)

        attempts.store_artifacts(tx, second.holder, [new])

        (stored,) = artifacts.of_job(tx, job.id)
    assert (stored.uri, stored.attempt) == (new.uri, 2)


# Dispatch.


def ring(tx: Connection, job: Job, **over: object) -> list[object]:
    options = {"room": 4, "is_missing": False, "redispatch": timedelta(seconds=30)} | over
    return list(attempts.dispatch(tx, queue=job.queue, **options))


def test_a_waiting_job_is_rung_once(worker_database: Database, job: Job) -> None:
    rounds = []
    for _ in range(2):
        with worker_database.begin() as tx:
            rounds.append(ring(tx, job))

    assert rounds == [[job.id], []]
    with worker_database.begin() as tx:
        assert attempts.rung(tx, queue=job.queue) == 1


def test_a_ring_that_was_not_committed_is_repeated(worker_database: Database, job: Job) -> None:
    with worker_database.engine.connect() as tx:
        ring(tx, job)
        tx.rollback()

    with worker_database.begin() as tx:
        assert ring(tx, job) == [job.id]


def test_a_lost_ring_is_repeated_after_its_time(worker_database: Database, job: Job) -> None:
    with worker_database.begin() as tx:
        ring(tx, job)
    set_columns(worker_database, job, dispatched_at=func.now() - timedelta(seconds=31))

    with worker_database.begin() as tx:
        none_missing = ring(tx, job)
        too_early = ring(tx, job, is_missing=True, redispatch=timedelta(seconds=60))
        in_time = ring(tx, job, is_missing=True)

    assert (none_missing, too_early, in_time) == ([], [], [job.id])


def test_doorbells_follow_priority_then_age_and_the_room(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    made = []
    for priority in (0, 0, 9):
        with database.begin() as tx:
            made.append(make_job(tx, tenant, queue=tenant.slug, priority=priority))

    with worker_database.begin() as tx:
        full = ring(tx, made[0], room=0)
        overfull = ring(tx, made[0], room=-3)
        first = ring(tx, made[0], room=2)
        rest = ring(tx, made[0], room=2)

    assert (full, overfull) == ([], [])
    assert (sorted(first), rest) == (sorted([made[2].id, made[0].id]), [made[1].id])


def test_a_job_that_backs_off_or_runs_is_not_rung(
    database: Database, worker_database: Database, tenant: Tenant, job: Job
) -> None:
    with database.begin() as tx:
        running = make_job(tx, tenant, queue=tenant.slug)
    with worker_database.begin() as tx:
        claim_job(tx, running)
    set_columns(worker_database, job, not_before=func.now() + timedelta(seconds=60))

    with worker_database.begin() as tx:
        assert ring(tx, job) == []


def test_two_dispatchers_ring_each_job_once_per_round(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        made = [make_job(tx, tenant, queue=tenant.slug) for _ in range(6)]

    with worker_database.begin() as first, worker_database.begin() as second:
        rung = ring(first, made[0], room=3) + ring(second, made[0], room=9)

    assert sorted(rung) == sorted(one.id for one in made)
