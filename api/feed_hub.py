"""One reader of all watched feeds, for all streams of the process.

Redis brings news fast and may lack any of them (trimmed, lost, wiped, never written); items are
numbered without holes, so the hub sees what is missing and takes it from Postgres, for all clients
at once.  One query every few seconds finds what Redis never heard of.  Frames are encoded once.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import anyio.to_thread
import structlog
from redis.exceptions import RedisError
from sqlalchemy import select

from api import schemas
from api.deps import Services
from api.queries import facts_of
from api.views import job_view, stream_cursor
from core import feed, jobs, keys, models
from core.dispatch import feed_key
from core.errors import DatabaseUnavailable, NotFound
from core.events import FeedItem, feed_payload
from core.keys import Caller
from core.rows import Job
from core.states import FINAL, JobStatus

PAGE = 500
"""Items of the history read from Postgres at once, for one client."""
POLL_SECONDS = 2.0
"""How often Postgres is asked for what Redis did not bring."""
BLOCK_MILLISECONDS = 250
"""How long Redis is waited for: a feed that is watched from now on is read after this time."""
PAUSE_SECONDS = 0.25
"""Rest before the next try when Redis or Postgres does not answer."""
QUEUED_FRAMES = 256
"""Frames that may wait for one client; who falls further behind is closed and comes back."""
BATCH = 64
"""Items told at once; then clients get a moment to take them."""
PATIENCE_SECONDS = 0.1
"""That moment, at most: one client that does not read delays the others four times, then goes."""

END = "end"
"""Type of the last frame."""

SLOW = "slow"
KEY_ENDED = "key_ended"
STOPPING = "stopping"
BROKEN = "broken"
CLOSE_REASONS = (SLOW, KEY_ENDED, STOPPING, BROKEN)
"""Why the server ends a stream early."""

Result = TypeVar("Result")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last item told: attempt and number."""

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What clients read, encoded."""

    type: str
    text: bytes
    cursor: Cursor | None = None
    """Of an item; a status has none."""
    is_end: bool = False


def item_frame(cursor: Cursor, payload: dict[str, Any]) -> Frame:
    """The frame of one feed item."""
    return Frame(type=payload["type"], text=encoded(payload, str(cursor)), cursor=cursor)


def status_frame(view: schemas.Job) -> Frame:
    """The job as it is; carries no id, so a client never resumes behind it."""
    payload = {"type": "status", "id": None, "job": view.model_dump(mode="json")}
    return Frame(type="status", text=encoded(payload))


def end_frame(view: schemas.Job, job: Job) -> Frame:
    """The job as it ended, with the id of its last item."""
    frame_id = stream_cursor(job)
    payload = {"type": END, "id": frame_id, "job": view.model_dump(mode="json")}
    return Frame(type=END, text=encoded(payload, frame_id), is_end=True)


def encoded(payload: dict[str, Any], frame_id: str | None = None) -> bytes:
    """The text of one frame."""
    name = "" if frame_id is None else f"id: {frame_id}\n"
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"{name}data: {text}\n\n".encode()


class Subscription:
    """What one client gets of one feed from now on, until it is closed."""

    def __init__(self, topic: "Topic", key_id: UUID, on_close: Callable[[str], None]) -> None:
        self.topic = topic
        self.key_id = key_id
        self.closed: str | None = None
        """Why it ended, once it has."""
        self._on_close = on_close
        self.has_room = asyncio.Event()
        """Set while another batch fits."""
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue(QUEUED_FRAMES)
        self._look()

    def put(self, frame: Frame) -> None:
        """Queue the frame; close when too many wait."""
        if self.closed is not None:
            return
        try:
            self._frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.close(SLOW)
        self._look()

    def close(self, reason: str) -> None:
        """End it; what waits in the queue is let go."""
        if self.closed is not None:
            return
        self.closed = reason
        while not self._frames.empty():
            self._frames.get_nowait()
        self._frames.put_nowait(None)  # whoever waits for a frame waits in vain
        self._on_close(reason)

    async def next(self, seconds: float) -> Frame | None:
        """The next frame; None when none came in time, or once it is closed."""
        try:
            async with asyncio.timeout(seconds):
                return await self._frames.get()
        except TimeoutError:
            return None
        finally:
            self._look()

    def _look(self) -> None:
        if self._frames.qsize() <= QUEUED_FRAMES - BATCH:
            self.has_room.set()
        else:
            self.has_room.clear()


@dataclass(kw_only=True)
class Topic:
    """A feed that somebody watches; everything up to `cursor` has been told."""

    job: Job
    organization: str
    cursor: Cursor
    told_status: JobStatus
    subscriptions: set[Subscription] = field(default_factory=set)

    def tell(self, frame: Frame) -> None:
        """Send the frame to everyone who watches."""
        if frame.cursor is not None:
            self.cursor = frame.cursor
        for subscription in tuple(self.subscriptions):
            subscription.put(frame)

    async def settle(self) -> None:
        """Let clients take what waits for them, for a moment."""
        behind = [one.has_room.wait() for one in self.subscriptions if not one.has_room.is_set()]
        if behind:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asyncio.gather(*behind)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """A job as it is, with what is stored behind a cursor."""

    job: Job
    items: list[FeedItem]
    view: schemas.Job | None
    """Only when the status is another than the one told."""


class FeedHub:
    """All topics of the process; lives on the event loop, and `run` alone moves topics on."""

    def __init__(self, services: Services) -> None:
        self.closed: Counter[str] = Counter()
        """Streams that the server closed before their end, by reason."""
        self._services = services
        self._topics: dict[UUID, Topic] = {}
        self._next_poll = self._next_key_check = 0.0

    @property
    def num_streams(self) -> int:
        """Clients that hear from the hub now; any thread may ask."""
        return sum(len(topic.subscriptions) for topic in list(self._topics.values()))

    async def join(
        self, job_id: UUID, caller: Caller, on_close: Callable[[str], None]
    ) -> Subscription | None:
        """What happens to the job from now on; None if it has ended, so that nothing will.

        DatabaseUnavailable when nobody watches the job yet and Postgres is away.
        """
        if job_id not in self._topics:
            job = await self.in_thread(lambda: self._read_job(job_id, caller.tenant_id))
            if job.status in FINAL:
                return None
            fresh = Topic(
                job=job,
                organization=caller.tenant_slug,
                cursor=Cursor(job.attempt, job.last_seq),
                told_status=job.status,
            )
            self._topics.setdefault(job_id, fresh)
        topic = self._topics[job_id]

        def close(reason: str) -> None:
            self.closed[reason] += 1
            on_close(reason)

        subscription = Subscription(topic, caller.key_id, close)
        topic.subscriptions.add(subscription)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Forget a client, and the feed with its last one."""
        topic = subscription.topic
        topic.subscriptions.discard(subscription)
        if not topic.subscriptions and self._topics.get(topic.job.id) is topic:
            del self._topics[topic.job.id]

    async def run(self) -> None:
        """Read and tell until the process stops."""
        while not self._services.stopping.is_set():
            try:
                await self._round()
            except Exception:  # the one task that all streams hang on must go on
                log.exception("hub.broke")
                self._close(self._subscriptions(), BROKEN)
                await asyncio.sleep(PAUSE_SECONDS)
        self._close(self._subscriptions(), STOPPING)

    async def _round(self) -> None:
        if not self._topics:
            await asyncio.sleep(BLOCK_MILLISECONDS / 1000)
            return
        await self._read_redis()
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            await self._poll()
        if now >= self._next_key_check:
            self._next_key_check = now + self._services.settings.key_check_seconds
            await self._check_keys()

    async def _read_redis(self) -> None:
        """Take the entries behind each topic's cursor; a little rest while Redis is away."""
        topics = {feed_key(one.job.id): one for one in self._topics.values()}
        positions: dict[Any, Any] = {key: str(one.cursor) for key, one in topics.items()}
        try:
            answer: Any = await self._services.redis.xread(
                positions, count=BATCH, block=BLOCK_MILLISECONDS
            )
        except (RedisError, OSError):
            await asyncio.sleep(PAUSE_SECONDS)
            return
        streams = answer.items() if isinstance(answer, dict) else answer
        for key, entries in streams:
            topic = topics[key.decode()]
            for _, fields in _flat(entries):
                if not await self._take_entry(topic, json.loads(fields[b"item"])):
                    await asyncio.sleep(PAUSE_SECONDS)  # the same entries come again
                    break
            await topic.settle()

    async def _take_entry(self, topic: Topic, payload: dict[str, Any]) -> bool:
        """Tell the entry, and before it what Redis lacks; False while Postgres is away."""
        cursor = Cursor(payload["attempt"], payload["seq"])
        if cursor.seq > topic.cursor.seq + 1 and not await self._catch_up(topic):
            return False
        if cursor.seq == topic.cursor.seq + 1:
            topic.tell(item_frame(cursor, payload))
            if "to" in payload.get("data", {}):
                return await self._catch_up(topic)
        return True

    async def _catch_up(self, topic: Topic) -> bool:
        """Tell all that Postgres holds, then the state; False while it is away."""
        while True:
            try:
                news = await self.in_thread(lambda: self._read_news(topic))
            except DatabaseUnavailable:
                log.warning("stream.database_unavailable")
                return False
            except NotFound:
                self._close(topic.subscriptions, BROKEN)
                return True
            for item in news.items:
                cursor = Cursor(item.attempt, item.seq)
                topic.tell(item_frame(cursor, feed_payload(item)))
            await topic.settle()
            if len(news.items) < BATCH:
                self._tell_state(topic, news)
                return True

    def _tell_state(self, topic: Topic, news: News) -> None:
        """A status that is new; at the end of the job the last frame."""
        topic.job = news.job
        if news.view is None:
            return
        if news.job.status not in FINAL:
            topic.told_status = news.job.status
            topic.tell(status_frame(news.view))
        elif topic.cursor.seq >= news.job.last_seq:
            self._topics.pop(topic.job.id, None)
            topic.tell(end_frame(news.view, news.job))

    async def _poll(self) -> None:
        """Find what Redis did not bring, with one query for all topics."""
        try:
            marks = await self.in_thread(self._read_marks)
        except DatabaseUnavailable:
            log.warning("stream.database_unavailable")
            return
        for topic in list(self._topics.values()):
            last_seq, status = marks.get(topic.job.id, (0, topic.told_status))
            if last_seq > topic.cursor.seq or status != topic.told_status:
                await self._catch_up(topic)

    async def _check_keys(self) -> None:
        """Close the streams whose key was revoked or has expired."""
        ids = {one.key_id for one in self._subscriptions()}
        try:
            live = await self.in_thread(lambda: self._read_live_keys(ids))
        except DatabaseUnavailable:
            return  # asked again at the next check
        self._close((one for one in self._subscriptions() if one.key_id in ids - live), KEY_ENDED)

    def _close(self, subscriptions: Iterable[Subscription], reason: str) -> None:
        for subscription in tuple(subscriptions):
            subscription.close(reason)

    def _subscriptions(self) -> list[Subscription]:
        return [one for topic in self._topics.values() for one in topic.subscriptions]

    def _read_job(self, job_id: UUID, tenant_id: UUID) -> Job:
        with self._services.stream_database.read() as tx:
            return jobs.get(tx, job_id, tenant_id=tenant_id)

    def _read_news(self, topic: Topic) -> News:
        with self._services.stream_database.read() as tx:
            # The job first: what it counts is then surely among the items or still to come.
            job = jobs.get(tx, topic.job.id, tenant_id=topic.job.tenant_id)
            items = feed.after(tx, job.id, topic.cursor.seq, limit=BATCH)
            if job.status == topic.told_status:
                return News(job=job, items=items, view=None)
            (facts,) = facts_of(tx, [job])
        return News(
            job=job, items=items, view=job_view(job, facts, organization=topic.organization)
        )

    def _read_marks(self) -> dict[UUID, tuple[int, str]]:
        job = models.job.c
        with self._services.stream_database.read() as tx:
            rows = tx.execute(
                select(job.id, job.last_seq, job.status).where(job.id.in_(list(self._topics)))
            ).all()
        return {row.id: (row.last_seq, row.status) for row in rows}

    def _read_live_keys(self, ids: set[UUID]) -> set[UUID]:
        with self._services.stream_database.read() as tx:
            return {one for one in ids if keys.is_live(tx, one)}

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of reading, on one of the few threads that all streams share."""
        return await anyio.to_thread.run_sync(work, limiter=self._services.stream_threads)


def _flat(entries: Any) -> list[tuple[Any, Any]]:
    """Entries of one stream; RESP3 puts them one list deeper."""
    return entries[0] if entries and isinstance(entries[0], list) else entries
