"""The hold on one job: every write of its attempt goes through here and extends the lease."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from core import attempts, limits
from core.attempts import NOTHING, Beat, Claim, NewArtifact, NewCheckpoint
from core.db import Database, first_line
from core.errors import DatabaseUnavailable
from core.events import FeedItem, Report
from core.rows import Checkpoint
from core.states import Phase
from worker.errors import DatabaseGone
from worker.settings import WorkerSettings
from worker.stream import FeedStream

T = TypeVar("T")

NO_ANSWER = (DatabaseUnavailable, OperationalError)
"""Postgres is away, stalled, or refused the statement for a reason that passes."""

log = structlog.get_logger(__name__)


class Hold:
    """A held job. AttemptLost from any method means that it is held no more."""

    def __init__(
        self,
        claim: Claim,
        database: Database,
        stream: FeedStream,
        settings: WorkerSettings,
        *,
        is_told_to_go: Callable[[], bool],
    ) -> None:
        self.job = claim.job
        self.holder = claim.holder
        self.stop_wanted = claim.job.stop_wanted
        self.finish_wanted = limits.wants_finish(claim.job.spec, claim.job.limit_reached)
        self.phase = Phase.STARTING
        self.step = claim.job.saved_step
        self.usage: Mapping[str, Any] = claim.job.usage
        self._database = database
        self._stream = stream
        self._settings = settings
        self._is_told_to_go = is_told_to_go
        self._ttl = timedelta(seconds=settings.lease_seconds)
        self._last_beat = time.monotonic()
        self._stream.send(claim.items)

    @property
    def seconds_offline(self) -> float:
        """How long Postgres has not answered; 0 when the last heartbeat went through in time."""
        late = time.monotonic() - self._last_beat - self._settings.heartbeat_seconds
        return max(0.0, late)

    def beat_if_due(self) -> None:
        """Extend the lease when the last heartbeat is old enough."""
        if time.monotonic() - self._last_beat >= self._settings.heartbeat_seconds:
            self.tell(NOTHING, ())

    def tell(self, report: Report, artifacts: Sequence[NewArtifact]) -> bool:
        """Store what the trainer told, in one transaction; False if Postgres does not answer."""

        def write(tx: Connection) -> Beat:
            beat = attempts.heartbeat(
                tx,
                self.holder,
                ttl=self._ttl,
                phase=self.phase,
                step=self.step,
                report=report,
                usage=self.usage,
            )
            if artifacts:
                attempts.store_artifacts(tx, self.holder, artifacts)
            return beat

        return self._beat(write)

    def save(self, checkpoint: NewCheckpoint) -> list[Checkpoint] | None:
        """Make the checkpoint exist; those it replaces. None if Postgres does not answer."""
        replaced: list[Checkpoint] = []

        def write(tx: Connection) -> Beat:
            beat = attempts.checkpoint(
                tx, self.holder, checkpoint, ttl=self._ttl, phase=self.phase, usage=self.usage
            )
            replaced[:] = attempts.prune_checkpoints(tx, self.holder)
            return beat

        return replaced if self._beat(write) else None

    def write(self, statement: Callable[[Connection], T]) -> T:
        """The answer of a transaction, tried until Postgres answers.

        DatabaseGone when the worker is told to go and has waited long enough.
        """
        patience: float | None = None
        while True:
            try:
                with self._database.begin() as tx:
                    return statement(tx)
            except NO_ANSWER as error:
                log.warning("database.no_answer", error=first_line(error))
            if self._is_told_to_go():
                patience = patience or time.monotonic() + self._settings.pause_seconds
                if time.monotonic() > patience:
                    raise DatabaseGone
            time.sleep(self._settings.tick_seconds)

    def show(self, items: Sequence[FeedItem]) -> None:
        """Put committed items on the live stream."""
        self._stream.send(items)

    def while_beating(self, work: Callable[[], T]) -> T:
        """The result of slow work done on a thread, while heartbeats go on here.

        A heartbeat that is due at its end is made, too: what was wished meanwhile is then known.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(work)
            while not future.done():
                wait([future], timeout=self._settings.tick_seconds)
                self.beat_if_due()
            return future.result()

    def _beat(self, write: Callable[[Connection], Beat]) -> bool:
        try:
            with self._database.begin() as tx:
                beat = write(tx)
        except NO_ANSWER as error:
            log.warning("database.no_answer", error=first_line(error))
            return False
        self._last_beat = time.monotonic()
        self.stop_wanted = beat.stop_wanted
        self.finish_wanted = beat.finish_wanted
        self._stream.send(beat.items)
        return True
