"""What clipping did: step by step, by ratio, and under other ranges."""

from bisect import bisect_left
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from sqlalchemy import Connection
from starlette.responses import Response

from api import clip_schemas, schemas
from api.clip_queries import (
    PassFilter,
    StepRange,
    clip_passes_at,
    clip_places,
    histograms,
    passes_per_step,
)
from api.clip_views import (
    ClipRule,
    MergedPasses,
    clip_view,
    histogram_view,
    rule_of,
    sweep_view,
)
from api.conditions import tagged
from api.deps import Api, JobsReader
from api.errors import ApiError, bad_request
from api.openapi import errors_of, query_parameters
from api.paging import next_link, page
from api.queries import metrics_at
from api.query import ClipQuery, HistogramQuery, PassesQuery, SweepQuery, query_of
from api.routes.jobs import find_job
from api.views import stream_cursor
from core.errors import Fault
from core.ids import public_clip_id
from core.rows import Job
from ppo_engine.histogram import Histogram

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["clip"])

MAX_PASSES = 20_000
"""Passes that one request may merge: a few seconds of work."""

CUSTOMARY_RANGES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.4, 0.5)
"""Ranges to judge where none are asked for; their bounds are edges of every histogram."""

CLIP_HIGHER = (0.2, 0.28)
"""DAPO's unequal bounds (arXiv:2503.14476), judged along with those."""


@router.get(
    "/clip",
    response_model=schemas.FeedPage[clip_schemas.ClipUpdate],
    responses=errors_of(404),
    openapi_extra=query_parameters(ClipQuery),
)
def list_clip_updates(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[ClipQuery, Depends(query_of(ClipQuery))],
) -> Response:
    """Clip statistics of each step, newest first; passes are merged from their sums."""
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        places = clip_places(
            tx,
            job.id,
            StepRange(first=query.from_step, last=query.to_step),
            after=_after_step(job, query.after),
            limit=query.limit + 1,
            order=query.order,
        )
        shown = places[: query.limit]
        passes = clip_passes_at(tx, job.id, shown)
        values = metrics_at(tx, job.id, shown)
    views = [
        clip_view(
            job,
            passes[place],
            values.get(place, {}),
            with_passes=query.detail == "passes",
            with_buckets=query.detail == "buckets",
        )
        for place in shown
    ]
    view = schemas.FeedPage[clip_schemas.ClipUpdate](
        **page(views, has_more=len(places) > query.limit), stream_cursor=stream_cursor(job)
    )
    return tagged(request, view, next_link(request, view))


def _after_step(job: Job, after: str | None) -> int | None:
    """The step in a clip update's id."""
    if after is None:
        return None
    attempt, _, step = after.rpartition("-")[0].rpartition("-")[2], "", after.rpartition("-")[2]
    if not (attempt.isdecimal() and step.isdecimal() and len(step) < 10 and len(attempt) < 10):
        raise _no_such_update(after)
    if public_clip_id(job.id, int(attempt), int(step)) != after:
        raise _no_such_update(after)
    return int(step)


def _no_such_update(after: str) -> ApiError:
    detail = f"after: {after!r} is no clip update of this job"
    return ApiError("invalid_cursor", detail, param="after")


@router.get(
    "/clip/histogram",
    response_model=clip_schemas.ClipHistogram,
    responses=errors_of(404),
    openapi_extra=query_parameters(HistogramQuery),
)
def get_clip_histogram(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[HistogramQuery, Depends(query_of(HistogramQuery))],
) -> Response:
    """How the ratios are spread, by sign of the advantage, over one or more columns of steps."""
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        columns = _merged(tx, job, query, columns=query.columns)
    view = histogram_view(job, columns, epoch=query.epoch, minibatch=query.minibatch)
    return tagged(request, view)


