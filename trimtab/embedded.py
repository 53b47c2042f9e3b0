"""Embedded Postgres and Valkey for whoever needs them: `with EmbeddedServers(home) as servers`.

The servers belong to a guard process (`trimtab.guard`), which lives as long as this process.
"""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from trimtab.servers import (
    API_ROLE,
    DATABASE,
    HOST,
    OWNER_ROLE,
    VALKEY_ADMIN,
    VALKEY_USER,
    WORKER_ROLE,
    open_log,
    postgres_answers,
    valkey_answers,
)
from trimtab.state import StateError, StateHome

START_SECONDS = 150.0
STOP_SECONDS = 40.0


class EmbeddedServersError(Exception):
    """The embedded servers did not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where the servers are and how to enter them. Addresses and passwords stay out of `repr`."""

    owner_url: str = field(repr=False)
    api_url: str = field(repr=False)
    worker_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    redis_admin_url: str = field(repr=False)
    api_password: str = field(repr=False)
    worker_password: str = field(repr=False)
    postgres_pid: int
    valkey_pid: int
    guard_pid: int


class EmbeddedServers:
    """Postgres and Valkey on `home`, up while the context is open.

    When another process runs them on the same directory already, this one attaches to them and
    leaves them running; they end with the process that started them.
    """

    def __init__(self, home: Path, *, fsync: bool = True) -> None:
        self.home = StateHome(home)
        self._fsync = fsync
        self._guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close)
            while not (self._started() or self._attached(deadline)):
                if time.monotonic() > deadline:
                    raise EmbeddedServersError(f"another guard holds {self.home.path}")
            on_failure.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def is_owner(self) -> bool:
        """Whether the servers end with this context; False when it attached to running ones."""
        return self._guard is not None

    def is_guarded(self) -> bool:
        """Whether a guard still watches over the servers."""
        return self.home.is_held()

    @property
    def endpoints(self) -> Endpoints:
        """The servers' addresses, with the process ids of this moment."""
        running, secrets = self.home.running(), self.home.secrets()
        postgres = f"{HOST}:{running.postgres_port}/{DATABASE}"
        valkey = f"{HOST}:{running.valkey_port}/0"
        return Endpoints(
            owner_url=f"postgresql://{OWNER_ROLE}:{secrets['owner_password']}@{postgres}",
            api_url=f"postgresql://{API_ROLE}:{secrets['api_password']}@{postgres}",
            worker_url=f"postgresql://{WORKER_ROLE}:{secrets['worker_password']}@{postgres}",
            redis_url=f"redis://{VALKEY_USER}:{secrets['redis_password']}@{valkey}",
            redis_admin_url=f"redis://{VALKEY_ADMIN}:{secrets['redis_admin_password']}@{valkey}",
            api_password=secrets["api_password"],
            worker_password=secrets["worker_password"],
            postgres_pid=running.postgres_pid or 0,
            valkey_pid=running.valkey_pid or 0,
            guard_pid=running.guard_pid or 0,
        )

    def _started(self) -> bool:
        """Whether our own guard runs the servers now; False when another one holds the home."""
        try:
            self.home.prepare()
        except (StateError, OSError) as fault:
            raise EmbeddedServersError(str(fault)) from fault
        options = [] if self._fsync else ["--no-fsync"]
        # -P: nothing in the current directory can pose as a module of the guard.
        command = [sys.executable, "-P", "-m", "trimtab.guard", str(self.home.path), *options]
        with open_log(self.home.logs / "guard.log") as log:
            self._guard = subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us alone; the guard sees us go
            )
        assert self._guard.stdout is not None  # noqa: S101 - a pipe was asked for
        line = self._guard.stdout.readline()
        report = json.loads(line) if line else {"start": "failed", "message": "the guard died"}
        if report["start"] == "ready":
            return True
        self._close()
        if report["start"] == "held":
            return False
        raise EmbeddedServersError(f"{report['message']} (see also {self.home.logs}/guard.log)")

    def _attached(self, deadline: float) -> bool:
        """Whether the servers of another guard answer; False when that guard is gone."""
        while self.home.is_held() and time.monotonic() < deadline:
            running = self.home.running()
            if (
                running.postgres_port
                and running.valkey_port
                and running.guard_pid
                and postgres_answers(running.postgres_port)
                and valkey_answers(running.valkey_port, self.home.secrets()["redis_admin_password"])
            ):
                return True
            time.sleep(0.1)
        return False

    def _close(self) -> None:
        """End the guard by closing its stdin, and wait until its servers are gone."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None  # noqa: S101 - as above
        assert guard.stdout is not None  # noqa: S101 - as above
        guard.stdin.close()
        try:
            guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            guard.kill()  # the servers carry a death signal
            guard.wait()
        guard.stdout.close()
