"""API keys and tenants: making, checking, listing, revoking.

A key is `sk-tt-<id>_<secret>`; the database holds the secret's SHA-256, which is enough for 256
random bits.
"""

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import Connection, Row, and_, bindparam, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from core import models
from core.db import now
from core.errors import InsufficientScope, InvalidApiKey, InvalidRequest, NotFound

PREFIX = "sk-tt-"
SCOPES = (
    "jobs:read",
    "jobs:write",
    "files:read",
    "files:write",
    "models:read",
    "chat",
    "admin",
)
"""Every right there is."""

LOCAL_TENANT = "local"

_ID_LETTERS = string.ascii_lowercase + string.digits
_ID_LENGTH = 12
_FRESH_SECONDS = 60
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NOBODY = hashlib.sha256(b"").digest()

_key = models.api_key.c
_tenant = models.tenant.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks."""

    key_id: UUID
    tenant_id: UUID
    tenant_slug: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """InsufficientScope unless the key has this right."""
        if scope not in self.scopes:
            raise InsufficientScope(f"The API key lacks the scope {scope!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it may be shown: without its secret."""

    id: UUID
    public_id: str
    tenant_id: UUID
    tenant_slug: str
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key just made; the only time its secret exists in the clear."""

    key: ApiKey
    secret: SecretStr
    """The whole text a client sends."""


def create(
    tx: Connection,
    *,
    tenant: str,
    name: str,
    scopes: Sequence[str] = SCOPES,
    expires_at: datetime | None = None,
) -> NewKey:
    """A new key of the tenant, which is made when it is new.  Needs the owner's role."""
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise InvalidRequest(
            f"unknown scope {unknown[0]!r}; there are: {', '.join(SCOPES)}", param="scopes"
        )
    public_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
    secret = secrets.token_urlsafe(32)
    row = tx.execute(
        insert(models.api_key)
        .values(
            tenant_id=_tenant_id(tx, tenant),
            public_id=public_id,
            name=name,
            secret_sha256=_digest(secret),
            scopes=list(scopes),
            expires_at=expires_at,
        )
        .returning(models.api_key)
    ).one()
    return NewKey(key=_key_of(row, tenant), secret=SecretStr(f"{PREFIX}{public_id}_{secret}"))


def authenticate(tx: Connection, presented: str) -> Caller:
    """Who owns this key; InvalidApiKey, always the same, if nobody does any more."""
    public_id, secret = _split(presented)
    row = tx.execute(_FIND, {"key": public_id}).one_or_none()
    expected = _NOBODY if row is None else row.secret_sha256
    is_right = hmac.compare_digest(expected, _digest(secret))
    if row is None or not is_right or not row.is_live:
        raise InvalidApiKey
    if row.is_stale:
        _note_use(tx, row.id)
    return Caller(
        key_id=row.id,
        tenant_id=row.tenant_id,
        tenant_slug=row.slug,
        scopes=frozenset(row.scopes),
    )


def is_live(tx: Connection, key_id: UUID) -> bool:
    """Whether the key still counts; asked by streams that are open for long."""
    row = tx.execute(select(_is_live()).where(_key.id == key_id)).one_or_none()
    return row is not None and bool(row[0])


def keys(tx: Connection, *, tenant: str | None = None) -> list[ApiKey]:
    """All keys, or those of one tenant, oldest first."""
    statement = (
        select(models.api_key, _tenant.slug)
        .join(models.tenant, _tenant.id == _key.tenant_id)
        .order_by(_key.created_at, _key.id)
    )
    if tenant is not None:
        statement = statement.where(_tenant.slug == tenant)
    return [_key_of(row, row.slug) for row in tx.execute(statement).all()]


def revoke(tx: Connection, public_id: str) -> ApiKey:
    """The key, of no use from the commit on; NotFound if there is none.  Needs the owner's role."""
    row = tx.execute(
        update(models.api_key)
        .where(_key.public_id == public_id, _tenant.id == _key.tenant_id)
        .values(revoked_at=func.coalesce(_key.revoked_at, now()))
        .returning(models.api_key, _tenant.slug)
    ).one_or_none()
    if row is None:
        raise NotFound(f"There is no key {public_id!r}.")
    return _key_of(row, row.slug)


def _tenant_id(tx: Connection, slug: str) -> UUID:
    if not _SLUG.fullmatch(slug):
        raise InvalidRequest(
            "a tenant's name has 1 to 63 of a-z, 0-9 and inner hyphens", param="tenant"
        )
    tx.execute(insert(models.tenant).values(slug=slug).on_conflict_do_nothing())
    found: UUID = tx.execute(select(_tenant.id).where(_tenant.slug == slug)).scalar_one()
    return found


def _key_of(row: Row[Any], slug: str) -> ApiKey:
    return ApiKey(
        id=row.id,
        public_id=row.public_id,
        tenant_id=row.tenant_id,
        tenant_slug=slug,
        name=row.name,
        scopes=tuple(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _split(presented: str) -> tuple[str, str]:
    """Id and secret; an id that cannot exist if the text is no key."""
    public_id, _, secret = presented.removeprefix(PREFIX).partition("_")
    is_key = presented.startswith(PREFIX) and set(public_id) <= set(_ID_LETTERS)
    return (public_id if is_key else "", secret)


def _is_live() -> Any:
    return and_(_key.revoked_at.is_(None), or_(_key.expires_at.is_(None), _key.expires_at > now()))


def _is_stale() -> Any:
    """Whether the last use must be noted anew; a write per request would cost too much."""
    long_ago = now() - func.make_interval(0, 0, 0, 0, 0, 0, _FRESH_SECONDS)
    return or_(_key.last_used_at.is_(None), _key.last_used_at < long_ago)


def _note_use(tx: Connection, key_id: UUID) -> None:
    """Remember the time; a row that another request is just noting is left alone."""
    free = select(_key.id).where(_key.id == key_id, _is_stale()).with_for_update(skip_locked=True)
    tx.execute(
        update(models.api_key).where(_key.id.in_(free.scalar_subquery())).values(last_used_at=now())
    )


# Built once: building takes longer than the database's answer.
_FIND = (
    select(
        models.api_key,
        _tenant.slug,
        _is_live().label("is_live"),
        _is_stale().label("is_stale"),
    )
    .join(models.tenant, _tenant.id == _key.tenant_id)
    .where(_key.public_id == bindparam("key"))
)
