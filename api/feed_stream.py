"""The live feed of a job as one client reads it: history from Postgres, then what the hub tells."""

import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TypeVar
from uuid import UUID

import anyio
import structlog
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api import schemas
from api.deps import Services
from api.errors import ApiError
from api.feed_hub import (
    END,
    PAGE,
    PAUSE_SECONDS,
    SLOW,
    Cursor,
    FeedHub,
    Frame,
    Subscription,
    Topic,
    end_frame,
    item_frame,
    status_frame,
)
from api.queries import facts_of
from api.views import job_view
from core import feed, jobs
from core.errors import DatabaseUnavailable
from core.events import FeedItem, feed_payload
from core.ids import public_job_id
from core.keys import Caller
from core.rows import Job
from core.states import FINAL, JobStatus

RETRY = b"retry: 2000\n"
"""What an `EventSource` waits before it comes back; rides in the first frame."""
HEARTBEAT = Frame(type="heartbeat", text=b": hb\n")
"""One line and no blank one: the `openai` client takes every blank line for a frame."""
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")

_FEED_ID = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")

log = structlog.get_logger()


def parse_cursor(text: str, job: Job) -> Cursor:
    """Where a client stopped; `latest` is the present end."""
    if text == "latest":
        return Cursor(job.attempt, job.last_seq)
    match = _FEED_ID.fullmatch(text)
    if match is None or int(match[2]) > job.last_seq:
        raise ApiError("invalid_cursor", f"{text!r} is no id of this stream.", param="after")
    return Cursor(int(match[1]), int(match[2]))


class OpenStreams:
    """Counts the open streams of each tenant; lives on the event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: Counter[UUID] = Counter()

    def enter(self, tenant_id: UUID) -> None:
        """Count one more; too_many_streams at the limit."""
        if self._open[tenant_id] >= self._limit:
            raise ApiError(
                "too_many_streams", f"There are {self._limit} open streams; close one first."
            )
        self._open[tenant_id] += 1

    def leave(self, tenant_id: UUID) -> None:
        """Count one less."""
        self._open[tenant_id] -= 1

    def total(self) -> int:
        """All streams that are open now."""
        return self._open.total()


class FeedResponse(StreamingResponse):
    """A stream that is counted as long as it is open, and cut off when its client is too slow."""

    def __init__(self, stream: "FeedStream", open_streams: OpenStreams) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(stream.frames(), headers=headers, media_type="text/event-stream")
        self._stream = stream
        self._open_streams = open_streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all frames; a client that does not read cannot keep this waiting."""
        tenant_id = self._stream.caller.tenant_id
        self._open_streams.enter(tenant_id)
        try:
            with self._stream.sending:
                await super().__call__(scope, receive, send)
        finally:
            self._stream.leave()
            self._open_streams.leave(tenant_id)


