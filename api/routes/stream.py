"""The live feed of a job as server-sent events.  The one route that is async."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api.deps import Api, JobsReader
from api.feed_hub import Cursor, FeedHub
from api.feed_stream import FeedResponse, FeedStream, OpenStreams, parse_cursor
from api.openapi import errors_of, query_parameters
from api.query import StreamQuery, query_of
from api.routes.jobs import find_job
from core.rows import Job
from core.states import FINAL

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["jobs"])

_FRAMES = {"text/event-stream": {"schema": {"type": "string"}}}


@router.get(
    "/stream",
    response_class=Response,
    responses={
        **errors_of(404),
        200: {"description": "Frames of JSON", "content": _FRAMES},
        204: {"description": "The client has everything up to the end"},
    },
    openapi_extra=query_parameters(StreamQuery),
)
async def stream_job(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[StreamQuery, Depends(query_of(StreamQuery))],
) -> Response:
    """Everything that happens, each item once and in order; goes on behind `Last-Event-ID`."""

    def read() -> Job:
        with services.stream_database.read() as tx:
            return find_job(tx, job_id, caller)

    job = await anyio.to_thread.run_sync(read, limiter=services.stream_threads)
    after = request.headers.get("last-event-id") or query.after
    cursor = Cursor(0, 0) if not after else parse_cursor(after, job)
    if after and after != "latest" and job.status in FINAL and cursor.seq >= job.last_seq:
        return Response(status_code=204)
    hub: FeedHub = request.app.state.feed_hub
    stream = FeedStream(services, hub, caller, job, cursor=cursor, types=query.types)
    open_streams: OpenStreams = request.app.state.open_streams
    return FeedResponse(stream, open_streams)
