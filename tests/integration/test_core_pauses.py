"""Pause, resume and cancel in every state, and what limits do, against a real Postgres."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update

from core import attempts, feed, jobs, models
from core.attempts import Claim
from core.db import Database
from core.errors import CancelPending, JobAlreadyFinished, JobNotFound
from core.rows import Job
from core.states import JobStatus, Phase, StopWanted
from tests.factories import (
    TTL,
    Tenant,
    claim_job,
    make_job,
    make_tenant,
    metric,
    stored_checkpoint,
)

RACES = 30

Wish = Callable[..., Job]


@pytest.fixture
def job(database: Database, tenant: Tenant) -> Job:
    with database.begin() as tx:
        return make_job(tx, tenant, queue=tenant.slug)


def set_columns(database: Database, job: Job, **columns: object) -> None:
    with database.begin() as tx:
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(**columns))


def bring_to(owner: Database, job: Job, status: str, stop_wanted: str | None = None) -> None:
    """The job in a state, by states that lead there."""
    held = {"lease_until": func.now() + timedelta(minutes=1)}
    if status == "validating_files":
        with owner.begin() as tx:  # only a new job may be in it
            columns = {
                column.name: getattr(job, column.name)
                for column in models.job.c
                if column.name != "id"
            }
            tx.execute(models.job_event.delete().where(models.job_event.c.job_id == job.id))
            tx.execute(models.job.delete().where(models.job.c.id == job.id))
            tx.execute(
                models.job.insert().values(
                    {**columns, "id": job.id, "status": status, "stop_wanted": stop_wanted}
                )
            )
        return
    if status in {"running", "succeeded", "failed"}:
        set_columns(owner, job, status="running", attempt=1, stop_wanted=stop_wanted, **held)
    if status == "running":
        return
    ends = {"finished_at": func.now(), "lease_until": None}
    set_columns(owner, job, status=status, **(ends if status not in {"queued", "paused"} else {}))


def wish_of(database: Database, job: Job, wish: Wish) -> Job | type[Exception]:
    """The job after a wish, or why not."""
    try:
        with database.begin() as tx:
            return wish(tx, job.id, tenant_id=job.tenant_id)
    except (JobAlreadyFinished, CancelPending) as error:
        return type(error)


TABLE: list[tuple[str, str | None, Wish, Any, str | None]] = [
    ("validating_files", None, jobs.cancel, ("cancelled", None), "job.cancelled"),
    ("queued", None, jobs.cancel, ("cancelled", None), "job.cancelled"),
    ("running", None, jobs.cancel, ("running", "cancel"), "job.cancel_requested"),
    ("running", "pause", jobs.cancel, ("running", "cancel"), "job.cancel_requested"),
    ("running", "cancel", jobs.cancel, ("running", "cancel"), None),
    ("paused", None, jobs.cancel, ("cancelled", None), "job.cancelled"),
    ("succeeded", None, jobs.cancel, JobAlreadyFinished, None),
    ("failed", None, jobs.cancel, JobAlreadyFinished, None),
    ("cancelled", None, jobs.cancel, ("cancelled", None), None),
    ("validating_files", None, jobs.pause, ("validating_files", "pause"), "job.pause_requested"),
    ("validating_files", "pause", jobs.pause, ("validating_files", "pause"), None),
    ("queued", None, jobs.pause, ("paused", None), "job.paused"),
    ("running", None, jobs.pause, ("running", "pause"), "job.pause_requested"),
    ("running", "pause", jobs.pause, ("running", "pause"), None),
    ("running", "cancel", jobs.pause, CancelPending, None),
    ("paused", None, jobs.pause, ("paused", None), None),
    ("succeeded", None, jobs.pause, JobAlreadyFinished, None),
    ("failed", None, jobs.pause, JobAlreadyFinished, None),
    ("cancelled", None, jobs.pause, JobAlreadyFinished, None),
    ("validating_files", None, jobs.resume, ("validating_files", None), None),
    ("validating_files", "pause", jobs.resume, ("validating_files", None), "job.pause_withdrawn"),
    ("queued", None, jobs.resume, ("queued", None), None),
    ("running", None, jobs.resume, ("running", None), None),
    ("running", "pause", jobs.resume, ("running", None), "job.pause_withdrawn"),
    ("running", "cancel", jobs.resume, CancelPending, None),
    ("paused", None, jobs.resume, ("queued", None), "job.queued"),
    ("succeeded", None, jobs.resume, JobAlreadyFinished, None),
    ("failed", None, jobs.resume, JobAlreadyFinished, None),
    ("cancelled", None, jobs.resume, JobAlreadyFinished, None),
]


@pytest.mark.parametrize(
    ("status", "stop_wanted", "wish", "expected", "told"),
    TABLE,
    ids=[f"{wish.__name__}-{status}-{stop}" for status, stop, wish, _, _ in TABLE],
)
def test_a_wish_does_in_each_state_what_the_table_says(
    database: Database,
    owner_database: Database,
    job: Job,
    status: str,
    stop_wanted: str | None,
    wish: Wish,
    expected: Any,
    told: str | None,
) -> None:
    bring_to(owner_database, job, status, stop_wanted)
    with database.begin() as tx:
        before = jobs.get(tx, job.id, tenant_id=job.tenant_id)

    found = wish_of(database, job, wish)

    with database.begin() as tx:
        after = jobs.get(tx, job.id, tenant_id=job.tenant_id)
        news = [item.code for item in feed.after(tx, job.id, before.last_seq)]
    if isinstance(expected, tuple):
        assert found == after
        assert (after.status, after.stop_wanted) == expected
    else:
        assert found is expected
        assert after == before
    assert news == ([] if told is None else [told])


@pytest.mark.parametrize("wish", [jobs.pause, jobs.resume])
def test_a_wish_for_another_tenants_job_finds_none(
    database: Database, owner_database: Database, job: Job, wish: Wish
) -> None:
    stranger = make_tenant(owner_database)

    with database.begin() as tx, pytest.raises(JobNotFound):
        wish(tx, job.id, tenant_id=stranger.tenant_id)


def test_a_paused_job_is_not_rung_and_not_claimed(
    database: Database, worker_database: Database, job: Job
) -> None:
    with worker_database.begin() as tx:
        attempts.dispatch(
            tx, queue=job.queue, room=1, is_missing=False, redispatch=timedelta(seconds=30)
        )
    wish_of(database, job, jobs.pause)

    with worker_database.begin() as tx:
        rung = attempts.dispatch(
            tx, queue=job.queue, room=1, is_missing=True, redispatch=timedelta(0)
        )
        held = attempts.claim(tx, job.id, task_id="t", worker_label="w", ttl=TTL)

    assert (rung, held) == ([], None)


def test_a_resumed_job_is_rung_again_with_its_crashes_forgotten(
    database: Database, worker_database: Database, job: Job
) -> None:
    wish_of(database, job, jobs.pause)
    set_columns(
        worker_database,
        job,
        crashes=2,
        dispatched_at=func.now(),
        not_before=func.now() + timedelta(hours=1),
    )

    resumed = wish_of(database, job, jobs.resume)

    assert isinstance(resumed, Job)
    assert (resumed.crashes, resumed.not_before, resumed.stop_wanted_at) == (0, None, None)
    with worker_database.begin() as tx:
        assert attempts.dispatch(
            tx, queue=job.queue, room=1, is_missing=False, redispatch=timedelta(seconds=30)
        ) == [job.id]


def test_a_withdrawn_pause_leaves_no_trace_at_the_end(
    database: Database, worker_database: Database, job: Job
) -> None:
    with worker_database.begin() as tx:
        held = claim_job(tx, job)
    wish_of(database, job, jobs.pause)
    wish_of(database, job, jobs.resume)

    with worker_database.begin() as tx:
        ended = attempts.release(tx, held.holder, reason="stopped")

    assert ended.status is JobStatus.QUEUED


def test_a_job_that_ends_before_its_pause_succeeds_and_says_so(
    database: Database, worker_database: Database, job: Job
) -> None:
    with worker_database.begin() as tx:
        held = claim_job(tx, job)
    wish_of(database, job, jobs.pause)

    with worker_database.begin() as tx:
        ended = attempts.finish(tx, held.holder, artifacts=[], fine_tuned_model="ft:x")

    assert ended.status is JobStatus.SUCCEEDED
    assert ended.items[-1].message == "The job has been completed, before it could be paused"


def test_of_a_pause_and_a_finish_at_once_the_finish_wins(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    start = threading.Barrier(2)
    with database.begin() as tx:
        made = [make_job(tx, tenant, queue=tenant.slug) for _ in range(RACES)]
    with worker_database.begin() as tx:
        holders = [claim_job(tx, one).holder for one in made]

    def pause_all() -> list[bool]:
        accepted = []
        for one in made:
            start.wait()
            accepted.append(isinstance(wish_of(database, one, jobs.pause), Job))
        return accepted

    def finish_all() -> list[attempts.Ended]:
        ended = []
        for holder in holders:
            start.wait()
            with worker_database.begin() as tx:
                ended.append(attempts.finish(tx, holder, artifacts=[], fine_tuned_model="ft:x"))
        return ended

    with ThreadPoolExecutor(2) as pool:
        accepted, ended = pool.submit(pause_all), pool.submit(finish_all)

    assert {end.status for end in ended.result()} == {JobStatus.SUCCEEDED}
    told = ["before it could be paused" in end.items[-1].message for end in ended.result()]
    assert told == accepted.result()


@pytest.mark.parametrize("wish", [jobs.pause, jobs.resume])
def test_a_wish_racing_a_release_never_calls_a_live_job_finished(
    database: Database, worker_database: Database, tenant: Tenant, wish: Wish
) -> None:
    """A guard pauses the job, or a stopped worker queues it, while the wish is on its way."""
    start = threading.Barrier(2)
    with database.begin() as tx:
        made = [make_job(tx, tenant, queue=tenant.slug) for _ in range(RACES)]
    with worker_database.begin() as tx:
        holders = [claim_job(tx, one).holder for one in made]
    to = JobStatus.QUEUED if wish is jobs.pause else JobStatus.PAUSED

    def ask_all() -> list[Job | type[Exception]]:
        answers = []
        for one in made:
            start.wait()
            answers.append(wish_of(database, one, wish))
        return answers

    def release_all() -> None:
        for holder in holders:
            start.wait()
            with worker_database.begin() as tx:
                attempts.release(tx, holder, reason="ended", to=to)

    with ThreadPoolExecutor(2) as pool:
        answers, released = pool.submit(ask_all), pool.submit(release_all)

    released.result()
    assert all(isinstance(answer, Job) for answer in answers.result())


def test_a_wish_that_found_nothing_to_change_asks_again_when_the_job_has_moved(
    database: Database, worker_database: Database, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the statement and the look at the row a guard has paused the job."""
    with worker_database.begin() as tx:
        held = claim_job(tx, job)
    look = jobs.get

    def look_after_a_guard(*args: Any, **kwargs: Any) -> Job:
        monkeypatch.setattr(jobs, "get", look)
        with worker_database.begin() as tx:
            attempts.release(tx, held.holder, reason="paused_by_guard", to=JobStatus.PAUSED)
        return look(*args, **kwargs)

    monkeypatch.setattr(jobs, "get", look_after_a_guard)

    resumed = wish_of(database, job, jobs.resume)

    assert isinstance(resumed, Job)
    assert resumed.status is JobStatus.QUEUED


