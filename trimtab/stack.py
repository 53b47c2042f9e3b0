"""The local stack behind `trimtab up` and `trimtab demo`: servers, API, dispatcher and workers.

Everything here ends with this process: in order after Ctrl-C or SIGTERM, at once after kill -9
(there the kernel's death signal does it, on Linux).
"""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self
from urllib.parse import quote, urlsplit, urlunsplit

import httpx2

from trimtab.embedded import EmbeddedServers, EmbeddedServersError
from trimtab.errors import Failed, WrongUsage
from trimtab.home import Home, models_folder
from trimtab.model_cache import Tell
from trimtab.servers import API_ROLE, WORKER_ROLE
from trimtab.state import StateError, StateHome

HOST = "127.0.0.1"

_READY_SECONDS = 60.0
_SAVE_SECONDS = 110.0
"""A worker's trainer may take so long for its last checkpoint."""
_API_SECONDS = 15.0
_POLL_SECONDS = 0.1
_LOG_LINES = 15
_LOG_COLUMNS = 300
_PR_SET_PDEATHSIG = 1
SECRETS = frozenset(
    f"{name}{source}"
    for name in (
        "DATABASE_URL",
        "REDIS_URL",
        "TRIMTAB_API_KEY",
        "TRIMTAB_API_PASSWORD",
        "TRIMTAB_WORKER_PASSWORD",
    )
    for source in ("", "_FILE")
)
"""Variables that no process inherits: each is given its own, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the servers are, with the name and password of each role."""

    owner_url: str = field(repr=False)
    api_url: str = field(repr=False)
    worker_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    api_password: str = field(repr=False)
    worker_password: str = field(repr=False)


