"""Results of jobs as rows; their bytes are in the artifact store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select

from core import jobs, models, starts
from core.adapter_tar import StoredAdapter, open_adapter
from core.errors import (
    AdapterNotReady,
    ArtifactNotFound,
    CheckpointNotFound,
    FileNotFound_,
    NoAdapter,
)
from core.ids import checkpoint_of, public_file_id
from core.rows import Checkpoint, Job
from core.states import FINAL, JobStatus
from core.storage import ArtifactStore

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as one tar: the result of a job, or that of one of its checkpoints."""

    sha256: str
    bytes: int
    step: int
    source: Artifact | Checkpoint

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint it is of; None for the result."""
        return self.source if isinstance(self.source, Checkpoint) else None


Reader = Callable[[int, int], Iterator[bytes]]
"""Bytes from an offset up to, not including, another."""


def reader_of(store: ArtifactStore, found: Adapter) -> Reader:
    """The adapter's bytes; ArtifactNotFound if the store lacks them."""
    source = found.source
    if isinstance(source, Artifact):
        return lambda start, stop: store.read(source.uri, start=start, length=stop - start)
    if source.adapter is None:
        raise ArtifactNotFound
    return open_adapter(store, f"{source.uri}/adapter", source.adapter).read


def adapter(tx: Connection, job: Job, *, checkpoint: str | None = None) -> Adapter:
    """The adapter of a job: its result, or before and without one that of its last checkpoint.

    With the id of a `checkpoint`, that one's; CheckpointNotFound if it is none of this job.
    AdapterNotReady while there is none yet, NoAdapter if the job ended without.
    """
    if checkpoint is not None:
        return _of_checkpoint(_checkpoint_named(tx, job, checkpoint))
    if job.status == JobStatus.SUCCEEDED:
        try:
            result = by_path(tx, job.id, ADAPTER_PATH)
        except ArtifactNotFound:
            raise NoAdapter("The job succeeded without an adapter.") from None
        return Adapter(sha256=result.sha256, bytes=result.bytes, step=job.step, source=result)
    if (last := starts.newest(tx, job.id)) is not None:
        return _of_checkpoint(last)
    if job.status in FINAL:
        raise NoAdapter(f"The job {job.status.value} before its first checkpoint.")
    raise AdapterNotReady(f"The job is {job.status.value} and has stored no checkpoint yet.")


def _checkpoint_named(tx: Connection, job: Job, public_id: str) -> Checkpoint:
    job_id, attempt, step = checkpoint_of(public_id)
    for one in jobs.checkpoints(tx, job.id):
        if (one.job_id, one.attempt, one.step) == (job_id, attempt, step):
            return one
    raise CheckpointNotFound(f"The job has no checkpoint {public_id!a}.")


def _of_checkpoint(checkpoint: Checkpoint) -> Adapter:
    stored: StoredAdapter | None = checkpoint.adapter
    if stored is None:
        raise CheckpointNotFound(
            "The checkpoint was stored by an older version, which kept no digest of its adapter."
        )
    return Adapter(
        sha256=stored.sha256, bytes=stored.bytes, step=checkpoint.step, source=checkpoint
    )
