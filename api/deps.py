"""What routes ask for: the process's services, the caller with a right, the body, the query."""

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import redis.asyncio
from fastapi import Depends, Request

from api.errors import ApiError
from api.query import NoQuery, query_of
from api.settings import ApiSettings
from api.strict_json import parse_json
from core.db import Database
from core.errors import InvalidApiKey
from core.keys import Caller, authenticate
from core.models_catalog import ModelCatalog
from core.storage import ArtifactStore

MAX_WAITING = 8
"""Requests that may hold a thread while they wait for a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What one API process holds open."""

    settings: ApiSettings
    database: Database
    stream_database: Database
    """Connections of their own, so that streams never wait behind requests or before them."""
    stream_threads: anyio.CapacityLimiter
    """Threads that streams read in, as many as those connections."""
    redis: redis.asyncio.Redis
    store: ArtifactStore
    catalog: ModelCatalog
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the process shuts down: whoever waits or streams ends."""
    waiting: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(MAX_WAITING)
    )


async def services_of(request: Request) -> Services:
    """The services of this process."""
    services: Services = request.app.state.services
    return services


Api = Annotated[Services, Depends(services_of)]


def bearer_key(header: str | None) -> str:
    """The key in an `Authorization` header."""
    scheme, _, key = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise InvalidApiKey("No API key: send `Authorization: Bearer <key>`.")
    return key.strip()


def authenticator(services: Services) -> Callable[[str | None], Caller]:
    """Who asks, by the `Authorization` header; one short read."""

    def authenticate_header(header: str | None) -> Caller:
        key = bearer_key(header)
        with services.database.read() as tx:
            return authenticate(tx, key)

    return authenticate_header


def _caller_with(scope: str) -> Callable[[Request], Awaitable[Caller]]:
    async def caller(request: Request) -> Caller:
        found: Caller = request.state.caller
        found.require(scope)
        return found

    return caller


JobsReader = Annotated[Caller, Depends(_caller_with("jobs:read"))]
JobsWriter = Annotated[Caller, Depends(_caller_with("jobs:write"))]
FilesReader = Annotated[Caller, Depends(_caller_with("files:read"))]
FilesWriter = Annotated[Caller, Depends(_caller_with("files:write"))]
ModelsReader = Annotated[Caller, Depends(_caller_with("models:read"))]


async def _json_object(request: Request) -> dict[str, Any]:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        got = media_type or "none"
        raise ApiError(
            "unsupported_media_type", f"Content-Type must be application/json, got {got}."
        )
    value = parse_json(await request.body())
    if not isinstance(value, dict):
        raise ApiError("invalid_type", "The body must be a JSON object.")
    return value


JsonObject = Annotated[dict[str, Any], Depends(_json_object)]
"""The body, parsed strictly; its fields are checked by the route."""

Nothing = Annotated[NoQuery, Depends(query_of(NoQuery))]
"""No query parameters."""
