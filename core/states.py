"""The states of a job and every step between them that exists.

The database enforces the same table with a trigger (`migrations/`); a test compares the two.
"""

from enum import StrEnum


class JobStatus(StrEnum):
    """OpenAI's words for where a job stands."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StopWanted(StrEnum):
    """What a holder is asked to do at the next step boundary."""

    PAUSE = "pause"
    CANCEL = "cancel"


class Phase(StrEnum):
    """What a running attempt is busy with; told by its heartbeats."""

    STARTING = "starting"
    TRAINING = "training"
    FINALISING = "finalising"


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.SUCCEEDED,
            JobStatus.QUEUED,
            JobStatus.PAUSED,
            JobStatus.FAILED,
            JobStatus.CANCELLED,
        }
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
"""From each state, the states it may become."""

FINAL = frozenset(state for state, targets in TRANSITIONS.items() if not targets)
"""States that never change again."""

HELD = frozenset({JobStatus.RUNNING, JobStatus.VALIDATING_FILES})
"""States in which an attempt may hold the job."""
