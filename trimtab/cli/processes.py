"""`trimtab api | worker | dispatcher | migrate | keys`: single processes, for systemd and compose.

Each replaces this process by `python -m ...`, so that signals and exit codes pass unchanged.
"""

import os
import sys
from collections.abc import Callable

import typer

from trimtab.home import Home

_COMMANDS = {
    "api": ("api", "Run the API server."),
    "worker": ("worker", "Run a worker, which takes one job at a time."),
    "dispatcher": ("worker.dispatcher", "Run the dispatcher, which hands out waiting jobs."),
    "migrate": ("migrations", "Bring the database up to date, as its owner."),
    "keys": ("api.keys", "Make, list and revoke API keys: create, list, revoke."),
}

_DATABASE = ("DATABASE_URL", "DATABASE_URL_FILE")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for name, (module, help_text) in _COMMANDS.items():
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command(
            name,
            help=f"{help_text}  Same as `python -m {module}`; settings come from the environment.",
            context_settings=settings,
        )(_replaced_by(module))


def _replaced_by(module: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        environment = {**_local_database(module), **os.environ}
        arguments = [sys.executable, "-P", "-m", module, *context.args]
        os.execve(sys.executable, arguments, environment)  # noqa: S606 - our own module

    return command


def _local_database(module: str) -> dict[str, str]:
    """Where the running local stack keeps its keys; nothing for other processes, or without it."""
    if module != "api.keys" or any(name in os.environ for name in _DATABASE):
        return {}
    from trimtab.embedded import EmbeddedServers

    servers = EmbeddedServers(Home.from_environment().path)
    if not servers.home.secrets_file.exists() or not servers.is_guarded():
        return {}
    return {"DATABASE_URL": servers.endpoints.owner_url}
