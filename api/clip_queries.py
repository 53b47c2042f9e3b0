"""Reads of clip statistics and token tables.  Nothing here writes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Integer, cast, func, select, tuple_

from api.queries import Order, Place
from core import models
from core.feed import ClipPass, clip_pass, is_visible
from ppo_engine.histogram import Histogram

ROWS_AT_ONCE = 200
"""Histograms in memory while a wide range is merged."""

TABLE_PATH = r"^tokens/([0-9]{1,9})\.jsonl\.gz$"
"""Paths of token tables; the group is the step."""

_pass = models.clip_pass.c


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRange:
    """Steps, both ends included; None is open."""

    first: int | None
    last: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFilter:
    """Which passes to take; None is all."""

    steps: StepRange
    epoch: int | None
    minibatch: int | None


def clip_places(
    tx: Connection,
    job_id: UUID,
    steps: StepRange,
    *,
    after: int | None,
    limit: int,
    order: Order,
) -> list[Place]:
    """Where visible clip statistics are, by step."""
    step = _pass.step
    conditions = _visible(job_id, steps)
    if after is not None:
        conditions.append(step < after if order == "desc" else step > after)
    rows = tx.execute(
        select(_pass.attempt, step)
        .distinct()
        .where(*conditions)
        .order_by(step.desc() if order == "desc" else step)
        .limit(limit)
    )
    return [(row.attempt, row.step) for row in rows]


def clip_passes_at(
    tx: Connection, job_id: UUID, places: Sequence[Place]
) -> dict[Place, list[ClipPass]]:
    """All passes of some places, by epoch and minibatch."""
    rows = tx.execute(
        select(models.clip_pass)
        .where(_pass.job_id == job_id, tuple_(_pass.attempt, _pass.step).in_(list(places)))
        .order_by(_pass.step, _pass.epoch, _pass.minibatch)
    )
    found: dict[Place, list[ClipPass]] = defaultdict(list)
    for row in rows:
        found[row.attempt, row.step].append(clip_pass(row))
    return found


def passes_per_step(tx: Connection, job_id: UUID, where: PassFilter) -> dict[int, int]:
    """How many visible passes each step has, by step."""
    rows = tx.execute(
        select(_pass.step, func.count())
        .where(*_chosen(job_id, where))
        .group_by(_pass.step)
        .order_by(_pass.step)
    )
    return {step: count for step, count in rows}  # noqa: C416 - a row is no pair for mypy


def histograms(
    tx: Connection, job_id: UUID, where: PassFilter, edges: Sequence[float]
) -> Iterator[tuple[int, Histogram]]:
    """Step and ratios of each visible pass, by step; a few rows are in memory at a time."""
    zeros = _pass["values"]["counts"]["zero_advantage"].as_integer()
    rows = tx.execute(
        select(_pass.step, _pass.histogram, zeros)
        .where(*_chosen(job_id, where))
        .order_by(_pass.step, _pass.epoch, _pass.minibatch)
        .execution_options(yield_per=ROWS_AT_ONCE)
    )
    for step, histogram, zero_advantage_count in rows:
        yield (
            step,
            Histogram.from_bytes(histogram, edges, zero_advantage_count=zero_advantage_count),
        )


def _visible(job_id: UUID, steps: StepRange) -> list[ColumnElement[bool]]:
    conditions = [_pass.job_id == job_id, is_visible(models.clip_pass)]
    conditions += [] if steps.first is None else [_pass.step >= steps.first]
    conditions += [] if steps.last is None else [_pass.step <= steps.last]
    return conditions


def _chosen(job_id: UUID, where: PassFilter) -> list[ColumnElement[bool]]:
    conditions = _visible(job_id, where.steps)
    conditions += [] if where.epoch is None else [_pass.epoch == where.epoch]
    conditions += [] if where.minibatch is None else [_pass.minibatch == where.minibatch]
    return conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTable:
    """Where the tokens of a step's stored samples are."""

    attempt: int
    step: int
    uri: str


def token_table(tx: Connection, job_id: UUID, step: int | None) -> StoredTable | None:
    """The visible token table of a step, or the newest one; None where there is none."""
    artifact = models.artifact.c
    tables = (
        select(
            artifact.job_id,
            artifact.attempt,
            artifact.uri,
            cast(func.substring(artifact.path, TABLE_PATH), Integer).label("step"),
        )
        .where(artifact.job_id == job_id, artifact.path.like("tokens/%"))
        .subquery()
    )
    statement = select(tables.c.attempt, tables.c.step, tables.c.uri).where(
        tables.c.step.is_not(None), is_visible(tables)
    )
    if step is not None:
        statement = statement.where(tables.c.step == step)
    row = tx.execute(statement.order_by(tables.c.step.desc()).limit(1)).one_or_none()
    return None if row is None else StoredTable(attempt=row.attempt, step=row.step, uri=row.uri)