# Limits.


def limited(database: Database, tenant: Tenant, **limits: Any) -> Job:
    with database.begin() as tx:
        plain = make_job(tx, tenant, queue=tenant.slug)
        spec = {**plain.spec, "limits": limits}
        return make_job(tx, tenant, queue=tenant.slug, spec=spec)


def beat(database: Database, held: Claim, **usage: float) -> attempts.Beat:
    with database.begin() as tx:
        return attempts.heartbeat(tx, held.holder, ttl=TTL, phase=Phase.TRAINING, usage=usage)


def claimed(database: Database, job: Job) -> Claim:
    with database.begin() as tx:
        return claim_job(tx, job)


def read(database: Database, job: Job) -> Job:
    with database.begin() as tx:
        return jobs.get(tx, job.id, tenant_id=job.tenant_id)


def test_a_reached_limit_asks_for_a_pause_and_is_told_once(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_generated_tokens=100)
    held = claimed(worker_database, job)

    below = beat(worker_database, held, response_tokens=99)
    at, after = (beat(worker_database, held, response_tokens=tokens) for tokens in (120, 130))

    now = read(database, job)
    assert (below.stop_wanted, below.items) == (None, [])
    assert (at.stop_wanted, at.finish_wanted) == (StopWanted.PAUSE, False)
    assert [(item.code, item.level, item.data) for item in at.items] == [
        (
            "limit.reached",
            "warn",
            {"limit": "max_generated_tokens", "value": 100, "used": 120, "on_limit": "pause"},
        )
    ]
    assert (after.stop_wanted, after.items) == (StopWanted.PAUSE, [])
    assert (now.limit_reached, now.last_seq) == ("max_generated_tokens", at.items[0].seq)


