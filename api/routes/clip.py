"""What clipping did, step by step."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api import schemas
from api.conditions import tagged
from api.deps import Api, JobsReader
from api.errors import ApiError
from api.openapi import errors_of, query_parameters
from api.paging import next_link, page
from api.queries import StepRange, clip_passes_at, clip_places
from api.query import ClipQuery, query_of
from api.routes.jobs import find_job
from api.views import clip_view, stream_cursor
from core.ids import public_clip_id
from core.rows import Job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["clip"])


@router.get(
    "/clip",
    response_model=schemas.FeedPage[schemas.ClipUpdate],
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
        passes = clip_passes_at(tx, job.id, places[: query.limit])
    views = [
        clip_view(job, passes[place], with_passes=query.detail == "passes")
        for place in places[: query.limit]
    ]
    view = schemas.FeedPage[schemas.ClipUpdate](
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
