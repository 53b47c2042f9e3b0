"""Stored bytes as an answer: one range, conditions, digests, HEAD."""

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from api.conditions import matches
from api.errors import ApiError

_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Bytes as they are now, and what is known about them."""

    filename: str
    media_type: str
    num_bytes: int
    sha256: str
    read: Callable[[int, int], Iterator[bytes]]
    """The bytes from the first offset up to, not including, the second."""
    is_lasting: bool = True
    """Whether the address will always name these bytes."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` up to, not including, `stop`."""

    start: int
    stop: int


def download(request: Request, stored: Download) -> Response:
    """The whole (200), the one range asked for (206), or nothing new (304)."""
    headers = _headers(stored)
    if matches(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers={"ETag": headers["ETag"]})
    span = _wanted(request, stored, headers["ETag"])
    status = 200
    if span is None:
        span = Span(0, stored.num_bytes)
    else:
        status = 206
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{stored.num_bytes}"
    headers["Content-Length"] = str(span.stop - span.start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=stored.media_type)
    chunks = stored.read(span.start, span.stop)
    return StreamingResponse(chunks, status, headers, media_type=stored.media_type)


def _headers(stored: Download) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(stored.sha256)).decode()
    return {
        "ETag": f'"sha256-{stored.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, immutable" if stored.is_lasting else "private, no-cache",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
    }


def _wanted(request: Request, stored: Download, etag: str) -> Span | None:
    """The range to send; None for the whole."""
    text = request.headers.get("range")
    if text is None or request.headers.get("if-range", etag) != etag:
        return None
    return parse_range(text, stored.num_bytes)


def parse_range(text: str, num_bytes: int) -> Span | None:
    """The one range of a header; None where it is to be ignored (several, or malformed)."""
    match = _RANGE.fullmatch(text.strip().replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        span = Span(max(0, num_bytes - int(last)), num_bytes)
    elif last and int(last) < int(first):
        return None
    else:
        span = Span(int(first), min(int(last) + 1, num_bytes) if last else num_bytes)
    if span.start >= num_bytes:
        raise ApiError(
            "range_not_satisfiable",
            f"The range starts at or beyond the end; there are {num_bytes} bytes.",
            headers={"Content-Range": f"bytes */{num_bytes}"},
        )
    return span
