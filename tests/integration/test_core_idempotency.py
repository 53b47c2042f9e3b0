from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from core import idempotency, models
from core.db import Database
from core.errors import IdempotencyInProgress, IdempotencyKeyReused
from core.idempotency import Repeatable
from tests.factories import Tenant, make_job, make_tenant

ANSWER = {"status": 200, "body": {"id": "ftjob-1"}}


@pytest.fixture
def request_(tenant: Tenant) -> Repeatable:
    return Repeatable(
        tenant_id=tenant.tenant_id,
        caller=tenant.key_id,
        method="POST",
        path="/v1/fine_tuning/jobs",
        query="",
        body_sha256=b"1" * 32,
        key="my-key",
    )


def post(database: Database, request: Repeatable) -> dict[str, object] | None:
    """The replayed answer, or None after doing the work."""
    with database.begin() as tx:
        found = idempotency.replay(tx, request)
        if found is None:
            idempotency.store(tx, request, ANSWER)
    return found


def test_a_repeat_gets_the_stored_answer(database: Database, request_: Repeatable) -> None:
    assert [post(database, request_) for _ in range(3)] == [None, ANSWER, ANSWER]


def test_work_that_was_rolled_back_leaves_no_answer(
    database: Database, request_: Repeatable
) -> None:
    with database.engine.connect() as tx:
        idempotency.replay(tx, request_)
        idempotency.store(tx, request_, ANSWER)
        tx.rollback()

    assert post(database, request_) is None


@pytest.mark.parametrize(
    "change", [{"body_sha256": b"2" * 32}, {"path": "/v1/files"}, {"query": "dry_run=true"}]
)
def test_the_same_key_with_another_request_is_refused(
    database: Database, request_: Repeatable, change: dict[str, object]
) -> None:
    post(database, request_)

    with pytest.raises(IdempotencyKeyReused):
        post(database, replace(request_, **change))


def test_a_key_belongs_to_its_tenant(
    database: Database, owner_database: Database, request_: Repeatable
) -> None:
    other = make_tenant(owner_database)
    post(database, request_)

    theirs = replace(request_, tenant_id=other.tenant_id, caller=other.key_id)

    assert post(database, theirs) is None


def test_while_the_first_request_runs_a_repeat_is_told_to_wait(
    database: Database, request_: Repeatable
) -> None:
    with database.begin() as tx:
        idempotency.replay(tx, request_)
        with pytest.raises(IdempotencyInProgress):
            post(database, request_)
        idempotency.store(tx, request_, ANSWER)

    assert post(database, request_) == ANSWER


def test_twenty_at_once_do_the_work_once(
    database: Database, tenant: Tenant, request_: Repeatable
) -> None:
    def try_once(_: int) -> str:
        try:
            with database.begin() as tx:
                if idempotency.replay(tx, request_) is not None:
                    return "replayed"
                make_job(tx, tenant)
                idempotency.store(tx, request_, ANSWER)
                return "done"
        except IdempotencyInProgress:
            return "in progress"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(try_once, range(20)))

    assert outcomes.count("done") == 1
    with database.begin() as tx:
        made = tx.execute(
            select(func.count()).where(models.job.c.tenant_id == tenant.tenant_id)
        ).scalar_one()
    assert made == 1


def test_an_answer_is_kept_for_a_day(
    database: Database, owner_database: Database, worker_database: Database, request_: Repeatable
) -> None:
    post(database, request_)
    age = models.idempotency.c.created_at - timedelta(hours=25)
    with owner_database.begin() as tx:
        tx.execute(update(models.idempotency).values(created_at=age))

    assert post(database, request_) is None
    assert post(database, request_) == ANSWER
    with owner_database.begin() as tx:
        tx.execute(update(models.idempotency).values(created_at=age))
    with worker_database.begin() as tx:
        assert idempotency.sweep(tx) >= 1
        assert idempotency.sweep(tx) == 0


@pytest.fixture
def bare(request_: Repeatable) -> Repeatable:
    return replace(request_, key=None)


def test_a_retry_without_a_key_finds_the_lost_answer(database: Database, bare: Repeatable) -> None:
    tries = [post(database, replace(bare, retry_count=count)) for count in (0, 1, 2)]

    assert tries == [None, ANSWER, ANSWER]


def test_two_equal_first_requests_are_two_wishes(database: Database, bare: Repeatable) -> None:
    with database.begin() as first, database.begin() as second:
        for tx in (first, second):
            assert idempotency.replay(tx, bare) is None
            idempotency.store(tx, bare, ANSWER)

    assert post(database, bare) is None


def test_a_retry_waits_while_the_first_request_runs(database: Database, bare: Repeatable) -> None:
    with database.begin() as tx:
        idempotency.replay(tx, bare)

        with pytest.raises(IdempotencyInProgress):
            post(database, replace(bare, retry_count=1))
        idempotency.store(tx, bare, ANSWER)

    assert post(database, replace(bare, retry_count=2)) == ANSWER


@pytest.mark.parametrize("change", [{"body_sha256": b"2" * 32}, {"path": "/v1/files"}])
def test_a_retry_of_something_else_is_new(
    database: Database, bare: Repeatable, change: dict[str, object]
) -> None:
    post(database, bare)

    assert post(database, replace(bare, retry_count=1, **change)) is None


def test_a_retry_after_the_window_is_new(
    database: Database, owner_database: Database, bare: Repeatable
) -> None:
    post(database, bare)
    age = models.idempotency.c.created_at - timedelta(minutes=16)
    with owner_database.begin() as tx:
        tx.execute(update(models.idempotency).values(created_at=age))

    assert post(database, replace(bare, retry_count=1)) is None
