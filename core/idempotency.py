"""Repeats of a POST: the answer is stored in the transaction that does the work.

Only transactions that commit leave an answer, so only successes are replayed.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Text, bindparam, delete, func, insert, select

from core import models
from core.db import now
from core.errors import IdempotencyInProgress, IdempotencyKeyReused, InvalidIdempotencyKey

LIFETIME = timedelta(hours=24)
"""How long an answer is kept."""

RETRY_WINDOW = timedelta(minutes=15)
"""How long after a request without a key its retry is recognised."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_row = models.idempotency.c

# Built once: building takes longer than the database's answer.
_HASH = func.hashtextextended(bindparam("name", type_=Text), 0)
_LOCK = select(func.pg_try_advisory_xact_lock(_HASH))
_LOCK_SHARED = select(func.pg_try_advisory_xact_lock_shared(_HASH))
_INSERT = insert(models.idempotency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeatable:
    """A POST as far as it matters for telling a repeat from a new request."""

    tenant_id: UUID
    caller: UUID
    """Id of the API key."""
    method: str
    path: str
    query: str
    body_sha256: bytes
    """Digest of the parsed body."""
    key: str | None = None
    """From `Idempotency-Key`, through `parse_key`."""
    retry_count: int = 0
    """From `x-stainless-retry-count`."""


def parse_key(header: str | None) -> str | None:
    """The key in the header, quoted or bare; InvalidIdempotencyKey if it is none."""
    if header is None:
        return None
    text = header.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if not _KEY.fullmatch(text):
        raise InvalidIdempotencyKey(param="Idempotency-Key")
    return text


def replay(tx: Connection, request: Repeatable) -> dict[str, Any] | None:
    """The stored answer if this is a repeat, else None: then do the work and `store` its answer.

    IdempotencyKeyReused if the key came with another request; IdempotencyInProgress while the
    first one is still running in another transaction.
    """
    _lock(tx, request)
    return _by_key(tx, request) if request.key is not None else _by_retry(tx, request)


def store(tx: Connection, request: Repeatable, answer: Mapping[str, Any]) -> None:
    """Keep the answer beside the work; it counts from the commit on."""
    if request.key is not None:
        tx.execute(
            delete(models.idempotency).where(
                _row.tenant_id == request.tenant_id,
                _row.key == request.key,
                _row.created_at <= now() - LIFETIME,
            )
        )
    values = {
        "tenant_id": request.tenant_id,
        "key": request.key or f"drawn {secrets.token_hex(16)}",  # a blank: no header can hold it
        "caller": request.caller,
        "retry_count": request.retry_count,
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "body_sha256": request.body_sha256,
        "answer": dict(answer),
    }
    tx.execute(_INSERT, values)


def sweep(tx: Connection) -> int:
    """Forget answers past their time; how many there were."""
    return tx.execute(
        delete(models.idempotency).where(_row.created_at <= now() - LIFETIME)
    ).rowcount


def _lock(tx: Connection, request: Repeatable) -> None:
    """One request of a kind at a time, until the transaction ends.

    First requests without a key may run side by side: two equal ones are two wishes.
    """
    if request.key is not None:
        name = f"key {request.tenant_id} {request.key}"
        lock = _LOCK
    else:
        digest = request.body_sha256.hex()
        name = f"body {request.caller} {request.method} {request.path} {request.query} {digest}"
        lock = _LOCK if request.retry_count > 0 else _LOCK_SHARED
    if not tx.execute(lock, {"name": name}).scalar_one():
        raise IdempotencyInProgress


def _by_key(tx: Connection, request: Repeatable) -> dict[str, Any] | None:
    row = tx.execute(
        select(models.idempotency).where(
            _row.tenant_id == request.tenant_id,
            _row.key == request.key,
            _row.created_at > now() - LIFETIME,
        )
    ).one_or_none()
    if row is None:
        return None
    first = (row.method, row.path, row.query, row.body_sha256)
    if first != (request.method, request.path, request.query, request.body_sha256):
        raise IdempotencyKeyReused(
            "This Idempotency-Key came with another request before; draw a new key."
        )
    answer: dict[str, Any] = row.answer
    return answer


def _by_retry(tx: Connection, request: Repeatable) -> dict[str, Any] | None:
    """The answer that the client of a retry without a key never saw.

    Of any earlier try: one that met a running request left nothing behind.
    """
    if request.retry_count == 0:
        return None
    answer: dict[str, Any] | None = tx.execute(
        select(_row.answer)
        .where(
            _row.caller == request.caller,
            _row.method == request.method,
            _row.path == request.path,
            _row.query == request.query,
            _row.body_sha256 == request.body_sha256,
            _row.retry_count < request.retry_count,
            _row.created_at > now() - RETRY_WINDOW,
        )
        .order_by(_row.created_at.desc())
        .limit(1)
    ).scalar_one_or_none()
    return answer
