"""Files: prompts that users upload, and results of jobs under their file ids."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from sqlalchemy import Connection
from starlette.responses import Response, StreamingResponse

from api import schemas
from api.conditions import tagged
from api.deps import Api, FilesReader, FilesWriter, Nothing, Services
from api.downloads import Download, download
from api.errors import ApiError
from api.idempotency import identify, once
from api.openapi import bytes_answer, errors_of, query_parameters, upload_body
from api.paging import next_link, page
from api.query import FilesQuery, ValidationQuery, query_of
from api.routes.artifacts import artifact_download
from api.uploads import Upload, receive_upload
from api.views import file_view, result_view
from core import artifacts, files
from core.artifacts import Artifact
from core.errors import DomainError, FileNotFound_
from core.files import TRAINING_PURPOSE, StoredFile
from core.ids import file_id_of, public_file_id
from core.keys import Caller
from core.storage import Stored
from ppo_engine.rows import RowReport, check_prompt_file

log = structlog.get_logger()

router = APIRouter(prefix="/v1/files", tags=["files"])

MAX_FAULTS_STORED = 1000
"""Faults kept with the file; the others are found again from its bytes when asked for."""


@router.post(
    "",
    response_model=schemas.File,
    responses=errors_of(409, 413, 415, 422),
    openapi_extra=upload_body(),
)
def create_file(
    request: Request,
    caller: FilesWriter,
    services: Api,
    query: Nothing,
    upload: Annotated[Upload, Depends(receive_upload)],
) -> Response:
    """Store the file; one of prompts is checked line by line, and kept even if it is bad."""
    del query
    sha256 = upload.sha256()
    if upload.fields.sha256 not in (None, sha256):
        raise ApiError(
            "checksum_mismatch", f"The received bytes have sha256 {sha256}.", param="sha256"
        )
    meaning = {"file": sha256, "name": upload.filename, **upload.fields.model_dump()}
    identity = identify(request, caller, meaning)
    report = _check(upload)

    with services.database.begin() as tx:
        answer = once(tx, identity, lambda: _store(tx, services, caller, upload, report))
    return Response(answer.body, headers=answer.headers, media_type="application/json")


def _check(upload: Upload) -> RowReport | None:
    """What is wrong with the lines, for files of prompts."""
    if upload.fields.purpose != TRAINING_PURPOSE:
        return None
    upload.stream.seek(0)
    return check_prompt_file(upload.stream)


def _store(
    tx: Connection, services: Services, caller: Caller, upload: Upload, report: RowReport | None
) -> schemas.File:
    """Bytes first, then the row: a row means that the bytes are complete."""
    key = f"files/{caller.tenant_id}/{uuid.uuid4().hex}"
    stored = _put(services, key, upload)
    try:
        row = files.add(
            tx,
            files.NewFile(
                tenant_id=caller.tenant_id,
                created_by=caller.key_id,
                purpose=upload.fields.purpose,
                filename=upload.filename,
                bytes=stored.bytes,
                sha256=stored.sha256,
                uri=key,
                status=_status(report),
                rows=None if report is None else report.rows,
                report=None if report is None else _stored_report(report),
                expires_at=_expiry(upload),
            ),
        )
    except Exception:
        services.store.delete(key)
        raise
    return file_view(row)


def _put(services: Services, key: str, upload: Upload) -> Stored:
    try:
        return services.store.put(key, upload.chunks())
    except OSError as error:
        log.error("upload.not_stored", reason=error.strerror)  # noqa: TRY400  no stack needed
        raise ApiError(
            "storage_unavailable", "The file could not be stored.", headers={"Retry-After": "30"}
        ) from None


def _status(report: RowReport | None) -> files.FileStatus:
    if report is None:
        return "uploaded"
    return "processed" if report.valid else "error"


def _stored_report(report: RowReport) -> dict[str, Any]:
    whole = report.to_dict()
    whole["errors"] = whole["errors"][:MAX_FAULTS_STORED]
    whole["warnings"] = whole["warnings"][:MAX_FAULTS_STORED]
    return whole


def _expiry(upload: Upload) -> datetime | None:
    seconds = upload.fields.expires_after_seconds
    return None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)


@router.get(
    "",
    response_model=schemas.Page[schemas.File],
    responses=errors_of(),
    openapi_extra=query_parameters(FilesQuery),
)
def list_files(
    request: Request,
    caller: FilesReader,
    services: Api,
    query: Annotated[FilesQuery, Depends(query_of(FilesQuery))],
) -> Response:
    """Uploaded files by time, newest first."""
    with services.database.begin() as tx:
        found = files.page(
            tx,
            tenant_id=caller.tenant_id,
            limit=query.limit,
            after=None if query.after is None else _cursor(query.after),
            order=query.order,
            purpose=query.purpose,
        )
    views = [file_view(each) for each in found.files]
    view = schemas.Page[schemas.File](**page(views, has_more=found.has_more))
    return tagged(request, view, next_link(request, view))


def _cursor(after: str) -> uuid.UUID:
    try:
        return file_id_of(after)
    except DomainError:
        raise ApiError("invalid_cursor", f"after: {after!r} is no file id", param="after") from None


@router.get("/{file_id}", response_model=schemas.File, responses=errors_of(404))
def get_file(
    request: Request, file_id: str, caller: FilesReader, services: Api, query: Nothing
) -> Response:
    """The file, or a job's result of that id."""
    del query
    with services.database.begin() as tx:
        found = _find(tx, file_id, caller)
    view = result_view(found) if isinstance(found, Artifact) else file_view(found)
    return tagged(request, view)