def _merged(tx: Connection, job: Job, query: PassesQuery, *, columns: int) -> list[MergedPasses]:
    """The passes in at most so many columns, whose numbers of steps differ by one at most."""
    where = PassFilter(
        steps=StepRange(first=query.from_step, last=query.to_step),
        epoch=query.epoch,
        minibatch=query.minibatch,
    )
    counts = passes_per_step(tx, job.id, where)
    if sum(counts.values()) > MAX_PASSES:
        raise _too_many(sum(counts.values()))
    steps = list(counts)
    count = min(columns, len(steps))
    ends = [steps[(place + 1) * len(steps) // count - 1] for place in range(count)]
    found: list[MergedPasses | None] = [None] * count
    for step, ratios in histograms(tx, job.id, where, rule_of(job).edges):
        place = bisect_left(ends, step)
        if place < count:  # a step told since the steps were counted is left to the next request
            found[place] = _with(found[place], step, ratios)
    return [each for each in found if each is not None]


def _too_many(passes: int) -> ApiError:
    detail = (
        f"{passes} passes are chosen, more than the {MAX_PASSES} that are merged at once; narrow "
        "them by from_step and to_step, or by epoch and minibatch"
    )
    faults = [Fault(f"/{name}", "invalid_combination", detail) for name in ("from_step", "to_step")]
    return bad_request(faults)


def _with(column: MergedPasses | None, step: int, ratios: Histogram) -> MergedPasses:
    if column is None:
        return MergedPasses(first_step=step, last_step=step, passes=1, ratios=ratios)
    return MergedPasses(
        first_step=column.first_step,
        last_step=step,
        passes=column.passes + 1,
        ratios=column.ratios.merged(ratios),
    )


@router.get(
    "/clip/sweep",
    response_model=clip_schemas.Sweep,
    responses=errors_of(404),
    openapi_extra=query_parameters(SweepQuery),
)
def get_clip_sweep(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[SweepQuery, Depends(query_of(SweepQuery))],
) -> Response:
    """What other clip ranges would have done to the tokens of the recorded passes."""
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        rules = _rules(query, rule_of(job))
        merged = _merged(tx, job, query, columns=1)
    view = sweep_view(
        job,
        merged[0] if merged else None,
        rules,
        epoch=query.epoch,
        minibatch=query.minibatch,
    )
    return tagged(request, view)


def _rules(query: SweepQuery, own: ClipRule) -> list[ClipRule]:
    """The run's own rule and the others to judge, each once."""
    asked = _dual_clip(query, own)
    rules = [
        ClipRule(clip_range=low, clip_range_high=high, dual_clip=asked)
        for low, high in _pairs(query, own)
    ]
    if query.clip_range is not None or query.clip_range_high is not None:
        _check_dual_clip(rules)
    fitting = [rule for rule in rules if _fits(rule)]
    return list(dict.fromkeys([own, *fitting]))


def _dual_clip(query: SweepQuery, own: ClipRule) -> float | None:
    if query.dual_clip is None:
        return own.dual_clip
    return None if query.dual_clip == "off" else query.dual_clip


def _pairs(query: SweepQuery, own: ClipRule) -> list[tuple[float, float]]:
    low, high = query.clip_range, query.clip_range_high
    if low is None and high is None:
        return [*((each, each) for each in CUSTOMARY_RANGES), CLIP_HIGHER]
    if low is None:
        low = [own.clip_range] * len(high or ())
    if high is None:
        high = low
    if len(low) != len(high):
        detail = f"{len(low)} of clip_range and {len(high)} of clip_range_high make no pairs"
        names = ("clip_range", "clip_range_high")
        raise bad_request([Fault(f"/{name}", "invalid_combination", detail) for name in names])
    return list(zip(low, high, strict=True))


def _fits(rule: ClipRule) -> bool:
    return rule.dual_clip is None or rule.dual_clip > 1 + rule.clip_range_high


def _check_dual_clip(rules: list[ClipRule]) -> None:
    worst = next((rule for rule in rules if not _fits(rule)), None)
    if worst is not None:
        detail = (
            f"dual_clip {worst.dual_clip:g} must exceed the upper bound "
            f"{1 + worst.clip_range_high:g}; raise it, or turn it off with dual_clip=off"
        )
        names = ("dual_clip", "clip_range_high")
        raise bad_request([Fault(f"/{name}", "invalid_combination", detail) for name in names])
