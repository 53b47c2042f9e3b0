from core import attempts, feed, jobs
from core.db import Database
from core.states import JobStatus
from tests.factories import Tenant, claim_job, make_job


def test_a_new_job_is_queued_with_its_first_event(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)

        items = feed.after(tx, job.id, 0)

    assert job.status == JobStatus.QUEUED
    assert [(item.seq, item.code, item.id) for item in items] == [(1, "job.created", "0-1")]