class FeedStream:
    """The frames that one client reads."""

    def __init__(
        self,
        services: Services,
        hub: FeedHub,
        caller: Caller,
        job: Job,
        *,
        cursor: Cursor,
        types: Collection[str] | None,
    ) -> None:
        self.caller = caller
        self.sending = anyio.CancelScope()
        """Around the sending of frames; cancelled when the client falls too far behind."""
        self._services = services
        self._hub = hub
        self._job = job
        self._cursor = cursor
        self._types = types
        self._told_status: JobStatus | None = None
        self._subscription: Subscription | None = None
        self._has_sent = False
        self._sent_at = time.monotonic()
        self._ends_at = self._sent_at + services.settings.stream_seconds

    async def frames(self) -> AsyncIterator[bytes]:
        """Snapshot, history behind the cursor, then what happens, up to the end."""
        async for frame in self._frames():
            if text := self._text(frame):
                yield text
            if frame.is_end:
                yield DONE
                return

    def leave(self) -> None:
        """Hear no more from the hub."""
        if self._subscription is not None:
            self._hub.leave(self._subscription)
            self._subscription = None

    async def _frames(self) -> AsyncIterator[Frame]:
        if status := await self._status():
            yield status
        while self._goes_on():
            async for frame in self._history():
                yield frame
            if not (joined := await self._join()):
                continue
            # What was stored before the hub took this client on; what both bring is dropped below.
            if self._is_behind(joined.topic):
                async for frame in self._history():
                    yield frame
            async for frame in self._news(joined):
                yield frame
            return

    async def _history(self) -> AsyncIterator[Frame]:
        """What is stored behind the cursor, page by page, and the state that it leads to."""
        while (items := await self._read(self._read_items)) is not None:
            for item in items:
                yield item_frame(Cursor(item.attempt, item.seq), feed_payload(item))
            if len(items) < PAGE:
                break
        if self._job.status not in FINAL:
            if self._job.status != self._told_status and (status := await self._status()):
                yield status
        elif self._cursor.seq >= self._job.last_seq and (view := await self._read(self._read_view)):
            yield end_frame(view, self._job)

    def _is_behind(self, topic: Topic) -> bool:
        """Whether the hub has told others what this client has not heard; the rest will be told."""
        return topic.cursor.seq > self._cursor.seq or topic.told_status != self._told_status

    async def _join(self) -> Subscription | None:
        """A place in the hub; None if the job has ended, or the process is about to."""

        async def join() -> Subscription | None:
            return await self._hub.join(self._job.id, self.caller, self._on_close)

        self._subscription = await self._asked(join)
        return self._subscription

    async def _news(self, subscription: Subscription) -> AsyncIterator[Frame]:
        """What the hub tells, and a sign of life in between."""
        heartbeat_seconds = self._services.settings.heartbeat_seconds
        while self._goes_on() and subscription.closed is None:
            silence = time.monotonic() - self._sent_at
            frame = await subscription.next(max(0.0, heartbeat_seconds - silence))
            if frame is None and subscription.closed is None:
                yield HEARTBEAT
            elif frame is not None and not self._has_told(frame):
                yield frame

    def _has_told(self, frame: Frame) -> bool:
        return frame.cursor is not None and frame.cursor.seq <= self._cursor.seq

    def _on_close(self, reason: str) -> None:
        """Cut the connection of a client that does not read; the others end by themselves."""
        log.info("stream.closed", reason=reason, job_id=public_job_id(self._job.id))
        if reason == SLOW:
            self.sending.cancel()

    def _goes_on(self) -> bool:
        """Whether neither the server nor the longest life of a stream has ended."""
        return not self._services.stopping.is_set() and time.monotonic() < self._ends_at

    async def _status(self) -> Frame | None:
        view = await self._read(self._read_view)
        if view is None:
            return None
        self._told_status = JobStatus(view.status)
        return status_frame(view)

    def _read_items(self) -> list[FeedItem]:
        with self._services.stream_database.read() as tx:
            # The job first: what it counts is then surely among the items or still to come.
            self._job = jobs.get(tx, self._job.id, tenant_id=self.caller.tenant_id)
            return feed.after(tx, self._job.id, self._cursor.seq, limit=PAGE)

    def _read_view(self) -> schemas.Job:
        with self._services.stream_database.read() as tx:
            job = jobs.get(tx, self._job.id, tenant_id=self.caller.tenant_id)
            (facts,) = facts_of(tx, [job])
        return job_view(job, facts, organization=self.caller.tenant_slug)

    async def _read(self, work: Callable[[], Result]) -> Result | None:
        """What Postgres says, asked until it answers; None once the stream has to end."""
        return await self._asked(lambda: self._hub.in_thread(work))

    async def _asked(self, question: Callable[[], Awaitable[Result]]) -> Result | None:
        while self._goes_on():
            try:
                return await question()
            except DatabaseUnavailable:
                log.warning("stream.database_unavailable")
                await anyio.sleep(PAUSE_SECONDS)
        return None

    def _text(self, frame: Frame) -> bytes | None:
        """What is sent, if the client wants its type; the first also says when to come back."""
        if frame.cursor is not None:
            self._cursor = frame.cursor
        if self._types and frame.type not in (*self._types, END, HEARTBEAT.type):
            return None
        self._sent_at = time.monotonic()
        if self._has_sent or frame is HEARTBEAT:
            return frame.text
        self._has_sent = True
        return RETRY + frame.text
