"""`python -m api`: serve until SIGTERM or Ctrl-C, then let requests end for ten seconds."""

import socket
import sys
from importlib.util import find_spec

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError

from api.app import create_app
from api.deps import Services
from api.schema_version import SchemaState, schema_state
from api.settings import ApiSettings
from core import logs
from core.errors import DatabaseUnavailable

GRACE_SECONDS = 10

EXIT_SETTINGS = 64
EXIT_START = 69


class Server(uvicorn.Server):
    """A server that tells streams and waiting requests to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End streams first: the lifespan would tell them only after they have ended."""
        self._services.stopping.set()
        await super().shutdown(sockets)


def main() -> int:
    """Serve; the exit status of the process."""
    try:
        settings = ApiSettings.from_environment()
    except ValidationError as error:
        missing = ", ".join(str(one["loc"][0]) for one in error.errors())
        sys.stderr.write(f"api: missing or wrong settings: {missing}\n")
        return EXIT_SETTINGS
    logs.configure(log_format=settings.log_format)
    if settings.metrics_port and find_spec("prometheus_client") is None:
        sys.stderr.write(
            "api: TRIMTAB_METRICS_PORT is set, but prometheus-client is not installed; "
            "install trimtab[metrics], or unset the variable\n"
        )
        return EXIT_SETTINGS
    app = create_app(settings)
    if hindrance := hindrance_to_start(app.state.services):
        sys.stderr.write(f"api: {hindrance}\n")
        return EXIT_START
    server = make_server(app, settings)
    if settings.metrics_port:
        try:
            app.state.exposition.serve(settings.metrics_host, settings.metrics_port)
        except OSError as error:
            place = f"{settings.metrics_host}:{settings.metrics_port}"
            sys.stderr.write(
                f"api: /metrics cannot be served on {place}: {error.strerror}; "
                "change TRIMTAB_METRICS_PORT\n"
            )
            return EXIT_START
    server.run()
    if settings.metrics_port:
        app.state.exposition.end()
    return 0 if server.started else EXIT_START


def hindrance_to_start(services: Services) -> str | None:
    """Why the process cannot serve, and what to do about it; None if it can."""
    try:
        with services.database.begin() as tx:
            state = schema_state(tx)
    except (DatabaseUnavailable, OperationalError):
        return "the database does not answer; check DATABASE_URL"
    if state is not SchemaState.CURRENT:
        return "the database has not the tables of this version; run `python -m migrations` first"
    return None


def make_server(app: FastAPI, settings: ApiSettings) -> Server:
    """The server on the address of the settings."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="on",
    )
    return Server(config, app.state.services)


if __name__ == "__main__":
    sys.exit(main())
