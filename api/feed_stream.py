"""The live feed of a job: Postgres holds it, Redis makes it fast.

Items are numbered without holes, so the reader sees by itself what Redis lacks (trimmed, lost,
wiped, never written) and takes it from Postgres.  A wiped Redis costs latency, never an item.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import anyio.to_thread
import structlog
from redis.exceptions import RedisError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api import schemas
from api.deps import Services
from api.errors import ApiError
from api.queries import facts_of
from api.views import job_view, stream_cursor
from core import feed, jobs, keys
from core.dispatch import feed_key
from core.errors import DatabaseUnavailable
from core.events import FeedItem, feed_payload
from core.keys import Caller
from core.rows import Job
from core.states import FINAL, JobStatus

PAGE = 500
"""Items read from Postgres at once."""
POLL_SECONDS = 2.0
"""How often Postgres is asked for what Redis did not bring."""
BLOCK_MILLISECONDS = 500
"""How long Redis is waited for before the stream looks at its clocks."""
RETRY_MILLISECONDS = 2000
"""What an `EventSource` waits before it comes back."""
HEARTBEAT = b": hb\n"
"""One line and no blank one: the `openai` client takes every blank line for a frame."""
DONE = b"data: [DONE]\n\n"

_FEED_ID = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")

Result = TypeVar("Result")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last item told: attempt and number."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"


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


class FeedResponse(StreamingResponse):
    """A stream that is counted as long as it is open."""

    def __init__(self, stream: "FeedStream", open_streams: OpenStreams) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(stream.frames(), headers=headers, media_type="text/event-stream")
        self._tenant_id = stream.caller.tenant_id
        self._open_streams = open_streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all frames."""
        self._open_streams.enter(self._tenant_id)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._open_streams.leave(self._tenant_id)


class FeedStream:
    """The frames that one client reads."""

    def __init__(
        self,
        services: Services,
        caller: Caller,
        job: Job,
        *,
        cursor: Cursor,
        types: Collection[str] | None,
    ) -> None:
        self.caller = caller
        self._services = services
        self._job = job
        self._cursor = cursor
        self._types = types
        self._told_status: JobStatus | None = None
        self._has_sent = False
        now = time.monotonic()
        self._sent_at = self._key_checked_at = now
        self._ends_at = now + services.settings.stream_seconds

    async def frames(self) -> AsyncIterator[bytes]:
        """Snapshot, history behind the cursor, then what happens, up to the end."""
        yield await self._status_frame()
        while await self._goes_on():
            items = await self._from_postgres()
            for item in items:
                if frame := self._take(item.seq, item.attempt, feed_payload(item)):
                    yield frame
            if len(items) == PAGE:
                continue
            if self._job.status in FINAL and self._cursor.seq >= self._job.last_seq:
                yield await self._end_frame()
                yield DONE
                return
            if self._job.status != self._told_status:
                yield await self._status_frame()
            async for frame in self._from_redis():
                yield frame

    async def _goes_on(self) -> bool:
        """Whether neither the server, nor the hour, nor the key has ended."""
        now = time.monotonic()
        if self._services.stopping.is_set() or now > self._ends_at:
            return False
        if now - self._key_checked_at < self._services.settings.key_check_seconds:
            return True
        self._key_checked_at = now
        return await self._in_thread(self._has_live_key)

    def _has_live_key(self) -> bool:
        try:
            with self._services.stream_database.begin() as tx:
                return keys.is_live(tx, self.caller.key_id)
        except DatabaseUnavailable:
            return True  # asked again at the next check

    async def _from_postgres(self) -> list[FeedItem]:
        """What is stored behind the cursor, and the job as it is; nothing while it is away."""
        return await self._in_thread(self._read_items)

    def _read_items(self) -> list[FeedItem]:
        try:
            with self._services.stream_database.begin() as tx:
                # The job first: what it counts is then surely among the items or still to come.
                self._job = jobs.get(tx, self._job.id, tenant_id=self.caller.tenant_id)
                return feed.after(tx, self._job.id, self._cursor.seq, limit=PAGE)
        except DatabaseUnavailable:
            log.warning("stream.database_unavailable")
            return []

    async def _from_redis(self) -> AsyncIterator[bytes]:
        """News until Postgres has to be asked: after a while, at a hole, at a change of state."""
        until = time.monotonic() + POLL_SECONDS
        while time.monotonic() < until and not self._services.stopping.is_set():
            for entry in await self._read_redis():
                seq, attempt = entry["seq"], entry["attempt"]
                if seq > self._cursor.seq + 1:
                    return
                if seq == self._cursor.seq + 1:
                    if frame := self._take(seq, attempt, entry):
                        yield frame
                    if "to" in entry.get("data", {}):
                        return
            if time.monotonic() - self._sent_at > self._services.settings.heartbeat_seconds:
                self._sent_at = time.monotonic()
                yield HEARTBEAT

    async def _read_redis(self) -> list[dict[str, Any]]:
        """Entries behind the cursor; nothing, a little later, while Redis is away."""
        key = feed_key(self._job.id)
        try:
            answer: Any = await self._services.redis.xread(
                {key: str(self._cursor)}, count=PAGE, block=BLOCK_MILLISECONDS
            )
        except (RedisError, OSError):
            await asyncio.sleep(BLOCK_MILLISECONDS / 1000)
            return []
        streams = answer.values() if isinstance(answer, dict) else [part[1] for part in answer]
        return [json.loads(fields[b"item"]) for entries in streams for _, fields in entries]

    def _take(self, seq: int, attempt: int, payload: dict[str, Any]) -> bytes | None:
        """Move on to this item; its frame, if the client wants its type."""
        self._cursor = Cursor(attempt, seq)
        return self._frame(payload, frame_id=str(self._cursor))

    async def _status_frame(self) -> bytes:
        """The job as it is; carries no id, so a client never resumes behind it."""
        view = await self._in_thread(self._read_view)
        self._told_status = view.status
        payload = {"type": "status", "id": None, "job": view.model_dump(mode="json")}
        return self._frame(payload) or b""

    async def _end_frame(self) -> bytes:
        view = await self._in_thread(self._read_view)
        frame_id = stream_cursor(self._job)
        payload = {"type": "end", "id": frame_id, "job": view.model_dump(mode="json")}
        return self._frame(payload, frame_id=frame_id) or b""

    def _read_view(self) -> schemas.Job:
        with self._services.stream_database.begin() as tx:
            job = jobs.get(tx, self._job.id, tenant_id=self.caller.tenant_id)
            (facts,) = facts_of(tx, [job])
        return job_view(job, facts, organization=self.caller.tenant_slug)

    def _frame(self, payload: dict[str, Any], *, frame_id: str | None = None) -> bytes | None:
        """One frame; the first also tells when to come back after a cut."""
        if self._types and payload["type"] not in (*self._types, "end"):
            return None
        retry = "" if self._has_sent else f"retry: {RETRY_MILLISECONDS}\n"
        self._has_sent = True
        self._sent_at = time.monotonic()
        name = "" if frame_id is None else f"id: {frame_id}\n"
        text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return f"{retry}{name}data: {text}\n\n".encode()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await anyio.to_thread.run_sync(work, limiter=self._services.stream_threads)