def test_a_checkpoint_reaches_a_limit_too(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_runtime_seconds=60)
    held = claimed(worker_database, job)

    with worker_database.begin() as tx:
        answer = attempts.checkpoint(
            tx, held.holder, stored_checkpoint(1), ttl=TTL, usage={"device_seconds": 61.0}
        )

    assert answer.stop_wanted is StopWanted.PAUSE
    assert [item.code for item in answer.items] == ["checkpoint.saved", "limit.reached"]
    assert [item.seq for item in answer.items] == [3, 4]


def test_a_job_paused_at_its_limit_says_so_and_a_resume_grants_it_once_more(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_generated_tokens=100)
    held = claimed(worker_database, job)
    beat(worker_database, held, response_tokens=120)
    with worker_database.begin() as tx:
        ended = attempts.release(tx, held.holder, reason="stopped", exit_code=75)

    resumed = wish_of(database, job, jobs.resume)
    again = claimed(worker_database, job)
    before, at = (beat(worker_database, again, response_tokens=n) for n in (219, 220))

    assert ended.status is JobStatus.PAUSED
    assert ended.items[-1].data["reason"] == "limit_reached"
    assert isinstance(resumed, Job)
    assert (resumed.limit_reached, resumed.budget_from) == (None, {"response_tokens": 120})
    assert before.stop_wanted is None
    assert at.stop_wanted is StopWanted.PAUSE


