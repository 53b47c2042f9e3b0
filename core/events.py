"""What a job tells: event codes, the rows an attempt reports, and the JSON of one feed item.

Events and metrics of a job share one numbering without holes; together they are its feed.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal
from uuid import UUID

Level = Literal["info", "warn", "error"]


class EventCode(StrEnum):
    """Every kind of event there is."""

    JOB_CREATED = "job.created"
    JOB_QUEUED = "job.queued"
    JOB_CLAIMED = "job.claimed"
    JOB_RESUMED = "job.resumed"
    RESUME_NOT_IDENTICAL = "resume.not_identical"
    CHECKPOINT_SAVED = "checkpoint.saved"
    CHECKPOINT_CORRUPT = "checkpoint.corrupt"
    GUARD_FIRED = "guard.fired"
    DIAGNOSIS_CHANGED = "diagnosis.changed"
    SETTINGS_MEASURED = "settings.measured"
    SELF_CHECK_PASSED = "self_check.passed"
    SELF_CHECK_FAILED = "self_check.failed"
    REWARD_ERRORS = "reward.errors"
    LEASE_EXPIRED = "lease.expired"
    WORKER_STOPPED = "worker.stopped"
    CANCEL_REQUESTED = "job.cancel_requested"
    PAUSE_REQUESTED = "job.pause_requested"
    PAUSE_WITHDRAWN = "job.pause_withdrawn"
    JOB_PAUSED = "job.paused"
    JOB_CANCELLED = "job.cancelled"
    JOB_FAILED = "job.failed"
    JOB_SUCCEEDED = "job.succeeded"
    LIMIT_REACHED = "limit.reached"
    WEBHOOK_FAILED = "webhook.failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event to be written; it gets its number with the transaction that writes it."""

    code: EventCode
    message: str
    level: Level = "info"
    step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    line: int | None = None
    """Number of the trainer's line it came from; None for the supervisor's own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMetric:
    """The values of one step, as the trainer reported them."""

    line: int
    step: int
    at: datetime
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewClipPass:
    """The clip statistics of one pass; not part of the feed."""

    line: int
    step: int
    epoch: int
    minibatch: int
    values: dict[str, Any]
    histogram: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an attempt read from its trainer since the last heartbeat, in the trainer's order."""

    items: tuple[NewEvent | NewMetric, ...] = ()
    passes: tuple[NewClipPass, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedItem:
    """One numbered event or metric of a job."""

    job_id: UUID
    seq: int
    attempt: int
    kind: Literal["event", "metrics"]
    at: datetime
    step: int | None
    data: dict[str, Any]
    """The event's data, or the metric's values."""
    level: Level = "info"
    code: str = ""
    message: str = ""

    @property
    def id(self) -> str:
        """The id of the stream frame and of the Redis entry: `<attempt>-<seq>`."""
        return f"{self.attempt}-{self.seq}"


def feed_payload(item: FeedItem) -> dict[str, Any]:
    """The JSON of one feed item, the same whether it comes through Redis or from Postgres."""
    payload: dict[str, Any] = {
        "type": _payload_type(item),
        "id": item.id,
        "job_id": f"ftjob-{item.job_id.hex}",
        "attempt": item.attempt,
        "seq": item.seq,
        "step": item.step,
        "created_at": int(item.at.timestamp()),
    }
    if item.kind == "metrics":
        return payload | {"values": item.data}
    return payload | {
        "level": item.level,
        "code": item.code,
        "message": item.message,
        "data": item.data,
    }


def _payload_type(item: FeedItem) -> str:
    """A stored checkpoint is an event in the database and a frame of its own on the stream."""
    return "checkpoint" if item.code == EventCode.CHECKPOINT_SAVED else item.kind
