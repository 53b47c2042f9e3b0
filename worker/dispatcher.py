"""`python -m worker.dispatcher`: rings for waiting jobs, reaps lost ones, sweeps orphaned files.

Any number of copies may run. A ring that is lost is repeated, one that is doubled does nothing.
"""

import signal
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta

import psycopg
import redis
import structlog
from kombu.exceptions import OperationalError as BrokerUnavailable
from sqlalchemy.exc import OperationalError

from core import attempts, logs
from core.db import Database, first_line
from core.dispatch import NOTIFY_CHANNEL, TASK_NAME
from core.errors import DatabaseUnavailable
from core.storage import ArtifactStore
from worker.celery_app import make_celery
from worker.settings import DispatcherSettings
from worker.sweep import sweep, sweep_answers, sweep_uploads

RINGS_PER_SLOT = 4
"""Rings that may wait in Redis per worker; the order of the rest is decided in Postgres."""

REDIS_SECONDS = 2.0
"""Rows are locked while a ring is sent."""

SWEEP_SECONDS = 3600.0

log = structlog.get_logger(__name__)


class Dispatcher:
    """One copy of the process."""

    def __init__(self, settings: DispatcherSettings) -> None:
        redis_url = settings.redis_url.get_secret_value()
        self._settings = settings
        self._database_url = settings.database_url.get_secret_value()
        self._database = Database(self._database_url, pool_size=2)
        self._celery = make_celery(redis_url, queue=settings.queue, socket_seconds=REDIS_SECONDS)
        self._redis = redis.Redis.from_url(
            redis_url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
        )
        self._store = ArtifactStore(settings.artifacts)
        self._bell: psycopg.Connection | None = None
        self._next_reap = 0.0
        self._next_sweep = 0.0
        self._stopped = False

    def run(self) -> None:
        """Work until told to stop."""
        log.info("dispatcher.started", queue=self._settings.queue)
        while not self._stopped:
            self.work()
            self._wait()
        self.close()
        log.info("dispatcher.stopped")

    def stop(self, _signal: int = 0, _frame: types.FrameType | None = None) -> None:
        """Let `run` return after what it is doing."""
        self._stopped = True

    def close(self) -> None:
        """Close all connections."""
        if self._bell is not None:
            self._bell.close()
        self._redis.close()
        self._celery.close()
        self._database.dispose()

    def work(self) -> None:
        """One round: ring, and reap and sweep when it is time."""
        now = time.monotonic()
        self._try(self.ring)
        if now >= self._next_reap:
            self._next_reap = now + self._settings.reap_seconds
            self._try(self.reap)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            for sweeping in (
                lambda: sweep(self._database, self._store),
                lambda: sweep_uploads(self._database, self._store),
                lambda: sweep_answers(self._database),
            ):
                self._try(sweeping)

    def _try(self, duty: Callable[[], object]) -> None:
        """Do it unless Postgres, Redis or the store is away; the next round comes soon."""
        try:
            duty()
        except (DatabaseUnavailable, OperationalError) as error:
            log.warning("database.no_answer", error=first_line(error))
            self._grant_a_lease()
        except (BrokerUnavailable, redis.RedisError) as error:
            log.warning("broker.no_answer", error=type(error).__name__)
        except OSError as error:
            log.warning("store.no_answer", error=error.strerror)

    def ring(self) -> int:
        """Send the ids of waiting jobs; how many. Without Redis nothing counts as sent."""
        waiting = int(self._redis.llen(self._settings.queue))
        with self._database.begin() as tx:
            is_missing = attempts.rung(tx, queue=self._settings.queue) > waiting
            ids = attempts.dispatch(
                tx,
                queue=self._settings.queue,
                room=RINGS_PER_SLOT * self._settings.slots - waiting,
                is_missing=is_missing,
                redispatch=timedelta(seconds=self._settings.redispatch_seconds),
            )
            for job_id in ids:
                self._celery.send_task(TASK_NAME, args=[str(job_id)], ignore_result=True)
        for job_id in ids:
            log.info("job.rung", job_id=str(job_id))
        return len(ids)

    def reap(self) -> None:
        """Release the jobs whose lease has run out."""
        with self._database.begin() as tx:
            ended = attempts.reap(tx, ttl=timedelta(seconds=self._settings.lease_seconds))
        for one in ended:
            log.warning("lease.expired", job_id=str(one.job_id), status=one.status.value)

    def _grant_a_lease(self) -> None:
        """Reap nothing for so long: live workers could not extend their leases either."""
        self._next_reap = time.monotonic() + self._settings.lease_seconds

    def _wait(self) -> None:
        """Until a job comes or a tick has passed."""
        try:
            bell = self._listen()
            for _ in bell.notifies(timeout=self._settings.tick_seconds, stop_after=1):
                pass
        except psycopg.Error as error:
            log.warning("bell.lost", error=first_line(error))
            self._bell = None
            self._grant_a_lease()  # perhaps a replica took over, whose clock of starts says nothing
            time.sleep(self._settings.tick_seconds)

    def _listen(self) -> psycopg.Connection:
        if self._bell is None or self._bell.closed:
            self._bell = psycopg.connect(self._database_url, autocommit=True, connect_timeout=5)
            self._bell.execute(f"LISTEN {NOTIFY_CHANNEL}")
        return self._bell


def main() -> int:
    """Run the dispatcher until it is told to stop."""
    settings = DispatcherSettings.from_environment()
    logs.configure(log_format=settings.log_format)
    dispatcher = Dispatcher(settings)
    signal.signal(signal.SIGTERM, dispatcher.stop)
    signal.signal(signal.SIGINT, dispatcher.stop)
    dispatcher.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
