"""A sign in Redis that a worker lives, which fades by itself once it does not.

For people and their alarms only: whether a job is held is decided by its lease in Postgres.
"""

from typing import Any

import redis
import structlog
from celery.signals import worker_ready, worker_shutdown

from core.dispatch import PRESENCE_SECONDS, presence_key
from worker.settings import WorkerSettings

SOCKET_SECONDS = 0.5

log = structlog.get_logger(__name__)


class Presence:
    """One worker's sign."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._key = presence_key(settings.queue, settings.label)
        self._redis = redis.Redis.from_url(
            settings.redis_url.get_secret_value(),
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
        )

    def tell(self) -> None:
        """Renew the sign, if Redis is there."""
        try:
            self._redis.set(self._key, "1", ex=PRESENCE_SECONDS)
        except redis.RedisError as error:
            log.warning("presence.untold", error=type(error).__name__)

    def end(self) -> None:
        """Take the sign away, if Redis is there; else it fades."""
        try:
            self._redis.delete(self._key)
        except redis.RedisError as error:
            log.warning("presence.untold", error=type(error).__name__)
        self._redis.close()


def announce(settings: WorkerSettings) -> None:
    """Show the worker of this process from when it is ready until it ends."""
    presence = Presence(settings)

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
    def begin(sender: Any, **_: Any) -> None:
        presence.tell()
        # The parent's own clock: a thread of ours would be copied into every pool child.
        sender.timer.call_repeatedly(PRESENCE_SECONDS / 3, presence.tell)

    @worker_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]
    def end(**_: Any) -> None:
        presence.end()
