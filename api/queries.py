"""Reads that only the API needs, as small frozen values.  Nothing here writes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import merge
from itertools import islice
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, Table, func, select, true, tuple_

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

RESULT_PATHS = (METRICS_PATH, ADAPTER_PATH)
"""Artifacts that OpenAI's `result_files` names, in this order."""

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
    """Ids of `RESULT_PATHS`; empty before they exist."""
    diagnosis: Mapping[str, Any] | None
    """Data of the newest `diagnosis.changed`; None before any."""


def facts_of(tx: Connection, found: Sequence[Job]) -> list[JobFacts]:
    """The facts of each job, in the same order."""
    ids = [job.id for job in found]
    clock: datetime = tx.execute(select(func.now())).scalar_one()
    recent = _recent_metrics(tx, ids)
    resumed = _resumed_from(tx, ids)
    results = _result_files(tx, ids)
    diagnoses = _diagnoses(tx, ids)
    return [
        JobFacts(
            now=clock,
            recent=recent[job.id],
            resumed_from_step=resumed.get((job.id, job.attempt)),
            queue_position=jobs.queue_position(tx, job),
            result_files=results[job.id],
            diagnosis=diagnoses.get(job.id),
        )
        for job in found
    ]


def _recent_metrics(tx: Connection, ids: Sequence[UUID]) -> dict[UUID, list[MetricPoint]]:
    table, job = models.metric, models.job
    last = (
        select(table)
        .where(table.c.job_id == job.c.id, is_visible(table))
        .order_by(table.c.step.desc(), table.c.attempt.desc())
        .limit(RECENT_STEPS)
        .lateral()
    )
    rows = tx.execute(select(last).select_from(job).join(last, true()).where(job.c.id.in_(ids)))
    found: dict[UUID, list[MetricPoint]] = defaultdict(list)
    for row in rows:
        found[row.job_id].append(metric_point(row))
    return found


def _resumed_from(tx: Connection, ids: Sequence[UUID]) -> dict[tuple[UUID, int], int | None]:
    table = models.attempt.c
    rows = tx.execute(
        select(table.job_id, table.attempt, table.resumed_from_step).where(table.job_id.in_(ids))
    )
    return {(row.job_id, row.attempt): row.resumed_from_step for row in rows}


def _result_files(tx: Connection, ids: Sequence[UUID]) -> dict[UUID, list[UUID]]:
    table = models.artifact.c
    rows = tx.execute(
        select(table.job_id, table.path, table.id).where(
            table.job_id.in_(ids), table.path.in_(RESULT_PATHS)
        )
    ).all()
    found: dict[UUID, list[UUID]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: RESULT_PATHS.index(row.path)):
        found[row.job_id].append(row.id)
    return found


def _diagnoses(tx: Connection, ids: Sequence[UUID]) -> dict[UUID, dict[str, Any]]:
    table, job = models.job_event, models.job
    last = (
        select(table.c.job_id, table.c.data)
        .where(table.c.job_id == job.c.id, table.c.code == EventCode.DIAGNOSIS_CHANGED.value)
        .order_by(table.c.seq.desc())
        .limit(1)
        .lateral()
    )
    rows = tx.execute(select(last).select_from(job).join(last, true()).where(job.c.id.in_(ids)))
    return {row.job_id: row.data for row in rows}


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
