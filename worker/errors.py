"""What ends an attempt early.

WorkerError
├── BrokenTrainer   the trainer breaks the protocol; counted as a crash
├── Unusable        the job can never run as it stands; it fails with the error inside
└── DatabaseGone    told to go while Postgres does not answer; the reaper will release the job
"""

from core.attempts import JobError


class WorkerError(Exception):
    """The worker cannot go on with this attempt."""


class BrokenTrainer(WorkerError):
    """The trainer wrote something that the protocol does not allow."""


class Unusable(WorkerError):
    """The job can never run as it stands."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


class DatabaseGone(WorkerError):
    """Postgres does not answer and the worker has no time to wait for it."""
