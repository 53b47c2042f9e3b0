"""The one place where event, metric and clip rows are inserted, with numbers already drawn.

A caller draws the numbers by adding to `job.last_seq` in the UPDATE that changes the job: the row
lock makes number order commit order, and a rollback gives the numbers back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, insert, select

from core import models
from core.db import now
from core.events import FeedItem, NewClipPass, NewEvent, NewMetric

# Built once: building takes longer than the database's answer.
_NOW = select(now())
_INSERT_EVENT = insert(models.job_event)
_INSERT_METRIC = insert(models.metric)
_INSERT_PASS = insert(models.clip_pass)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Whose rows they are, and the number the first one gets."""

    job_id: UUID
    tenant_id: UUID
    attempt: int
    first_seq: int


def write_items(
    tx: Connection, place: Place, items: Sequence[NewEvent | NewMetric]
) -> list[FeedItem]:
    """Insert the items, numbered in their order; what readers will see of them."""
    if not items:
        return []
    at = tx.execute(_NOW).scalar_one()
    feed = [
        _feed_item(place, place.first_seq + index, item, at) for index, item in enumerate(items)
    ]
    lines = [item.line for item in items]
    _insert_events(tx, place, [item for item in feed if item.kind == "event"])
    _insert_metrics(tx, place, list(zip(feed, lines, strict=True)))
    return feed


def write_passes(tx: Connection, place: Place, passes: Sequence[NewClipPass]) -> None:
    """Insert clip statistics; they carry no number."""
    if not passes:
        return
    rows = [
        {
            "job_id": place.job_id,
            "attempt": place.attempt,
            "line": one.line,
            "epoch": one.epoch,
            "minibatch": one.minibatch,
            "tenant_id": place.tenant_id,
            "step": one.step,
            "values": _storable(one.values),
            "histogram": one.histogram,
        }
        for one in passes
    ]
    tx.execute(_INSERT_PASS, rows)


def _feed_item(place: Place, seq: int, item: NewEvent | NewMetric, at: datetime) -> FeedItem:
    if isinstance(item, NewMetric):
        return FeedItem(
            job_id=place.job_id,
            seq=seq,
            attempt=place.attempt,
            kind="metrics",
            at=item.at,
            step=item.step,
            data=_storable(item.values),
        )
    return FeedItem(
        job_id=place.job_id,
        seq=seq,
        attempt=place.attempt,
        kind="event",
        at=at,
        step=item.step,
        data=_storable(item.data),
        level=item.level,
        code=item.code.value,
        message=_storable(item.message),
    )


def _storable(value: Any) -> Any:
    """The same without what Postgres cannot hold: NUL and half of a surrogate pair."""
    if isinstance(value, str):
        return value.replace("\x00", "").encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_storable(str(name)): _storable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _insert_events(tx: Connection, place: Place, feed: Sequence[FeedItem]) -> None:
    rows = [
        {
            "job_id": place.job_id,
            "seq": item.seq,
            "tenant_id": place.tenant_id,
            "attempt": place.attempt,
            "level": item.level,
            "code": item.code,
            "step": item.step,
            "message": item.message,
            "data": item.data,
        }
        for item in feed
    ]
    if rows:
        tx.execute(_INSERT_EVENT, rows)


def _insert_metrics(
    tx: Connection, place: Place, feed: Sequence[tuple[FeedItem, int | None]]
) -> None:
    rows = [
        {
            "job_id": place.job_id,
            "attempt": place.attempt,
            "line": line,
            "tenant_id": place.tenant_id,
            "seq": item.seq,
            "step": item.step,
            "at": item.at,
            "values": item.data,
        }
        for item, line in feed
        if item.kind == "metrics"
    ]
    if rows:
        tx.execute(_INSERT_METRIC, rows)
