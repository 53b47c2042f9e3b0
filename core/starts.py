"""What a job may start from besides a base model: the adapter of a checkpoint of its tenant."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select

from core import models
from core.errors import CheckpointNotFound, ModelNotFound
from core.ids import checkpoint_of as place_of
from core.rows import Checkpoint, Job, checkpoint_of, job_of
from core.states import JobStatus

_CHECKPOINT = "ftckpt_"
_MODEL = "ft:"
_WEIGHTS = "adapter_model.safetensors"
"""The same weights are the same bytes, in a checkpoint and in the result."""

_job = models.job.c
_checkpoint = models.checkpoint.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An adapter to start from."""

    checkpoint: Checkpoint
    model: str
    """The base model it belongs to."""
    lora: Mapping[str, Any]
    """Its form, as `resolved` of its job says it."""


def find(tx: Connection, name: str, *, tenant_id: UUID) -> Start | None:
    """The start that `model` of a request names; None if the name is a base model's.

    CheckpointNotFound or ModelNotFound, with the `param`, if there is none of that name.
    """
    if name.startswith(_CHECKPOINT):
        return _of_checkpoint(tx, name, tenant_id)
    return _of_model(tx, name, tenant_id) if name.startswith(_MODEL) else None


def _of_checkpoint(tx: Connection, name: str, tenant_id: UUID) -> Start:
    try:
        job_id, attempt, step = place_of(name)
    except CheckpointNotFound as error:
        raise CheckpointNotFound(f"model: {error.message}", param="model") from None
    row = tx.execute(
        select(models.checkpoint).where(
            _checkpoint.job_id == job_id,
            _checkpoint.attempt == attempt,
            _checkpoint.step == step,
            _checkpoint.tenant_id == tenant_id,
        )
    ).one_or_none()
    if row is None:
        raise CheckpointNotFound(f"model: there is no checkpoint {name!r}.", param="model")
    return _start(_made_by(tx, job_id), checkpoint_of(row), name)


def _of_model(tx: Connection, name: str, tenant_id: UUID) -> Start:
    row = tx.execute(
        select(models.job).where(
            _job.tenant_id == tenant_id,
            _job.fine_tuned_model == name,
            _job.status == JobStatus.SUCCEEDED,
        )
    ).one_or_none()
    if row is None:
        raise ModelNotFound(
            f"model: there is no finished model {name!r}; to go on from a checkpoint give its id, "
            f"{_CHECKPOINT}...",
            param="model",
        )
    job = job_of(row._asdict())
    result = models.artifact.c
    same = tx.execute(
        select(models.checkpoint)
        .join(models.artifact, result.job_id == _checkpoint.job_id)
        .where(
            _checkpoint.job_id == job.id,
            result.path == f"adapter/{_WEIGHTS}",
            _checkpoint.adapter["files"][_WEIGHTS].astext == result.sha256,
        )
        .order_by(_checkpoint.step.desc(), _checkpoint.attempt.desc())
        .limit(1)
    ).one_or_none()
    if same is None:
        raise ModelNotFound(
            f"model: no checkpoint of its job holds the adapter of {name!r}.", param="model"
        )
    return _start(job, checkpoint_of(same), name)


def newest(tx: Connection, job_id: UUID) -> Checkpoint | None:
    """The newest sound checkpoint of a job whose adapter can be had."""
    row = tx.execute(
        select(models.checkpoint)
        .where(
            _checkpoint.job_id == job_id, _checkpoint.resumable, _checkpoint.adapter.is_not(None)
        )
        .order_by(_checkpoint.step.desc(), _checkpoint.attempt.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else checkpoint_of(row)


def of_job(tx: Connection, job: Job) -> Checkpoint | None:
    """The checkpoint that the job starts from; None if it starts from the base model."""
    if job.start_job_id is None:
        return None
    row = tx.execute(
        select(models.checkpoint).where(
            _checkpoint.job_id == job.start_job_id,
            _checkpoint.attempt == job.start_attempt,
            _checkpoint.step == job.start_step,
        )
    ).one()
    return checkpoint_of(row)


def _made_by(tx: Connection, job_id: UUID) -> Job:
    return job_of(tx.execute(select(models.job).where(_job.id == job_id)).one()._asdict())


def _start(job: Job, checkpoint: Checkpoint, name: str) -> Start:
    if checkpoint.adapter is None:
        raise CheckpointNotFound(
            f"model: {name!r} was stored by an older version, which kept no digest of its adapter; "
            "take a newer checkpoint.",
            param="model",
        )
    return Start(
        checkpoint=checkpoint, model=job.model, lora=job.resolved["hyperparameters"]["lora"]
    )
