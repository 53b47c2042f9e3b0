"""What a worker and a dispatcher are told from outside."""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from core.dispatch import DEFAULT_QUEUE
from core.settings import ServiceSettings

Seconds = Annotated[float, Field(gt=0)]


def _label() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class DispatcherSettings(ServiceSettings):
    """The process that rings for waiting jobs, reaps lost ones and sweeps orphaned files."""

    queue: str = Field(DEFAULT_QUEUE, validation_alias="TRIMTAB_QUEUE")
    """The queue it rings for."""
    slots: int = Field(1, ge=1, validation_alias="TRIMTAB_SLOTS")
    """Workers of the queue, roughly; four rings each may wait in Redis."""
    tick_seconds: Seconds = Field(1, validation_alias="TRIMTAB_TICK_SECONDS")
    """Longest wait between two looks at the waiting jobs."""
    reap_seconds: Seconds = Field(5, validation_alias="TRIMTAB_REAP_SECONDS")
    """Time between two looks at expired leases."""
    redispatch_seconds: Seconds = Field(30, validation_alias="TRIMTAB_REDISPATCH_SECONDS")
    """Age at which a ring that nobody answered is repeated."""
    lease_seconds: Seconds = Field(60, validation_alias="TRIMTAB_LEASE_SECONDS")
    """The workers' lease; after an outage of the database nobody is reaped for so long."""


class WorkerSettings(ServiceSettings):
    """The process that supervises one trainer at a time."""

    scratch: Path = Field(
        default_factory=lambda data: data["home"] / "scratch", validation_alias="TRIMTAB_SCRATCH"
    )
    """Folder of the run directories: `<scratch>/<job>/attempt-<n>/`."""
    queue: str = Field(DEFAULT_QUEUE, validation_alias="TRIMTAB_QUEUE")
    """The queue it takes jobs from."""
    device: Literal["cpu", "cuda"] = Field("cpu", validation_alias="TRIMTAB_DEVICE")
    """What its trainers compute on."""
    label: str = Field(default_factory=_label, validation_alias="TRIMTAB_WORKER_LABEL")
    """What people see as the worker of a job."""
    trainer_command: tuple[str, ...] = Field(
        (sys.executable, "-m", "ppo_engine"),
        min_length=1,
        validation_alias="TRIMTAB_TRAINER_COMMAND",
    )
    """How a trainer is started, as a JSON list; the path of `run.json` is appended."""
    tick_seconds: Seconds = Field(1, validation_alias="TRIMTAB_TICK_SECONDS")
    """Time between two looks at the trainer's lines."""
    heartbeat_seconds: Seconds = Field(10, validation_alias="TRIMTAB_HEARTBEAT_SECONDS")
    """Longest time without a heartbeat, lines or not."""
    lease_seconds: Seconds = Field(60, validation_alias="TRIMTAB_LEASE_SECONDS")
    """How long a job stays ours after a heartbeat."""
    pause_seconds: Seconds = Field(100, validation_alias="TRIMTAB_PAUSE_SECONDS")
    """How long a trainer may take to save and end before it is killed."""
    cancel_seconds: Seconds = Field(10, validation_alias="TRIMTAB_CANCEL_SECONDS")
    """How long a trainer may take to end after a cancel before it is killed."""
    offline_seconds: Seconds = Field(900, validation_alias="TRIMTAB_OFFLINE_SECONDS")
    """How long a trainer goes on without a database before it is stopped with a checkpoint."""
