from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Connection, select, update

from core import attempts, feed, files, jobs, models
from core.db import Database
from core.errors import FileInUse, InvalidCursor, JobAlreadyFinished, JobNotFound
from core.jobs import JobFilter
from core.rows import Job
from core.states import JobStatus, StopWanted
from tests.factories import (
    TTL,
    Tenant,
    claim_job,
    make_file,
    make_job,
    make_tenant,
    stored_checkpoint,
)

TASK = "task"


def test_a_new_job_is_queued_with_its_first_event(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)

        items = feed.after(tx, job.id, 0)

    assert job.status == JobStatus.QUEUED
    assert [(item.seq, item.code, item.id) for item in items] == [(1, "job.created", "0-1")]


def test_what_was_stored_comes_back(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        made = make_job(tx, tenant, metadata={"run": "a"}, suffix="mine", priority=3)

        job = jobs.get(tx, made.id, tenant_id=tenant.tenant_id)

    assert job == made
    assert (job.metadata, job.suffix, job.priority, job.seed) == ({"run": "a"}, "mine", 3, 7)
    assert job.resolved["total_steps"] == job.total_steps == 1


def test_a_rolled_back_job_leaves_nothing(database: Database, tenant: Tenant) -> None:
    with database.engine.connect() as tx:
        make_job(tx, tenant)
        tx.rollback()

    with database.begin() as tx:
        assert jobs.page(tx, tenant_id=tenant.tenant_id, limit=10).jobs == []


def test_another_tenants_job_is_not_there(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    stranger = make_tenant(owner_database)
    with database.begin() as tx:
        job = make_job(tx, tenant)

        with pytest.raises(JobNotFound):
            jobs.get(tx, job.id, tenant_id=stranger.tenant_id)
        with pytest.raises(JobNotFound):
            jobs.cancel(tx, job.id, tenant_id=stranger.tenant_id)
        with pytest.raises(InvalidCursor):
            jobs.page(tx, tenant_id=stranger.tenant_id, limit=5, after=job.id)
        assert jobs.page(tx, tenant_id=stranger.tenant_id, limit=5).jobs == []


def test_pages_join_without_gap_or_double(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:  # one transaction: all were created at the same moment
        made = [make_job(tx, tenant).id for _ in range(5)]

        for order in ("asc", "desc"):
            seen: list[UUID] = []
            page = jobs.page(tx, tenant_id=tenant.tenant_id, limit=2, order=order)
            seen += [job.id for job in page.jobs]
            while page.has_more:
                page = jobs.page(
                    tx, tenant_id=tenant.tenant_id, limit=2, after=seen[-1], order=order
                )
                seen += [job.id for job in page.jobs]

            assert seen == sorted(made, reverse=order == "desc")


def test_a_limit_of_zero_says_whether_there_is_anything(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        make_job(tx, tenant)

        page = jobs.page(tx, tenant_id=tenant.tenant_id, limit=0)

    assert (page.jobs, page.has_more) == ([], True)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (JobFilter(metadata={"team": "red"}), ["first"]),
        (JobFilter(has_no_metadata=True), ["third"]),
        (JobFilter(status=[JobStatus.CANCELLED]), ["second"]),
        (JobFilter(model="another/model"), ["third"]),
        (JobFilter(method="dpo"), []),
        (JobFilter(), ["third", "second", "first"]),
    ],
)
def test_a_list_shows_what_the_filter_says(
    database: Database, tenant: Tenant, where: JobFilter, expected: list[str]
) -> None:
    with database.begin() as tx:
        make_job(tx, tenant, suffix="first", metadata={"team": "red", "n": "1"})
        second = make_job(tx, tenant, suffix="second", metadata={"team": "blue"})
        make_job(tx, tenant, suffix="third", model="another/model")
        jobs.cancel(tx, second.id, tenant_id=tenant.tenant_id)

        page = jobs.page(tx, tenant_id=tenant.tenant_id, limit=10, where=where)

    assert [job.suffix for job in page.jobs] == expected


def test_cancel_ends_a_queued_job_at_once_and_stays_the_same(
    database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)

        first = jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)
        again = jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)
        last = feed.after(tx, job.id, 0)[-1]

    assert first.status == JobStatus.CANCELLED
    assert first.finished_at is not None
    assert again == first
    assert (last.code, last.data["from"], last.data["to"]) == (
        "job.cancelled",
        "queued",
        "cancelled",
    )


def test_cancel_asks_a_running_job_to_stop_and_asks_once(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        claim_job(tx, job)

    with database.begin() as tx:
        first = jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)
        again = jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)

    assert (first.status, first.stop_wanted) == (JobStatus.RUNNING, StopWanted.CANCEL)
    assert first.stop_wanted_at is not None
    assert again == first


