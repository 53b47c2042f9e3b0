"""Results of jobs as rows; their bytes are in the artifact store."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select

from core import models
from core.errors import AdapterNotReady, ArtifactNotFound, FileNotFound_, NoAdapter
from core.ids import public_file_id
from core.rows import Job
from core.states import FINAL

ADAPTER_ROLE = "adapter"
ADAPTER_PATH = "adapter.tar"
METRICS_PATH = "metrics.csv"

_artifact = models.artifact.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One row of `artifact`."""

    id: UUID
    job_id: UUID
    tenant_id: UUID
    attempt: int
    path: str
    role: str
    media_type: str
    uri: str
    sha256: str
    bytes: int
    created_at: datetime


def _artifact_of(row: Row[Any]) -> Artifact:
    return Artifact(**row._asdict())


def of_job(tx: Connection, job_id: UUID) -> list[Artifact]:
    """All results of the job, by path."""
    rows = tx.execute(
        select(models.artifact).where(_artifact.job_id == job_id).order_by(_artifact.path)
    ).all()
    return [_artifact_of(row) for row in rows]


def by_path(tx: Connection, job_id: UUID, path: str) -> Artifact:
    """The result of that path, which is a key and never a place on disk; else ArtifactNotFound."""
    row = tx.execute(
        select(models.artifact).where(
            _artifact.job_id == job_id, _artifact.path == path.replace("\x00", "\ufffd")
        )
    ).one_or_none()
    if row is None:
        raise ArtifactNotFound
    return _artifact_of(row)


def by_id(tx: Connection, artifact_id: UUID, *, tenant_id: UUID) -> Artifact:
    """The tenant's result under its file id (`result_files`); else FileNotFound_."""
    row = tx.execute(
        select(models.artifact).where(_artifact.id == artifact_id, _artifact.tenant_id == tenant_id)
    ).one_or_none()
    if row is None:
        raise FileNotFound_(f"There is no file {public_file_id(artifact_id)}.")
    return _artifact_of(row)


def adapter(tx: Connection, job: Job) -> Artifact:
    """The adapter as one tar; AdapterNotReady before the end, NoAdapter if it ended without."""
    try:
        return by_path(tx, job.id, ADAPTER_PATH)
    except ArtifactNotFound:
        if job.status in FINAL:
            raise NoAdapter(f"The job {job.status.value} without an adapter.") from None
        raise AdapterNotReady(
            f"The job is {job.status.value}; its adapter does not exist yet."
        ) from None