def test_a_resume_from_any_other_pause_leaves_the_budget_alone(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_generated_tokens=100)
    held = claimed(worker_database, job)
    beat(worker_database, held, response_tokens=60)
    wish_of(database, job, jobs.pause)
    with worker_database.begin() as tx:
        attempts.release(tx, held.holder, reason="stopped")

    wish_of(database, job, jobs.resume)

    again = claimed(worker_database, job)
    assert beat(worker_database, again, response_tokens=100).stop_wanted is StopWanted.PAUSE


def test_a_limit_that_finishes_asks_for_no_pause_and_outlives_a_crash(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_generated_tokens=100, on_limit="finish")
    held = claimed(worker_database, job)

    at, after = (beat(worker_database, held, response_tokens=n) for n in (100, 110))
    with worker_database.begin() as tx:
        attempts.release_crash(tx, held.holder, reason="died", backoff=timedelta(0))
    again = claimed(worker_database, job)
    next_beat = beat(worker_database, again, response_tokens=90)
    with worker_database.begin() as tx:
        ended = attempts.finish(tx, again.holder, artifacts=[], fine_tuned_model="ft:x")

    assert [(one.stop_wanted, one.finish_wanted) for one in (at, after, next_beat)] == [
        (None, True)
    ] * 3
    assert ended.status is JobStatus.SUCCEEDED
    assert ended.items[-1].data["reason"] == "limit_reached"


