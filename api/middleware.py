"""What happens to every request before its route: id, clock, API key, count of received bytes.

The key is checked before the body is read, so that strangers cannot make the server parse or
store anything.  Bytes are counted as they arrive: `Content-Length` may be absent or wrong.
"""

import time
import uuid
from collections.abc import Callable

import anyio.to_thread
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, as_api_error, problem
from core.keys import Caller

PUBLIC_PATHS = ("/v1/healthz", "/v1/readyz", "/v1/openapi.json", "/v1/errors/")
"""Addresses that need no key."""

FILES_PATH = "/v1/files"
MULTIPART_SLACK = 64 * 1024
"""Bytes that boundaries and small fields of an upload may add to its file."""

log = structlog.get_logger()


class RequestLog:
    """Gives each request its id and each answer its standard headers, and catches everything."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, and answer whatever error comes out."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        request_id = f"req_{uuid.uuid4().hex}"
        request.state.request_id = request_id
        started = time.perf_counter()
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                milliseconds = round((time.perf_counter() - started) * 1000)
                _add_headers(message, request_id=request_id, milliseconds=milliseconds)
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001  outermost: whatever it is, the client gets an answer
            answer = problem(as_api_error(error), request)
            if status is None:
                await answer(scope, receive, send_with_headers)
        finally:
            log.info(
                "request.done",
                method=request.method,
                path=request.url.path,
                status=status,
                seconds=round(time.perf_counter() - started, 4),
                client_request_id=request.headers.get("x-client-request-id"),
            )


def _add_headers(message: Message, *, request_id: str, milliseconds: int) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    headers["openai-processing-ms"] = str(milliseconds)
    headers["X-Content-Type-Options"] = "nosniff"
    headers.setdefault("Cache-Control", "no-store")


class Gate:
    """Lets a request with a valid key through, and its body up to the limit of its address."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticate: Callable[[str | None], Caller],
        max_body_bytes: int,
        max_file_bytes: int,
    ) -> None:
        self.app = app
        self._authenticate = authenticate
        self._max_body_bytes = max_body_bytes
        self._max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or refuse it before its body is read."""
        if scope["type"] != "http" or not _needs_key(scope["path"]):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            request.state.caller = await anyio.to_thread.run_sync(
                self._authenticate, request.headers.get("authorization")
            )
            counted = self._counted(scope, receive)
        except Exception as error:  # noqa: BLE001  as_api_error logs what it does not know
            await problem(as_api_error(error), request)(scope, receive, send)
            return
        await self.app(scope, counted, send)

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, refusing the body once more bytes have come than the address takes."""
        limit, too_large = self._limit(scope)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        return counted

    def _limit(self, scope: Scope) -> tuple[int, ApiError]:
        if scope["path"] == FILES_PATH:
            return self._max_file_bytes + MULTIPART_SLACK, file_too_large(self._max_file_bytes)
        detail = f"The body may have {self._max_body_bytes} bytes."
        return self._max_body_bytes, ApiError("request_too_large", detail)


def file_too_large(max_file_bytes: int) -> ApiError:
    """The answer to a file over the limit."""
    detail = f"A file may have {max_file_bytes} bytes; split yours or shorten it."
    return ApiError("file_too_large", detail, param="file")


def _needs_key(path: str) -> bool:
    return path.startswith("/v1/") and not path.startswith(PUBLIC_PATHS)
