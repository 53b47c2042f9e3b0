"""What a job told: events, checkpoints, metrics."""

import csv
import io
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api import schemas
from api.conditions import tagged
from api.deps import Api, JobsReader
from api.errors import ApiError
from api.openapi import errors_of, query_parameters
from api.paging import next_link, page
from api.queries import FeedFilter, feed_page, metrics_at
from api.query import CheckpointsQuery, EventsQuery, MetricsQuery, query_of
from api.routes.jobs import find_job
from api.views import checkpoint_view, event_view, metrics_view, stream_cursor
from core import feed, jobs
from core.errors import CheckpointNotFound
from core.ids import checkpoint_of, event_seq_of
from core.rows import Checkpoint, Job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["jobs"])


@router.get(
    "/events",
    response_model=schemas.FeedPage[schemas.Event],
    responses=errors_of(404),
    openapi_extra=query_parameters(EventsQuery),
)
def list_events(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[EventsQuery, Depends(query_of(EventsQuery))],
) -> Response:
    """What happened, newest first; figures of each step are events of type `metrics`."""
    with services.database.read() as tx:
        job = find_job(tx, job_id, caller)
        items = feed_page(
            tx,
            job,
            after=_after_event(job, query.after),
            limit=query.limit + 1,
            order=query.order,
            where=FeedFilter(type=query.type, level=query.level, code=query.code),
        )
    views = [event_view(item, total_steps=job.total_steps) for item in items[: query.limit]]
    view = schemas.FeedPage[schemas.Event](
        **page(views, has_more=len(items) > query.limit), stream_cursor=stream_cursor(job)
    )
    return tagged(request, view, next_link(request, view))


def _after_event(job: Job, after: str | None) -> int | None:
    if after is None:
        return None
    seq = event_seq_of(after, job.id)
    if seq is None:
        raise ApiError("invalid_cursor", f"after: {after!r} is no event of this job", param="after")
    return seq


@router.get(
    "/checkpoints",
    response_model=schemas.FeedPage[schemas.Checkpoint],
    responses=errors_of(404),
    openapi_extra=query_parameters(CheckpointsQuery),
)
def list_checkpoints(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[CheckpointsQuery, Depends(query_of(CheckpointsQuery))],
) -> Response:
    """Stored states of the training, newest first."""
    with services.database.read() as tx:
        job = find_job(tx, job_id, caller)
        found = jobs.checkpoints(tx, job.id)
        ordered = found if query.order == "desc" else found[::-1]
        rest = ordered[_place_after(job, ordered, query.after) :]
        shown = rest[: query.limit]
        values = metrics_at(tx, job.id, [(each.attempt, each.step) for each in shown])
    views = [
        checkpoint_view(each, values.get((each.attempt, each.step), {}), model=_model_name(job))
        for each in shown
    ]
    view = schemas.FeedPage[schemas.Checkpoint](
        **page(views, has_more=len(rest) > query.limit), stream_cursor=stream_cursor(job)
    )
    return tagged(request, view, next_link(request, view))


def _place_after(job: Job, ordered: Sequence[Checkpoint], after: str | None) -> int:
    """Index of the first checkpoint behind `after`."""
    if after is None:
        return 0
    try:
        wanted = checkpoint_of(after)
        places = [(job.id, each.attempt, each.step) for each in ordered]
        return places.index(wanted) + 1
    except (CheckpointNotFound, ValueError):
        detail = f"after: {after!r} is no checkpoint of this job"
        raise ApiError("invalid_cursor", detail, param="after") from None


def _model_name(job: Job) -> str:
    return job.fine_tuned_model or f"ft:{job.model}"


@router.get(
    "/metrics",
    response_model=schemas.Metrics,
    responses={
        **errors_of(404),
        200: {"content": {"text/csv": {"schema": {"type": "string"}}}},
    },
    openapi_extra=query_parameters(MetricsQuery),
)
def get_metrics(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[MetricsQuery, Depends(query_of(MetricsQuery))],
) -> Response:
    """Curves in columns, without what a resume replaced."""
    with services.database.read() as tx:
        job = find_job(tx, job_id, caller)
        rows = feed.metrics(tx, job.id, from_step=query.from_step, to_step=query.to_step)
        attempts = jobs.attempts(tx, job.id)
    view = metrics_view(job, rows, attempts, names=query.names or (), max_points=query.max_points)
    return _csv(view) if query.format == "csv" else tagged(request, view)


def _csv(view: schemas.Metrics) -> Response:
    """One row per step; an empty field where the step has no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *view.series])
    writer.writerows(zip(view.steps, *view.series.values(), strict=True))
    headers = {"Content-Disposition": f'attachment; filename="{view.job_id}-metrics.csv"'}
    return Response(text.getvalue(), headers=headers, media_type="text/csv; charset=utf-8")