def test_a_cancel_comes_before_a_limit(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_generated_tokens=100)
    held = claimed(worker_database, job)
    wish_of(database, job, jobs.cancel)

    answer = beat(worker_database, held, response_tokens=100)

    assert answer.stop_wanted is StopWanted.CANCEL
    assert read(database, job).limit_reached == "max_generated_tokens"


def test_a_job_that_was_completed_at_its_end_blames_no_limit(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = limited(database, tenant, max_generated_tokens=100, on_limit="finish")
    held = claimed(worker_database, job)
    with worker_database.begin() as tx:
        attempts.heartbeat(
            tx,
            held.holder,
            ttl=TTL,
            phase=Phase.TRAINING,
            step=job.total_steps,
            usage={"response_tokens": 100},
        )

        ended = attempts.finish(tx, held.holder, artifacts=[], fine_tuned_model="ft:x")

    assert ended.items[-1].data["reason"] == "finished"


# The best checkpoint.


def save(
    database: Database, held: Claim, step: int, *, is_good: bool = True, **values: Any
) -> None:
    """A checkpoint at a step with these figures."""
    figures = {"kl_reference_per_sequence": 0.0, **values}
    new = attempts.NewCheckpoint(
        **{
            name: getattr(stored_checkpoint(step), name)
            for name in ("step", "uri", "manifest_sha256", "bytes", "adapter")
        },
        is_good=is_good,
    )
    report = attempts.Report(items=(metric(step, step, **figures),))
    with database.begin() as tx:
        attempts.checkpoint(tx, held.holder, new, ttl=TTL, report=report)


def best_of(database: Database, job: Job) -> list[int]:
    table = models.checkpoint.c
    with database.begin() as tx:
        rows = tx.execute(select(table.step).where(table.job_id == job.id, table.best))
        return list(rows.scalars())


def held_out(database: Database, tenant: Tenant) -> Job:
    """A job with held-out prompts, so that each checkpoint has a score of its own."""
    with database.begin() as tx:
        plain = make_job(tx, tenant, queue=tenant.slug)
        return make_job(tx, tenant, queue=tenant.slug, validation_file_id=plain.training_file_id)


def test_the_best_checkpoint_is_the_one_with_the_highest_score(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = held_out(database, tenant)
    held = claimed(worker_database, job)
    seen = []

    for step, reward in enumerate((0.5, 0.7, 0.6, 0.7), start=1):
        save(worker_database, held, step, valid_reward_mean=reward)
        seen.append(best_of(database, job))

    assert seen == [[1], [2], [2], [2]]  # of equals the earlier


def test_divergence_has_its_price(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = held_out(database, tenant)
    held = claimed(worker_database, job)
    coef = job.resolved["hyperparameters"]["kl_coef"]

    save(worker_database, held, 1, valid_reward_mean=0.5)
    save(worker_database, held, 2, valid_reward_mean=0.6, kl_reference_per_sequence=0.2 / coef)

    assert best_of(database, job) == [1]


def test_a_checkpoint_of_a_sick_run_or_without_figures_does_not_compete(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = held_out(database, tenant)
    held = claimed(worker_database, job)

    save(worker_database, held, 1, valid_reward_mean=0.9, is_good=False)
    save(worker_database, held, 2, valid_reward_mean=None)
    nothing = best_of(database, job)
    save(worker_database, held, 3, valid_reward_mean=0.1)

    assert (nothing, best_of(database, job)) == ([], [3])


def test_the_best_outlives_the_ring_and_gives_way_when_it_rots(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    job = held_out(database, tenant)
    held = claimed(worker_database, job)
    for step, reward in enumerate((0.9, 0.1, 0.2, 0.3, 0.4), start=1):
        save(worker_database, held, step, valid_reward_mean=reward)
        with worker_database.begin() as tx:
            attempts.prune_checkpoints(tx, held.holder)

    with worker_database.begin() as tx:
        kept = attempts.resumable(tx, job.id)
        attempts.give_up_checkpoint(tx, held.holder, kept[-1], reason="wrong digest")

    assert [one.step for one in kept] == [5, 4, 3, 1]
    assert best_of(database, job) == [5]
