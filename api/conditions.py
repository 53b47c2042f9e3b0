"""Entity tags, conditions on them, and the preference to wait for a change."""

import hashlib
import re

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

_WAIT = re.compile(r"(?:^|[,;\s])wait=([0-9]{1,4})(?:$|[,;\s])", re.IGNORECASE)
MAX_WAIT_SECONDS = 60


def matches(header: str | None, etag: str) -> bool:
    """Whether an `If-None-Match` header names this tag; weak tags count, as for any GET."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def tagged(request: Request, view: BaseModel, headers: dict[str, str] | None = None) -> Response:
    """The view as JSON with a strong tag, or 304 when the client has it already."""
    body = view.model_dump_json().encode()
    etag = etag_of(body)
    headers = {**(headers or {}), "ETag": etag, "Cache-Control": "private, no-cache"}
    if request.method == "GET" and matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def etag_of(body: bytes) -> str:
    """A strong tag: the digest of the answer's bytes."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def wait_seconds(request: Request) -> int:
    """Seconds of `Prefer: wait=N`, at most 60; 0 without it."""
    match = _WAIT.search(request.headers.get("prefer", ""))
    return min(int(match[1]), MAX_WAIT_SECONDS) if match else 0
