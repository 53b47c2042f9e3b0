"""The names that worker, dispatcher and api must agree on to find each other in Redis."""

from uuid import UUID

TASK_NAME = "trimtab.run_job"
"""The one Celery task: its only argument is a job's uuid, as text."""

DEFAULT_QUEUE = "cpu"
"""The Celery queue of jobs that ask for nothing special."""

NOTIFY_CHANNEL = "trimtab_job"
"""The Postgres channel that wakes the dispatcher."""

FEED_LENGTH = 10_000
"""Entries kept of a feed, roughly."""

FEED_SECONDS = 24 * 3600
"""How long a feed outlives its last entry."""


def feed_key(job_id: UUID) -> str:
    """The Redis stream that carries the feed of a job."""
    return f"feed:{job_id}"


PRESENCE_SECONDS = 45
"""How long a worker that tells nothing more still counts as online."""

_PRESENCE = "online"


def presence_key(queue: str, label: str) -> str:
    """The Redis key that says that a worker lives."""
    return f"{_PRESENCE}:{queue}:{label}"


def presence_pattern() -> str:
    """What all of these keys match."""
    return f"{_PRESENCE}:*"


def presence_queue(key: str) -> str:
    """The queue in such a key."""
    return key.split(":", 2)[1]
