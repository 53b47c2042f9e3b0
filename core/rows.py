"""Rows of the job tables as frozen values, and how they are read out of a result."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from core.adapter_tar import StoredAdapter
from core.states import JobStatus, StopWanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of `job`, column by column."""

    id: UUID
    tenant_id: UUID
    created_by: UUID
    spec: dict[str, Any]
    spec_version: int
    resolved: dict[str, Any]
    warnings: list[dict[str, Any]]
    model: str
    method: str
    training_file_id: UUID
    validation_file_id: UUID | None
    suffix: str | None
    seed: int
    metadata: dict[str, str] | None
    status: JobStatus
    phase: str | None
    queue: str
    priority: int
    attempt: int
    lease_until: datetime | None
    claim_key: str | None
    worker_label: str | None
    stop_wanted: StopWanted | None
    stop_wanted_at: datetime | None
    dispatched_at: datetime | None
    not_before: datetime | None
    step: int
    total_steps: int
    saved_step: int
    crashes: int
    crash_step: int
    last_seq: int
    usage: dict[str, Any]
    fine_tuned_model: str | None
    error_code: str | None
    error_message: str | None
    error_param: str | None
    limit_reached: str | None
    """Which of its limits ended the present budget; None while it goes on."""
    budget_from: dict[str, Any]
    """What it had used when its limits began to count."""
    start_job_id: UUID | None
    """With the next two: the checkpoint whose adapter it starts from."""
    start_step: int | None
    start_attempt: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


def job_of(columns: Mapping[str, Any]) -> Job:
    """The job in all its columns."""
    stop = columns["stop_wanted"]
    states = {
        "status": JobStatus(columns["status"]),
        "stop_wanted": None if stop is None else StopWanted(stop),
    }
    return Job(**{**columns, **states})


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One stored checkpoint."""

    job_id: UUID
    step: int
    attempt: int
    tenant_id: UUID
    uri: str
    """Prefix of its files in the artifact store."""
    manifest_sha256: str
    bytes: int
    resumable: bool
    best: bool
    score: float | None
    """What the best is chosen by; None if it does not compete."""
    adapter: StoredAdapter | None
    """None for one that was stored before digests of adapters were kept."""
    created_at: datetime


def checkpoint_of(row: Row[Any]) -> Checkpoint:
    """The checkpoint in a row of all its columns."""
    columns = row._asdict()
    stored = columns.pop("adapter")
    return Checkpoint(
        **columns, adapter=None if stored is None else StoredAdapter.from_dict(stored)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at running a job."""

    job_id: UUID
    attempt: int
    tenant_id: UUID
    kind: str
    worker_label: str
    last_line: int
    resumed_from_step: int | None
    started_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    end_status: str | None
    exit_code: int | None


def attempt_of(row: Row[Any]) -> Attempt:
    """The attempt in a row of all its columns."""
    return Attempt(**row._asdict())
