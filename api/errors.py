"""What the API says when something goes wrong: one table from errors to answers.

ApiError                     raised by this package, carries a code of `api.error_codes`
core.errors.DomainError      knows no HTTP; its code picks the status
anything else                an outage of the database (503) or our own fault (500)
"""

from collections.abc import Mapping, Sequence

import structlog
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from api.error_codes import ERROR_CODES
from core.errors import (
    DatabaseUnavailable,
    DomainError,
    Fault,
    IdempotencyInProgress,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    ServerFault,
)

PROBLEM = "application/problem+json"
"""Media type of every error; the `openai` client parses it because it ends in `json`."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
"""OpenAI's `error.type` by status; other 4xx are `invalid_request_error`."""

log = structlog.get_logger()


class ApiError(Exception):
    """The request cannot be served."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int | None = None,
        param: str | None = None,
        line: int | None = None,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.status = ERROR_CODES[code].status if status is None else status
        pointer = "" if param is None else "/" + param.replace(".", "/")
        self.faults = tuple(faults) or (Fault(pointer, code, detail, line),)
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


def as_api_error(error: Exception) -> ApiError:
    """The answer to any error; what is not foreseen is `internal_error` and logged."""
    match error:
        case ApiError():
            return error
        case DatabaseUnavailable() | OperationalError():
            log.warning("database.unavailable", error=str(error).partition("\n")[0])
            return ApiError(
                "database_unavailable",
                "The database does not answer; nothing was changed.",
                headers={"Retry-After": "2"},
            )
        case DomainError() if not isinstance(error, ServerFault):
            return _domain_error(error)
        case HTTPException():
            return _routing_error(error)
        case _:
            log.error("request.failed", exc_info=error)
            return ApiError("internal_error", "The server failed; the request id finds the cause.")


def _domain_error(error: DomainError) -> ApiError:
    first = error.faults[0].code if error.faults else error.code
    return ApiError(
        first,
        error.message,
        status=_status(error),
        param=error.param,
        faults=error.faults,
        headers=_headers(error),
    )


def _headers(error: DomainError) -> dict[str, str]:
    match error:
        case IdempotencyInProgress():
            return {"Retry-After": "1"}
        case InvalidApiKey():
            return {"WWW-Authenticate": "Bearer"}
        case _:
            return {}


def _status(error: DomainError) -> int:
    """What a request names in its body is its own fault (400); in the path it is missing (404)."""
    is_in_body = isinstance(error, InvalidRequest) or (
        isinstance(error, NotFound) and error.param is not None
    )
    return 400 if is_in_body else ERROR_CODES[error.code].status


def bad_request(faults: Sequence[Fault]) -> ApiError:
    """All faults of a request in one 400; the first one speaks for it."""
    first = faults[0]
    return ApiError(first.code, first.detail, status=400, faults=faults)


def _routing_error(error: HTTPException) -> ApiError:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        detail = f"This address does not take the method; it takes {allowed}."
        return ApiError("method_not_allowed", detail, headers=headers)
    if error.status_code == 404:
        return ApiError("unknown_url", "There is nothing at this address.")
    return ApiError("invalid_multipart", str(error.detail), status=400)


def problem(error: ApiError, request: Request) -> JSONResponse:
    """The answer: RFC 9457's members and OpenAI's `error` in one object."""
    status = error.status
    faults = [
        {"pointer": fault.pointer, "line": fault.line, "code": fault.code, "detail": fault.detail}
        for fault in error.faults
    ]
    body = {
        "type": f"/v1/errors/{error.code}",
        "title": ERROR_CODES[error.code].title,
        "status": status,
        "detail": error.detail,
        "instance": request.url.path,
        "request_id": getattr(request.state, "request_id", None),
        "errors": faults,
        "error": {
            "message": error.detail,
            "type": _type(status),
            "param": error.faults[0].param,
            "code": error.code,
        },
    }
    headers = dict(error.headers)
    if status in (409, 429) and ERROR_CODES[error.code].is_permanent:
        # Without this header the client repeats each 409 and 429 twice.
        headers["x-should-retry"] = "false"
    return JSONResponse(body, status, headers, media_type=PROBLEM)


def _type(status: int) -> str:
    return "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the application: the one place where errors become answers."""
    return problem(as_api_error(error), request)