def test_cancel_overrides_a_wanted_pause(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        claim_job(tx, job)
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(stop_wanted="pause"))

    with database.begin() as tx:
        cancelled = jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)

    assert cancelled.stop_wanted == StopWanted.CANCEL


def test_cancel_of_a_paused_job_ends_it(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(status="paused"))

    with database.begin() as tx:
        assert jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id).status == JobStatus.CANCELLED


def test_resume_puts_a_paused_job_back_into_the_queue_and_tells_so(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(status="paused"))

    with database.begin() as tx:
        first = jobs.resume(tx, job.id, tenant_id=tenant.tenant_id)
        again = jobs.resume(tx, job.id, tenant_id=tenant.tenant_id)
        told = feed.after(tx, job.id, 1)

    assert first.status == again.status == JobStatus.QUEUED
    assert [(item.code, item.data["reason"]) for item in told] == [
        ("job.queued", "resume_requested")
    ]


def test_resume_leaves_a_running_job_alone(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        claim_job(tx, job)

    with database.begin() as tx:
        resumed = jobs.resume(tx, job.id, tenant_id=tenant.tenant_id)

    assert (resumed.status, resumed.attempt) == (JobStatus.RUNNING, 1)


def test_resume_of_an_ended_job_is_refused(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
        jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)

    with database.begin() as tx, pytest.raises(JobAlreadyFinished, match="been cancelled"):
        jobs.resume(tx, job.id, tenant_id=tenant.tenant_id)


def test_resume_sees_no_job_of_another_tenant(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    other = make_tenant(owner_database)
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(status="paused"))

    with database.begin() as tx, pytest.raises(JobNotFound):
        jobs.resume(tx, job.id, tenant_id=other.tenant_id)


def test_cancel_of_a_job_that_succeeded_is_refused(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        held = claim_job(tx, job)
        attempts.finish(tx, held.holder, artifacts=[], fine_tuned_model="ft:x")

    with database.begin() as tx, pytest.raises(JobAlreadyFinished):
        jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)


def test_the_place_in_the_queue_follows_priority_and_time(
    database: Database, tenant: Tenant
) -> None:
    queue = tenant.slug
    made = []
    for priority in (0, 0, 5):
        with database.begin() as tx:
            made.append(make_job(tx, tenant, queue=queue, priority=priority))

    with database.begin() as tx:
        places = [_place(tx, job) for job in made]
        cancelled = jobs.cancel(tx, made[0].id, tenant_id=tenant.tenant_id)
        moved_up = _place(tx, made[1])

    assert places == [2, 3, 1]
    assert moved_up == 2
    with database.begin() as tx:
        assert _place(tx, cancelled) is None


def _place(tx: Connection, job: Job) -> int | None:
    return tx.scalar(select(jobs.queue_position()).where(models.job.c.id == job.id))


def test_a_file_of_a_waiting_job_cannot_be_deleted(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        file = make_file(tx, tenant)
        job = make_job(tx, tenant, file=file)

        with pytest.raises(FileInUse):
            files.delete(tx, file.id, tenant_id=tenant.tenant_id)
        jobs.cancel(tx, job.id, tenant_id=tenant.tenant_id)

        assert files.delete(tx, file.id, tenant_id=tenant.tenant_id).deleted_at is not None


def test_a_commit_rings_the_dispatcher(
    database: Database, owner_database: Database, tenant: Tenant
) -> None:
    with owner_database.engine.connect() as listener:
        listener.exec_driver_sql("listen trimtab_job")
        listener.commit()
        with database.begin() as tx:
            job = make_job(tx, tenant)

        driver = listener.connection.driver_connection
        assert driver is not None
        heard = [notice.payload for notice in driver.notifies(timeout=5, stop_after=1)]

    assert heard == [str(job.id)]


def test_attempts_and_checkpoints_are_listed_in_order(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        held = claim_job(tx, job)
        for step in (1, 2):
            attempts.checkpoint(
                tx,
                held.holder,
                stored_checkpoint(step),
                ttl=TTL,
            )
        attempts.release(tx, held.holder)

    with database.begin() as tx:
        listed = jobs.attempts(tx, job.id)
        steps = [one.step for one in jobs.checkpoints(tx, job.id)]
        row = tx.execute(select(models.job).where(models.job.c.id == job.id)).one()

    assert [(one.attempt, one.end_reason) for one in listed] == [(1, "worker_stopped")]
    assert steps == [2, 1]
    assert row.started_at - row.created_at < timedelta(seconds=60)
