"""`python -m trimtab.guard HOME`: the process that owns the embedded Postgres and Valkey.

It lives as long as its stdin, a pipe from whoever started it: end of file, even after kill -9,
means an orderly stop.  Its first and only line on stdout says how the start went.
"""

import argparse
import contextlib
import enum
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from trimtab.binaries import BinariesError
from trimtab.servers import Server, ServerError, free_port, is_free, make_servers, stop_left_over
from trimtab.state import HomeIsHeld, Running, StateError, StateHome

START_SECONDS = 60.0
STOP_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 5.0
LOOK_SECONDS = 0.05

log = logging.getLogger("trimtab.guard")


class Start(enum.StrEnum):
    """How a start went."""

    READY = "ready"
    HELD = "held"
    FAILED = "failed"


class Owner:
    """Whoever started the guard: present until stdin ends or SIGTERM comes.

    Ctrl-C and a closed terminal are the owner's to answer; the guard only hears of the result.
    """

    def __init__(self) -> None:
        self._is_gone = False
        self._wakeup, writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # Handlers rather than SIG_IGN, which the servers would inherit.
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._note)
        signal.signal(signal.SIGTERM, self._leave)

    def is_gone(self, within: float | None) -> bool:
        """Wait until the owner is gone, a child ended or the seconds are over; whether it is."""
        if not self._is_gone:
            stdin = sys.stdin.fileno()
            readable, _, _ = select.select([stdin, self._wakeup], [], [], within)
            if self._wakeup in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup, 4096)
            if stdin in readable and os.read(stdin, 4096) == b"":
                self._is_gone = True
        return self._is_gone

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Nothing: the wake-up pipe has told the loop."""

    def _leave(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_gone = True


class Keeper:
    """Keeps one server running: starts it, starts it again when it dies, stops it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._child: subprocess.Popen[bytes] | None = None
        self._answered = False
        self._pause_seconds = 0.0
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        """The running server's process id."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the server, after the remains of a former one have ended."""
        server = self.server
        stop_left_over(server, stop_signal=server.stop_signal)
        self._child = server.start()
        self._answered = False
        log.info("server.started name=%s pid=%s port=%s", server.name, self.pid, server.port)

    def has_died(self) -> bool:
        """Whether the server ended by itself since this was last asked."""
        if self._child is None or self._child.poll() is None:
            return False
        log.error("server.died name=%s exit=%s", self.server.name, self._child.returncode)
        self._child = None
        self._postpone()
        return True

    def has_answered(self) -> bool:
        """Whether the server has taken work since its last start."""
        if not self._answered and self._child is not None and self.server.answers():
            self._answered = True
            self._pause_seconds = 0.0
        return self._answered

    def tend(self) -> bool:
        """Start a dead server when its pause is over; whether anything about it changed."""
        if self.has_died():
            return True
        if self._child is not None:
            self.has_answered()
            return False
        if time.monotonic() < self._next_start:
            return False
        try:
            self.start()
        except (ServerError, OSError):
            log.exception("server.not_restarted name=%s", self.server.name)
            self._postpone()
        return True

    def seconds_to_act(self) -> float | None:
        """When `tend` has something to do without a signal telling so; None for never."""
        if self._child is None:
            return max(0.0, self._next_start - time.monotonic())
        return None if self._answered else LOOK_SECONDS

    def ask_to_stop(self) -> None:
        """Send the server its own stop signal."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(self.server.stop_signal)

    def stop(self, deadline: float) -> None:
        """Wait for the server's end until the deadline, then kill all that is left of it."""
        if self._child is not None:
            try:
                self._child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("server.killed name=%s pid=%s", self.server.name, self.pid)
                self._child.kill()
                self._child.wait()
            self._child = None
        stop_left_over(self.server, stop_signal=signal.SIGKILL)

    def _postpone(self) -> None:
        """Each start that leads to nothing makes the pause before the next one longer."""
        self._pause_seconds = min(2 * self._pause_seconds + 0.1, LONGEST_PAUSE_SECONDS)
        self._next_start = time.monotonic() + self._pause_seconds