def _find(tx: Connection, public_id: str, caller: Caller) -> StoredFile | Artifact:
    file_id = file_id_of(public_id)
    try:
        return files.get(tx, file_id, tenant_id=caller.tenant_id)
    except FileNotFound_:
        return artifacts.by_id(tx, file_id, tenant_id=caller.tenant_id)


@router.delete("/{file_id}", response_model=schemas.Deleted, responses=errors_of(404, 409))
def delete_file(
    file_id: str, caller: FilesWriter, services: Api, query: Nothing
) -> schemas.Deleted:
    """Remove the file, unless a job that has not ended uses it."""
    del query
    with services.database.begin() as tx:
        deleted = files.delete(tx, file_id_of(file_id), tenant_id=caller.tenant_id)
    services.store.delete(deleted.uri)
    return schemas.Deleted(id=public_file_id(deleted.id), object="file")


@router.head("/{file_id}/content", include_in_schema=False)
@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={**bytes_answer("The file's bytes"), **errors_of(404, 416)},
)
def get_content(
    request: Request, file_id: str, caller: FilesReader, services: Api, query: Nothing
) -> Response:
    """The bytes, as they were uploaded or as the job left them."""
    del query
    with services.database.begin() as tx:
        found = _find(tx, file_id, caller)
    if isinstance(found, Artifact):
        return artifact_download(request, services, found, found.path.rpartition("/")[2])
    return download(
        request,
        Download(
            filename=found.filename,
            media_type="application/octet-stream",  # whatever it is, browsers do not run it
            num_bytes=found.bytes,
            sha256=found.sha256,
            read=lambda start, stop: services.store.read(
                found.uri, start=start, length=stop - start
            ),
        ),
    )


@router.get(
    "/{file_id}/validation",
    response_model=schemas.Report,
    responses={
        **errors_of(404),
        200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}},
    },
    openapi_extra=query_parameters(ValidationQuery),
)
def get_validation(
    request: Request,
    file_id: str,
    caller: FilesReader,
    services: Api,
    query: Annotated[ValidationQuery, Depends(query_of(ValidationQuery))],
) -> Response:
    """What is wrong with the lines of a file of prompts."""
    with services.database.begin() as tx:
        found = files.get(tx, file_id_of(file_id), tenant_id=caller.tenant_id)
    if found.report is None:
        raise ApiError(
            "invalid_file_purpose",
            f"Only files of purpose {TRAINING_PURPOSE!r} are checked, not {found.purpose!r}.",
        )
    if query.format == "jsonl":
        lines = _all_faults(services, found)
        return StreamingResponse(lines, media_type="application/jsonl")
    return tagged(request, schemas.Report(file_id=public_file_id(found.id), **found.report))


def _all_faults(services: Services, found: StoredFile) -> Iterator[str]:
    """Every fault on a line of its own, read anew from the bytes."""
    with services.store.open(found.uri) as stream:
        report = check_prompt_file(stream)
    for fault in report.errors:
        yield json.dumps(asdict(fault), ensure_ascii=False) + "\n"
