"""Reading what a job told: its feed in order, and the curves without what a resume made void."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    Select,
    Table,
    bindparam,
    literal,
    select,
)

from core import models
from core.events import FeedItem

_event = models.job_event.c
_metric = models.metric.c


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPoint:
    """The values of one visible step."""

    attempt: int
    line: int
    seq: int
    step: int
    at: datetime
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPass:
    """The clip statistics of one visible pass."""

    attempt: int
    line: int
    step: int
    epoch: int
    minibatch: int
    values: dict[str, Any]
    histogram: bytes


def after(tx: Connection, job_id: UUID, seq: int, *, limit: int = 500) -> list[FeedItem]:
    """Events and metrics numbered above `seq`, in order and without holes."""
    # The last number first: each read below sees all that is committed by then, and what comes
    # between the reads, which only the second would see, is left to the next call.
    last_seq = tx.execute(_LAST_SEQ, {"job": job_id}).scalar_one_or_none() or 0
    if last_seq <= seq:
        return []
    between = {"job": job_id, "after": seq, "end": min(seq + limit, last_seq)}
    events = tx.execute(_EVENTS, between).all()
    metrics = tx.execute(_METRICS, between).all()
    items = [*map(event_item, events), *map(metric_item, metrics)]
    return sorted(items, key=lambda item: item.seq)


def _between(table: Table) -> Select[Any]:
    is_wanted = (table.c.seq > bindparam("after"), table.c.seq <= bindparam("end"))
    chosen = select(table).where(table.c.job_id == bindparam("job"), *is_wanted)
    return chosen.order_by(table.c.seq)


# Built once: building takes longer than the database's answer.
_LAST_SEQ = select(models.job.c.last_seq).where(models.job.c.id == bindparam("job"))
_EVENTS, _METRICS = _between(models.job_event), _between(models.metric)


def metrics(
    tx: Connection, job_id: UUID, *, from_step: int | None = None, to_step: int | None = None
) -> list[MetricPoint]:
    """The visible values, by step."""
    statement = _visible(models.metric, job_id, from_step, to_step)
    rows = tx.execute(statement.order_by(_metric.step, _metric.attempt, _metric.line)).all()
    return [metric_point(row) for row in rows]


def is_visible(table: FromClause) -> ColumnElement[bool]:
    """Whether a row still counts: no later attempt of its job went on from before its step."""
    later = models.attempt.alias("later")
    return ~(
        select(literal(1))
        .where(
            later.c.job_id == table.c.job_id,
            later.c.attempt > table.c.attempt,
            later.c.resumed_from_step < table.c.step,
        )
        .correlate(table)
        .exists()
    )


def _visible(
    table: FromClause, job_id: UUID, from_step: int | None, to_step: int | None
) -> Select[Any]:
    statement = select(table).where(table.c.job_id == job_id, is_visible(table))
    if from_step is not None:
        statement = statement.where(table.c.step >= from_step)
    if to_step is not None:
        statement = statement.where(table.c.step <= to_step)
    return statement


def event_item(row: Row[Any]) -> FeedItem:
    """A row of `job_event` as a client sees it."""
    return FeedItem(
        job_id=row.job_id,
        seq=row.seq,
        attempt=row.attempt,
        kind="event",
        at=row.at,
        step=row.step,
        data=row.data,
        level=row.level,
        code=row.code,
        message=row.message,
    )


def metric_item(row: Row[Any]) -> FeedItem:
    """A row of `metric` as a client sees it."""
    return FeedItem(
        job_id=row.job_id,
        seq=row.seq,
        attempt=row.attempt,
        kind="metrics",
        at=row.at,
        step=row.step,
        data=row._asdict()["values"],
    )


def metric_point(row: Row[Any]) -> MetricPoint:
    """A row of `metric` as a point of the curves."""
    return MetricPoint(
        attempt=row.attempt,
        line=row.line,
        seq=row.seq,
        step=row.step,
        at=row.at,
        values=row._asdict()["values"],
    )


def clip_pass(row: Row[Any]) -> ClipPass:
    """A row of `clip_pass`."""
    return ClipPass(
        attempt=row.attempt,
        line=row.line,
        step=row.step,
        epoch=row.epoch,
        minibatch=row.minibatch,
        values=row._asdict()["values"],
        histogram=row.histogram,
    )
