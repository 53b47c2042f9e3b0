"""Multipart uploads: the form spooled to disk while it arrives, then its fields checked."""

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from api.errors import ApiError, bad_request
from api.faults import faults_of
from api.middleware import file_too_large
from api.strict_json import check_texts
from core.errors import Fault

CHUNK_BYTES = 1 << 20
PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
"""Purposes of OpenAI's clients; files of any but the first are stored unchecked."""


class UploadFields(BaseModel):
    """The fields beside the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: str = Field(pattern=f"^({'|'.join(PURPOSES)})$")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    expires_after_anchor: str | None = Field(
        None, alias="expires_after[anchor]", pattern="^created_at$"
    )
    expires_after_seconds: int | None = Field(
        None, alias="expires_after[seconds]", ge=3600, le=2_592_000
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that has arrived completely, and what it is for."""

    stream: BinaryIO
    filename: str
    fields: UploadFields

    def chunks(self) -> Iterator[bytes]:
        """The bytes from the start."""
        self.stream.seek(0)
        while chunk := self.stream.read(CHUNK_BYTES):
            yield chunk

    def sha256(self) -> str:
        """Digest of the bytes, in hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """The form of a request; its temporary file is gone after the answer."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        got = media_type or "none"
        raise ApiError(
            "unsupported_media_type", f"Content-Type must be multipart/form-data, got {got}."
        )
    async with request.form(max_files=1, max_fields=20, max_part_size=4096) as form:
        yield _checked(form, request.app.state.services.settings.max_file_bytes)


def _checked(form: FormData, max_file_bytes: int) -> Upload:
    file = form.get("file")
    fields, faults = _fields(form)
    if file is None:
        faults.insert(0, Fault("/file", "missing_required_parameter", "file is required"))
    elif not isinstance(file, UploadFile):
        faults.insert(0, Fault("/file", "invalid_type", "file must be a file, with a filename"))
    if faults or fields is None or not isinstance(file, UploadFile):
        raise bad_request(faults)
    if (file.size or 0) > max_file_bytes:
        raise file_too_large(max_file_bytes)
    return Upload(stream=file.file, filename=_filename(file.filename or "upload"), fields=fields)


def _fields(form: FormData) -> tuple[UploadFields | None, list[Fault]]:
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if name in values:
            detail = f"{name} stands twice in the form; give it once"
            return None, [Fault(f"/{name}", "conflicting_parameters", detail)]
        values[name] = value
    return _validated(values)


def _validated(values: Mapping[str, Any]) -> tuple[UploadFields | None, list[Fault]]:
    check_texts(text for pair in values.items() for text in pair if isinstance(text, str))
    try:
        fields = UploadFields.model_validate(values)
    except ValidationError as error:
        return None, faults_of(error, UploadFields)
    anchor, seconds = fields.expires_after_anchor, fields.expires_after_seconds
    if (anchor is None) != (seconds is None):
        detail = "expires_after needs both anchor and seconds"
        return None, [Fault("/expires_after", "invalid_combination", detail)]
    return fields, []


def _filename(name: str) -> str:
    """A name is text, never a path."""
    check_texts([name])
    if len(name) > 255:
        raise ApiError(
            "string_above_max_length", "The filename may have 255 characters.", param="file"
        )
    return name