class Stack:
    """The whole service on this machine, up while the `with` block is open.

    `DATABASE_URL` and `REDIS_URL` in the environment replace the embedded servers.
    """

    def __init__(
        self,
        home: Home,
        *,
        port: int,
        num_workers: int = 1,
        environment: Mapping[str, str] | None = None,
        tell: Tell,
    ) -> None:
        self.home = home
        self._port = port
        self._num_workers = num_workers
        self._outside = dict(os.environ if environment is None else environment)
        self._tell = tell
        self._children: list[Child] = []
        self._servers: EmbeddedServers | None = None
        self._open = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return f"http://{HOST}:{self._port}"

    @property
    def api_key(self) -> str:
        """The key that belongs to this state folder."""
        return self.home.key_file.read_text(encoding="utf-8").strip()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            self._start(opening)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def watch(self) -> None:
        """Return never; a process of the stack that ends by itself is a failure."""
        while True:
            self.check()
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Fail if a process of the stack has ended by itself, or the servers' guard."""
        if not self._has_servers():
            log = self.home.logs / "guard.log"
            raise Failed(f"Postgres and Valkey have ended: their guard is gone\n(log: {log})")
        for child in self._children:
            if (code := child.process.poll()) is not None:
                raise Failed(f"{child.name} ended with code {code}\n{child.last_lines()}")

    def _has_servers(self) -> bool:
        """Whether servers of our own, if we have any, are watched over."""
        return self._servers is None or self._servers.is_guarded()

    def _start(self, opening: contextlib.ExitStack) -> None:
        """Everything in the order of need; what `opening` holds is undone backwards."""
        try:
            StateHome(self.home.path).prepare()
        except (StateError, OSError) as error:
            raise WrongUsage(f"{self.home.path} cannot hold the state: {error}") from error
        self._port = _checked_port(self._port)
        addresses = self._addresses(opening)
        self._tell("bringing the database up to date")
        self._migrate(addresses)
        opening.callback(self._stop)
        self._spawn("api", "api", self._environment(addresses.api_url, addresses))
        self._wait_until_ready()
        self._ensure_key(addresses)
        worker = self._environment(addresses.worker_url, addresses)
        self._spawn("dispatcher", "worker.dispatcher", worker)
        for number in range(1, self._num_workers + 1):
            name = f"worker-{number}"
            self._spawn(name, "worker", {**worker, "TRIMTAB_WORKER_LABEL": f"{name}-{os.getpid()}"})
        self.home.address_file.write_text(f"{self.url}\n", encoding="utf-8")
        opening.callback(self.home.address_file.unlink, missing_ok=True)

    def _addresses(self, opening: contextlib.ExitStack) -> Addresses:
        """Of the servers named in the environment, or of our own, started now."""
        database, redis = self._outside.get("DATABASE_URL"), self._outside.get("REDIS_URL")
        if database and redis:
            return _outside_addresses(self.home, self._outside, database, redis)
        self._tell("starting Postgres and Valkey")
        try:
            self._servers = opening.enter_context(EmbeddedServers(self.home.path))
        except EmbeddedServersError as error:
            raise Failed(str(error)) from error
        own = self._servers.endpoints
        if database:
            return _outside_addresses(self.home, self._outside, database, own.redis_url)
        return Addresses(
            owner_url=own.owner_url,
            api_url=own.api_url,
            worker_url=own.worker_url,
            redis_url=redis or own.redis_url,
            api_password=own.api_password,
            worker_password=own.worker_password,
        )

    def _environment(self, database_url: str, addresses: Addresses) -> dict[str, str]:
        """What a process of the stack is told: its own role's database URL and no other secret."""
        public = {name: value for name, value in self._outside.items() if name not in SECRETS}
        return {
            "TRIMTAB_ARTIFACTS": str(self.home.artifacts),
            "TRIMTAB_SCRATCH": str(self.home.scratch),
            "TRIMTAB_MODELS": str(models_folder({**public, "TRIMTAB_HOME": str(self.home.path)})),
            "TRIMTAB_LOG": "console",
            **public,
            "TRIMTAB_HOME": str(self.home.path),
            "TRIMTAB_HOST": HOST,
            "TRIMTAB_PORT": str(self._port),
            "DATABASE_URL": database_url,
            "REDIS_URL": addresses.redis_url,
        }

    def _migrate(self, addresses: Addresses) -> None:
        passwords = {
            "TRIMTAB_API_PASSWORD": addresses.api_password,
            "TRIMTAB_WORKER_PASSWORD": addresses.worker_password,
        }
        environment = {**self._environment(addresses.owner_url, addresses), **passwords}
        _output_of("migrations", [], environment)

    def _ensure_key(self, addresses: Addresses) -> None:
        """A key file that this server accepts; the key is made once."""
        file = self.home.key_file
        if file.exists() and self._accepts(self.api_key):
            return
        arguments = ["create", "--tenant", "local", "--name", "local-stack"]
        environment = self._environment(addresses.owner_url, addresses)
        secret = _output_of("api.keys", arguments, environment).strip()
        _write_private(file, f"{secret}\n")

    def _accepts(self, key: str) -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        return self._ask("/v1/models", headers).status_code == 200

    def _ask(self, path: str, headers: Mapping[str, str] | None = None) -> httpx2.Response:
        """A GET to our own API, past any proxy of the environment."""
        return httpx2.get(f"{self.url}{path}", headers=headers, timeout=5.0, trust_env=False)

    def _spawn(self, name: str, module: str, environment: Mapping[str, str]) -> None:
        log = self.home.logs / f"{name}.log"
        self._children.append(Child.start(name, module, environment, log))

    def _wait_until_ready(self) -> None:
        """Return once the API answers that database and schema are as it needs them."""
        deadline = time.monotonic() + _READY_SECONDS
        while not self._is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"the API is not ready\n{self._children[0].last_lines()}")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        try:
            return self._ask("/v1/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def _stop(self) -> None:
        """End every process: workers first, which let their trainers save; the API last.

        Ctrl-C meanwhile ends the wait.  Without a database nothing can be handed back.
        """
        within = _SAVE_SECONDS if self._has_servers() else 0.0
        api = [child for child in self._children if child.name == "api"]
        others = [child for child in self._children if child.name != "api"]
        if others and within:
            self._tell("stopping; running trainers save their state first")
        try:
            _end(others, within=within)
            _end(api, within=_API_SECONDS)
        except KeyboardInterrupt:
            self._tell("not waiting any longer")
        finally:
            for child in self._children:
                child.kill()
            self._children.clear()


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the stack; Ctrl-C in the terminal does not reach it."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, name: str, module: str, environment: Mapping[str, str], log: Path) -> Self:
        """`python -m module`; its output goes to the end of `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own module
                # -P: nothing in the current directory can pose as one of our packages.
                [sys.executable, "-P", "-m", module],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Two system calls between fork and exec; the stack starts before any thread.
                preexec_fn=_die_with_parent(),  # noqa: PLW1509
            )
        return cls(name, process, log)

    def ask_to_end(self) -> None:
        """Send SIGTERM to the process alone; it tells its own children."""
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        """End the process at once and wait until it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def last_lines(self) -> str:
        """The end of its log, for people."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line[:_LOG_COLUMNS] for line in lines[-_LOG_LINES:]]
        return "\n".join([*shown, f"(log: {self.log})"])


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _checked_port(port: int) -> int:
    """The port, after making sure that the API can have it; 0 stands for any free one."""
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise WrongUsage(
                f"port {port} on {HOST} is taken ({error.strerror}); "
                "end what uses it, or choose another with --port"
            ) from error
    return port


def _outside_addresses(
    home: Home, environment: Mapping[str, str], database: str, redis: str
) -> Addresses:
    """Of servers that others run; passwords of our roles from the environment, else drawn once."""
    store = StateHome(home.path)
    known = store.secrets()
    drawn = {
        name: environment.get(f"TRIMTAB_{name.upper()}") or known.get(name) or secrets.token_hex(24)
        for name in ("api_password", "worker_password")
    }
    store.store_secrets(drawn)
    return Addresses(
        owner_url=database,
        api_url=_as_role(database, API_ROLE, drawn["api_password"]),
        worker_url=_as_role(database, WORKER_ROLE, drawn["worker_password"]),
        redis_url=redis,
        **drawn,
    )


def _as_role(url: str, role: str, password: str) -> str:
    """The same database, entered as another role."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{role}:{quote(password, safe='')}@{place}"))


def _output_of(module: str, arguments: list[str], environment: Mapping[str, str]) -> str:
    """What `python -m module` prints; its last words are the reason if it fails."""
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", module, *arguments],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-_LOG_LINES:]
        raise Failed("\n".join([f"python -m {module} failed", *lines]))
    return done.stdout


def _write_private(path: Path, text: str) -> None:
    """Write the file anew, readable by its owner alone from its first byte on."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def _end(children: list[Child], *, within: float) -> None:
    """Ask all to end and wait for all, together no longer than `within` seconds."""
    for child in children:
        child.ask_to_end()
    deadline = time.monotonic() + within
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))


def _die_with_parent() -> Callable[[], None] | None:
    """A step between fork and exec: the kernel kills the child when this thread ends (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # the parent died first; nobody would send the signal
            os._exit(1)

    return arm
