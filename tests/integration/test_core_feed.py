"""The feed of a job, read while others write to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, event

from core import attempts, feed
from core.db import Database
from core.events import EventCode, NewEvent, Report
from core.states import Phase
from tests.factories import TTL, Tenant, claim_job, make_job, metric


@contextmanager
def after_reading_events(
    reader: Connection | Engine, write: Callable[[], object]
) -> Iterator[None]:
    """Write once, right after the first statement that reads events."""
    writes = [write]

    def after_statement(*arguments: Any) -> None:
        if "FROM job_event" in arguments[2] and writes:
            writes.pop()()

    event.listen(reader, "after_cursor_execute", after_statement)
    try:
        yield
    finally:
        event.remove(reader, "after_cursor_execute", after_statement)


def test_the_feed_goes_on_in_pages(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        holder = claim_job(tx, job).holder
        report = Report(items=tuple(metric(step, step) for step in range(1, 5)))
        attempts.heartbeat(tx, holder, ttl=TTL, phase=Phase.TRAINING, report=report)

    with database.begin() as tx:
        onwards = [item.seq for item in feed.after(tx, job.id, 2, limit=2)]

    assert onwards == [3, 4]


def test_what_is_committed_between_two_reads_is_not_passed_over(
    database: Database, worker_database: Database, tenant: Tenant
) -> None:
    """An event and the metrics behind it: a reader may see neither, but never only the later."""
    with database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        holder = claim_job(tx, job).holder
    news = NewEvent(code=EventCode.SELF_CHECK_PASSED, message="fine", step=1, line=1)
    report = Report(items=(news, metric(2, 1)))

    def tell() -> None:
        with worker_database.begin() as tx:
            attempts.heartbeat(tx, holder, ttl=TTL, phase=Phase.TRAINING, report=report)

    with database.begin() as tx, after_reading_events(tx, tell):
        first = [item.seq for item in feed.after(tx, job.id, 0)]
    with database.begin() as tx:
        rest = [item.seq for item in feed.after(tx, job.id, first[-1])]

    assert first == [1, 2]
    assert rest == [3, 4]
