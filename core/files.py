"""Uploaded files as rows; their bytes are in the artifact store."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, Row, bindparam, insert, or_, select, tuple_, update

from core import models
from core.db import now
from core.errors import (
    FileExpired,
    FileInUse,
    FileNotFound_,
    InvalidCursor,
    InvalidFilePurpose,
    InvalidTrainingFile,
    InvalidValidationFile,
)
from core.ids import file_id_of, public_file_id
from core.states import FINAL

TRAINING_PURPOSE = "fine-tune"
"""What a file of prompts is uploaded for."""

FileStatus = Literal["uploaded", "processed", "error"]

_file = models.file.c
_job = models.job.c


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """An upload whose bytes are complete in the artifact store."""

    tenant_id: UUID
    created_by: UUID
    purpose: str
    filename: str
    bytes: int
    sha256: str
    uri: str
    status: FileStatus
    rows: int | None = None
    """Rows found, for a file of prompts."""
    report: Mapping[str, Any] | None = None
    """What the check found, as JSON."""
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One row of `file`."""

    id: UUID
    tenant_id: UUID
    created_by: UUID
    purpose: str
    filename: str
    bytes: int
    sha256: str
    uri: str
    status: FileStatus
    rows: int | None
    report: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime | None
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePage:
    """Some files in order, and whether there are more."""

    files: list[StoredFile]
    has_more: bool


def _file_of(row: Row[Any]) -> StoredFile:
    return StoredFile(**row._asdict())


def add(tx: Connection, new: NewFile) -> StoredFile:
    """Store the row of a new file."""
    row = tx.execute(
        insert(models.file)
        .values(
            tenant_id=new.tenant_id,
            created_by=new.created_by,
            purpose=new.purpose,
            filename=new.filename,
            bytes=new.bytes,
            sha256=new.sha256,
            uri=new.uri,
            status=new.status,
            rows=new.rows,
            report=None if new.report is None else dict(new.report),
            expires_at=new.expires_at,
        )
        .returning(models.file)
    ).one()
    return _file_of(row)


def get(tx: Connection, file_id: UUID, *, tenant_id: UUID) -> StoredFile:
    """The tenant's file; FileNotFound_ if it is deleted, another tenant's, or never was."""
    row = tx.execute(
        select(models.file).where(
            _file.id == file_id, _file.tenant_id == tenant_id, _file.deleted_at.is_(None)
        )
    ).one_or_none()
    if row is None:
        raise FileNotFound_(f"There is no file {public_file_id(file_id)}.")
    return _file_of(row)


def page(
    tx: Connection,
    *,
    tenant_id: UUID,
    limit: int,
    after: UUID | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FilePage:
    """The tenant's files by creation time, beginning behind `after`, which may be deleted."""
    place = tuple_(_file.created_at, _file.id)
    conditions = [_file.tenant_id == tenant_id, _file.deleted_at.is_(None)]
    if purpose is not None:
        conditions.append(_file.purpose == purpose)
    if after is not None:
        cursor = _cursor(tx, after, tenant_id)
        conditions.append(place < cursor if order == "desc" else place > cursor)
    ordering = (
        (_file.created_at.desc(), _file.id.desc())
        if order == "desc"
        else (_file.created_at.asc(), _file.id.asc())
    )
    rows = tx.execute(
        select(models.file).where(*conditions).order_by(*ordering).limit(limit + 1)
    ).all()
    return FilePage(files=[_file_of(row) for row in rows[:limit]], has_more=len(rows) > limit)


def _cursor(tx: Connection, after: UUID, tenant_id: UUID) -> Any:
    row = tx.execute(
        select(_file.created_at, _file.id).where(_file.id == after, _file.tenant_id == tenant_id)
    ).one_or_none()
    if row is None:
        raise InvalidCursor(f"after: there is no file {public_file_id(after)}", param="after")
    return tuple_(row.created_at, row.id)


def delete(tx: Connection, file_id: UUID, *, tenant_id: UUID) -> StoredFile:
    """The file, now a tombstone; delete its bytes (`uri`) after the commit.

    FileInUse while a job that has not finished names it.
    """
    locked = tx.execute(
        select(_file.id)
        .where(_file.id == file_id, _file.tenant_id == tenant_id, _file.deleted_at.is_(None))
        .with_for_update()
    ).one_or_none()
    if locked is None:
        raise FileNotFound_(f"There is no file {public_file_id(file_id)}.")
    user = tx.execute(
        select(_job.id)
        .where(
            or_(_job.training_file_id == file_id, _job.validation_file_id == file_id),
            _job.status.not_in(FINAL),
        )
        .limit(1)
    ).one_or_none()
    if user is not None:
        raise FileInUse(f"The job ftjob-{user.id.hex} has not finished and uses this file.")
    row = tx.execute(
        update(models.file)
        .where(_file.id == file_id)
        .values(deleted_at=now())
        .returning(models.file)
    ).one()
    return _file_of(row)


def lock_for_job(
    tx: Connection,
    public_id: str,
    *,
    tenant_id: UUID,
    param: Literal["training_file", "validation_file"],
) -> StoredFile:
    """The prompts a new job names, kept from deletion until the transaction ends.

    FileNotFound_, FileExpired, InvalidFilePurpose, InvalidTrainingFile or InvalidValidationFile,
    each with the `param`.
    """
    wanted = {"file": _id_in_body(public_id, param), "tenant": tenant_id}
    row = tx.execute(_LOCK, wanted).one_or_none()
    if row is None:
        raise FileNotFound_(f"{param}: there is no file {public_id!r}.", param=param)
    fields = row._asdict()
    if fields.pop("is_expired"):
        raise FileExpired(f"{param}: {public_id} has expired; upload it again.", param=param)
    file = StoredFile(**fields)
    if file.purpose != TRAINING_PURPOSE:
        raise InvalidFilePurpose(
            f"{param}: {public_id} was uploaded with purpose {file.purpose!r}, "
            f"not {TRAINING_PURPOSE!r}.",
            param=param,
        )
    if file.status != "processed" or not file.rows:
        raise _bad_rows(file, param)
    return file


# Built once: building takes longer than the database's answer.
_LOCK = (
    select(models.file, (_file.expires_at <= now()).label("is_expired"))
    .where(
        _file.id == bindparam("file"),
        _file.tenant_id == bindparam("tenant"),
        _file.deleted_at.is_(None),
    )
    .with_for_update(read=True)
)


def _id_in_body(public_id: str, param: str) -> UUID:
    try:
        return file_id_of(public_id)
    except FileNotFound_ as error:
        raise FileNotFound_(f"{param}: {error.message}", param=param) from None


def _bad_rows(file: StoredFile, param: str) -> InvalidTrainingFile | InvalidValidationFile:
    kind = InvalidTrainingFile if param == "training_file" else InvalidValidationFile
    name = public_file_id(file.id)
    return kind(
        f"{param}: {name} has rows that cannot be used; "
        f"GET /v1/files/{name}/validation lists all of them.",
        param=param,
    )
