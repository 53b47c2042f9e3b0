"""The same POST twice does the work once; how repeats are told is in `core/idempotency.py`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from sqlalchemy import Connection

from api.strict_json import canonical_json
from core.idempotency import Repeatable, parse_key, replay, store
from core.keys import Caller


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a 2xx answer."""

    body: str
    is_replay: bool

    @property
    def headers(self) -> dict[str, str]:
        """Says so when the work was done earlier."""
        return {"Idempotent-Replayed": "true"} if self.is_replay else {}


def identify(request: Request, caller: Caller, body: Any) -> Repeatable:
    """What makes this request the same as another; `body` is what its body means."""
    count = request.headers.get("x-stainless-retry-count", "")
    return Repeatable(
        tenant_id=caller.tenant_id,
        caller=caller.key_id,
        key=parse_key(request.headers.get("idempotency-key")),
        retry_count=int(count) if count.isdecimal() and count.isascii() and len(count) < 4 else 0,
        method=request.method,
        path=request.url.path,
        query=request.url.query,
        body_sha256=hashlib.sha256(canonical_json(body)).digest(),
    )


def once(tx: Connection, request: Repeatable, work: Callable[[], BaseModel]) -> Answer:
    """The answer of `work`, or the kept one, byte by byte, if this request was served before."""
    kept = replay(tx, request)
    if kept is not None:
        return Answer(kept["body"], is_replay=True)
    body = work().model_dump_json()
    # Stored as text, since jsonb would reorder the keys.
    store(tx, request, {"body": body})
    return Answer(body, is_replay=False)
