"""Whether the process lives and can serve, what its errors mean: answers that need no key."""

import anyio
from fastapi import APIRouter
from redis.exceptions import RedisError
from starlette.responses import JSONResponse

from api import schemas
from api.deps import Api, Nothing, Services
from api.error_codes import ERROR_CODES
from api.errors import ApiError
from api.schema_version import SchemaState, schema_state
from core.errors import DatabaseUnavailable

router = APIRouter(prefix="/v1", tags=["service"])

REDIS_SECONDS = 1.0
"""How long readiness waits for Redis."""


@router.get("/healthz", response_model=schemas.Health)
def healthz(query: Nothing) -> schemas.Health:
    """The process lives."""
    del query
    return schemas.Health()


@router.get(
    "/readyz", response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}}
)
def readyz(services: Api, query: Nothing) -> JSONResponse:
    """Whether requests can be served; without Redis they can, and streams are slower."""
    del query
    state = _schema_state(services)
    view = schemas.Readiness(
        status="ready" if state is SchemaState.CURRENT else "unavailable",
        database="unavailable" if state is None else "ok",
        schema_="unknown" if state is None else state.value,
        redis=anyio.from_thread.run(_redis_state, services),
    )
    body = view.model_dump(mode="json", by_alias=True)
    return JSONResponse(body, 200 if view.status == "ready" else 503)


def _schema_state(services: Services) -> SchemaState | None:
    """None when the database does not answer."""
    try:
        with services.database.begin() as tx:
            return schema_state(tx)
    except DatabaseUnavailable:
        return None


async def _redis_state(services: Services) -> str:
    try:
        with anyio.fail_after(REDIS_SECONDS):
            await services.redis.ping()
    except (OSError, TimeoutError, RedisError):
        return "unavailable"
    return "ok"


@router.get("/errors/{code}", response_model=schemas.ErrorMeaning)
def error_meaning(code: str, query: Nothing) -> schemas.ErrorMeaning:
    """What an error code means and what to do about it."""
    del query
    if code not in ERROR_CODES:
        raise ApiError("error_not_found", "There is no such error code.")
    about = ERROR_CODES[code]
    return schemas.ErrorMeaning(
        code=code,
        status=about.status,
        title=about.title,
        remedy=about.remedy,
        retryable=not about.is_permanent or about.status >= 500,
    )
