"""The application: routes, middleware, error answers, and what the process holds open."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.to_thread
import redis.asyncio
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from api import openapi
from api.deps import Services, authenticator
from api.errors import answer_error
from api.feed_hub import FeedHub
from api.feed_stream import OpenStreams
from api.middleware import Gate, RequestLog
from api.routes import (
    artifacts,
    clip,
    clip_tokens,
    diagnosis,
    explain,
    files,
    health,
    jobs,
    models,
    stream,
    timeline,
)
from api.settings import ApiSettings
from core.db import Database
from core.errors import DomainError
from core.models_catalog import ModelCatalog
from core.storage import ArtifactStore

VERSION = "0.1.0"
STREAM_CONNECTIONS = 4
"""Connections, and threads, that all streams share."""

ROUTERS = (
    health,
    jobs,
    timeline,
    clip,
    clip_tokens,
    diagnosis,
    explain,
    stream,
    artifacts,
    files,
    models,
)


def create_app(settings: ApiSettings) -> FastAPI:
    """The application; connections are opened when it starts and closed when it ends."""
    services = build_services(settings)
    hub = FeedHub(services)
    app = FastAPI(
        title="Trimtab",
        version=VERSION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(services, hub),
    )
    app.state.services = services
    app.state.feed_hub = hub
    app.state.open_streams = OpenStreams(settings.streams_per_tenant)
    for kind in (DomainError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    for module in ROUTERS:
        app.include_router(module.router)
    app.add_api_route("/v1/openapi.json", _openapi_document, include_in_schema=False)
    app.add_middleware(
        Gate,
        authenticate=authenticator(services),
        max_body_bytes=settings.max_body_bytes,
        max_file_bytes=settings.max_file_bytes,
    )
    app.add_middleware(RequestLog)
    if settings.metrics_port:
        # An extra that only this setting needs; `python -m api` says so when it is not there.
        from api.prometheus import Exposition  # noqa: PLC0415

        app.state.exposition = exposition = Exposition(services, hub)
        app.add_middleware(exposition.meter)
    return app


def build_services(settings: ApiSettings) -> Services:
    """What the process needs; nothing is connected before it is used."""
    url = settings.database_url.get_secret_value()
    return Services(
        settings=settings,
        database=Database(url, pool_size=settings.num_threads),
        stream_database=Database(url, pool_size=STREAM_CONNECTIONS),
        stream_threads=anyio.CapacityLimiter(STREAM_CONNECTIONS),
        redis=redis.asyncio.Redis.from_url(
            settings.redis_url.get_secret_value(), socket_timeout=5, socket_connect_timeout=1
        ),
        store=ArtifactStore(settings.artifacts),
        catalog=ModelCatalog(settings.models),
    )


def _lifespan(
    services: Services, hub: FeedHub
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        # As many threads as connections: requests queue before a thread, not inside one.
        anyio.to_thread.current_default_thread_limiter().total_tokens = (
            services.settings.num_threads
        )
        reading = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            services.stopping.set()
            await reading
            await services.redis.aclose()
            services.database.dispose()
            services.stream_database.dispose()

    return lifespan


def _openapi_document(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    return JSONResponse(openapi.document(request.app))