class Guard:
    """Both servers of one state directory, from start to stop, for one owner."""

    def __init__(self, home: StateHome, owner: Owner, *, fsync: bool) -> None:
        self._home = home
        self._owner = owner
        passwords = home.ensure_server_secrets()
        self._keepers = [Keeper(server) for server in make_servers(home, passwords, fsync=fsync)]

    def start(self) -> None:
        """Return when both servers answer."""
        for keeper in self._keepers:
            server = keeper.server
            server.prepare(self._owner.is_gone)
            stop_left_over(server, stop_signal=server.stop_signal)
            if not is_free(server.port):
                log.warning("port.taken name=%s port=%s", server.name, server.port)
                server.port = free_port()
            keeper.start()
        self._record()
        for keeper in self._keepers:
            self._wait_for(keeper)

    def watch(self) -> None:
        """Start again whatever dies, until the owner is gone."""
        while not self._owner.is_gone(self._seconds_to_act()):
            changes = [keeper.tend() for keeper in self._keepers]
            if any(changes):
                self._record()

    def stop(self) -> None:
        """Stop both servers at once, in order if they end in time."""
        self._record(is_up=False)  # first: nobody may attach to servers that are about to end
        for keeper in self._keepers:
            keeper.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for keeper in self._keepers:
            keeper.stop(deadline)
        log.info("guard.stopped")

    def _wait_for(self, keeper: Keeper) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not keeper.has_answered():
            if keeper.has_died():
                raise ServerError(f"{keeper.server.name} does not start; see {self._home.logs}")
            if self._owner.is_gone(LOOK_SECONDS):
                raise ServerError("stopped during the start")
            if time.monotonic() > deadline:
                raise ServerError(f"{keeper.server.name} does not answer; see {self._home.logs}")

    def _seconds_to_act(self) -> float | None:
        waits = [keeper.seconds_to_act() for keeper in self._keepers]
        return min((wait for wait in waits if wait is not None), default=None)

    def _record(self, *, is_up: bool = True) -> None:
        """Write `endpoints.json`: ports for the next start, process ids while there are any."""
        postgres, valkey = self._keepers
        self._home.record(
            Running(
                postgres_port=postgres.server.port,
                valkey_port=valkey.server.port,
                postgres_pid=postgres.pid if is_up else None,
                valkey_pid=valkey.pid if is_up else None,
                guard_pid=os.getpid() if is_up else None,
            )
        )


def guard(home: StateHome, *, fsync: bool) -> None:
    """Hold the state directory and run both servers on it until the owner is gone."""
    owner = Owner()
    home.prepare()
    with home.held():
        refuse_foreign_data(home)
        guarded = Guard(home, owner, fsync=fsync)
        try:
            guarded.start()
            report(Start.READY)
            guarded.watch()
        finally:
            guarded.stop()


def refuse_foreign_data(home: StateHome) -> None:
    """Raise StateError where the directory holds a database that our secrets do not open."""
    if "owner_password" not in home.secrets() and (home.path / "pg").exists():
        raise StateError(
            f"{home.path} holds a database but no {home.secrets_file.name} with its passwords: "
            "put that file back, or remove the directory to start afresh"
        )


def report(start: Start, message: str = "") -> None:
    """Tell the owner how the start went, once, and close stdout."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps({"start": start, "message": message}) + "\n")
        sys.stdout.close()


def main() -> int:
    """Run the guard; 0 after an orderly stop."""
    parser = argparse.ArgumentParser(prog="python -m trimtab.guard", description=__doc__)
    parser.add_argument("home", type=Path, help="the state directory")
    parser.add_argument("--no-fsync", action="store_true", help="for tests: fast, not durable")
    arguments = parser.parse_args()
    os.umask(0o077)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s guard=%(process)d %(message)s"
    )
    try:
        guard(StateHome(arguments.home), fsync=not arguments.no_fsync)
    except HomeIsHeld as held:
        report(Start.HELD, str(held))
    except (BinariesError, OSError, ServerError, StateError) as fault:
        log.error("guard.failed %s", fault)  # noqa: TRY400 - the message says it all
        report(Start.FAILED, str(fault))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
