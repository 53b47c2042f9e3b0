"""Reads that only the API needs, as small frozen values.  Nothing here writes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import merge
from itertools import islice
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    ScalarSelect,
    Select,
    Table,
    Uuid,
    any_,
    bindparam,
    func,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY

from core import jobs, models
from core.artifacts import ADAPTER_PATH, METRICS_PATH
from core.events import EventCode, FeedItem
from core.feed import (
    MetricPoint,
    event_item,
    is_visible,
    metric_item,
    metric_point,
)
from core.rows import Job, job_of
from core.states import JobStatus

RECENT_STEPS = 6
"""Steps from which the present speed is read."""

Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the job's own row does not say."""

    now: datetime
    """The database's clock."""
    recent: Sequence[MetricPoint]
    """The last visible steps, newest first."""
    resumed_from_step: int | None
    queue_position: int | None
    result_files: Sequence[UUID]
    """Ids of the metrics and of the adapter, as far as they exist: OpenAI's `result_files`."""
    diagnosis: Mapping[str, Any] | None
    """Data of the newest `diagnosis.changed`; None before any."""


def facts_of(tx: Connection, found: Sequence[Job]) -> list[JobFacts]:
    """The facts of each job, in the same order."""
    ids = {"ids": [job.id for job in found]}
    facts = {row.id: row for row in tx.execute(_FACTS, ids)}
    recent: dict[UUID, list[MetricPoint]] = defaultdict(list)
    if any(job.attempt for job in found):  # before its first attempt a job has no metrics
        for row in tx.execute(_RECENT, ids):
            recent[row.job_id].append(metric_point(row))
    return [_facts(facts[job.id], recent[job.id]) for job in found]


def _facts(row: Row[Any], recent: Sequence[MetricPoint]) -> JobFacts:
    return JobFacts(
        now=row.now,
        recent=recent,
        resumed_from_step=row.resumed_from_step,
        queue_position=row.queue_position,
        result_files=[one for one in (row.metrics_file, row.adapter_file) if one is not None],
        diagnosis=row.diagnosis,
    )


# Statements of the busiest reads are built once: building takes longer than the database's answer.
_IDS = bindparam("ids", type_=ARRAY(Uuid))


def _facts_statement() -> Select[Any]:
    job, attempt, event = models.job.c, models.attempt.c, models.job_event.c
    resumed = select(attempt.resumed_from_step).where(
        attempt.job_id == job.id, attempt.attempt == job.attempt
    )
    diagnosis = (
        select(event.data)
        .where(event.job_id == job.id, event.code == EventCode.DIAGNOSIS_CHANGED.value)
        .order_by(event.seq.desc())
        .limit(1)
    )
    return select(
        job.id,
        func.now().label("now"),
        resumed.scalar_subquery().label("resumed_from_step"),
        jobs.queue_position().label("queue_position"),
        _result_file(METRICS_PATH).label("metrics_file"),
        _result_file(ADAPTER_PATH).label("adapter_file"),
        diagnosis.scalar_subquery().label("diagnosis"),
    ).where(job.id == any_(_IDS))


def _result_file(path: str) -> ScalarSelect[UUID]:
    artifact = models.artifact.c
    return (
        select(artifact.id)
        .where(artifact.job_id == models.job.c.id, artifact.path == path)
        .scalar_subquery()
    )


def _recent_statement() -> Select[Any]:
    table, job = models.metric, models.job
    last = (
        select(table)
        .where(table.c.job_id == job.c.id, is_visible(table))
        .order_by(table.c.step.desc(), table.c.attempt.desc())
        .limit(RECENT_STEPS)
        .lateral()
    )
    return select(last).select_from(job).join(last, true()).where(job.c.id == any_(_IDS))


_FACTS = _facts_statement()
_RECENT = _recent_statement()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedFilter:
    """Which items of a feed to list."""

    type: Literal["message", "metrics"] | None = None
    level: str | None = None
    code: str | None = None


def feed_page(
    tx: Connection,
    job: Job,
    *,
    after: int | None,
    limit: int,
    order: Order,
    where: FeedFilter,
) -> list[FeedItem]:
    """Events and metrics of a job by number, beginning behind `after`.

    The job is as the same transaction read it; what came later is left to a later page, since the
    second of the two reads would see more of it than the first.
    """
    events, metrics = models.job_event, models.metric
    conditions = [events.c.job_id == job.id, events.c.seq <= job.last_seq]
    conditions += [events.c.level == where.level] if where.level else []
    conditions += [events.c.code == where.code] if where.code else []
    found: list[list[FeedItem]] = []
    if where.type != "metrics":
        rows = _by_seq(tx, events, conditions, after=after, limit=limit, order=order)
        found.append([event_item(row) for row in rows])
    if where.type != "message" and where.code is None and where.level in (None, "info"):
        conditions = [metrics.c.job_id == job.id, metrics.c.seq <= job.last_seq]
        rows = _by_seq(tx, metrics, conditions, after=after, limit=limit, order=order)
        found.append([metric_item(row) for row in rows])
    ordered = merge(*found, key=lambda item: item.seq, reverse=order == "desc")
    return list(islice(ordered, limit))


def _by_seq(
    tx: Connection,
    table: Table,
    conditions: Sequence[ColumnElement[bool]],
    *,
    after: int | None,
    limit: int,
    order: Order,
) -> Sequence[Row[Any]]:
    seq = table.c.seq
    statement = select(table).where(*conditions).limit(limit)
    if after is not None:
        statement = statement.where(seq < after if order == "desc" else seq > after)
    return tx.execute(statement.order_by(seq.desc() if order == "desc" else seq)).all()


Place = tuple[int, int]
"""(attempt, step)."""


def metrics_at(
    tx: Connection, job_id: UUID, places: Iterable[Place]
) -> dict[Place, dict[str, float | None]]:
    """The values at some places, hidden ones too."""
    table = models.metric.c
    rows = tx.execute(
        select(table.attempt, table.step, table["values"]).where(
            table.job_id == job_id, tuple_(table.attempt, table.step).in_(list(places))
        )
    )
    return {(attempt, step): values for attempt, step, values in rows}


def first_and_last_metrics(
    tx: Connection, job_id: UUID, *, first: int, last: int, to_step: int | None
) -> list[MetricPoint]:
    """The visible values of the run's first steps and of the last ones up to a step, by step."""
    table = models.metric
    conditions = [table.c.job_id == job_id, is_visible(table)]
    conditions += [] if to_step is None else [table.c.step <= to_step]
    chosen = select(table).where(*conditions)
    rows = [
        *tx.execute(chosen.order_by(table.c.step).limit(first)),
        *tx.execute(chosen.order_by(table.c.step.desc()).limit(last)),
    ]
    points = {point.step: point for point in map(metric_point, rows)}
    return [points[step] for step in sorted(points)]


def fine_tuned_jobs(tx: Connection, tenant_id: UUID) -> list[Job]:
    """The tenant's jobs that made a model, newest first."""
    table = models.job
    rows = tx.execute(
        select(table)
        .where(table.c.tenant_id == tenant_id, table.c.status == JobStatus.SUCCEEDED)
        .where(table.c.fine_tuned_model.is_not(None))
        .order_by(table.c.created_at.desc(), table.c.id.desc())
    )
    return [job_of(row._asdict()) for row in rows]
