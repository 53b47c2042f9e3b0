"""Postgres and Valkey as child processes: how each is set up, started, asked and stopped.

When to do so is the guard's business (`trimtab.guard`).
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from trimtab.binaries import POSTGRES, VALKEY, Wheel, copy_for_others, program
from trimtab.state import StateError, StateHome

HOST = "127.0.0.1"
DATABASE = "trimtab"
OWNER_ROLE = "trimtab_owner"
API_ROLE = "trimtab_api"
WORKER_ROLE = "trimtab_worker"
VALKEY_USER = "trimtab"
VALKEY_ADMIN = "trimtab_admin"

# Everything but what endangers the data or the server; clients look at INFO for the version.
APPLICATION_RIGHTS = "+@all -@dangerous -@admin -function -script|flush -script|kill +info"

PROBE_SECONDS = 2.0
LEFT_OVER_SECONDS = 10.0
LOG_BYTES = 8 << 20
# Below the range from which the system takes ports for outgoing connections: none of those can
# sit on a stored port while its server is down.
PORTS = range(20_000, 32_000)
PR_SET_PDEATHSIG = 1

log = logging.getLogger("trimtab.guard")


class ServerError(Exception):
    """A server could not be set up or started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The user that the servers run as: `nobody` where we are root, else ourselves."""

    uid: int
    gid: int

    @classmethod
    def of_servers(cls) -> "Account":
        """Postgres refuses to run as root, and neither server needs to."""
        if os.geteuid() != 0:
            return cls(uid=os.geteuid(), gid=os.getegid())
        nobody = pwd.getpwnam("nobody")
        return cls(uid=nobody.pw_uid, gid=nobody.pw_gid)

    @property
    def is_other(self) -> bool:
        """Whether the servers run as somebody else than the guard."""
        return self.uid != os.geteuid()

    def own(self, path: Path) -> None:
        """Hand `path`, just made by us, to the account."""
        if self.is_other:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


class Spawner:
    """Starts server programs under the account, so that they die with the guard."""

    def __init__(self, account: Account) -> None:
        self.account = account

    def root_of(self, wheel: Wheel) -> Path:
        """Where the account finds the wheel's programs."""
        return copy_for_others(wheel) if self.account.is_other else wheel.root()

    def start(
        self, command: list[str], *, given: bytes, log_file: Path, death_signal: signal.Signals
    ) -> subprocess.Popen[bytes]:
        """A child in a session of its own (out of reach of Ctrl-C) that reads `given`."""
        is_other = self.account.is_other
        with open_log(log_file) as output, _pipe_holding(given) as stdin:
            return subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
                umask=0o077,
                start_new_session=True,
                user=self.account.uid if is_other else None,
                group=self.account.gid if is_other else None,
                extra_groups=[] if is_other else None,
                preexec_fn=_die_with_us(death_signal),  # noqa: PLW1509 - the guard has one thread
            )


@contextlib.contextmanager
def _pipe_holding(given: bytes) -> Iterator[IO[bytes]]:
    """The reading end of a pipe with `given` in it, which must fit a pipe's buffer (4 KiB)."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as reading:
        with os.fdopen(writer, "wb") as writing:
            writing.write(given)
        yield reading


def _die_with_us(death_signal: signal.Signals) -> Callable[[], None] | None:
    """A step between fork and exec that ties the child to this thread's life (Linux only).

    subprocess runs it after the change of user, which would clear the setting.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    guard_pid = os.getpid()

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != guard_pid:  # the guard died first; nobody would send the signal
            os._exit(1)

    return arm


class Server(Protocol):
    """One embedded server. The guard knows no more of it than this."""

    name: str
    port: int
    directory: Path
    uid: int
    program_name: str
    stop_signal: signal.Signals

    def prepare(self, is_unwanted: Callable[[float], bool]) -> None:
        """Set the data up on the first start; ask `is_unwanted(seconds)` while waiting."""

    def start(self) -> subprocess.Popen[bytes]:
        """The running server process; it may not answer yet."""

    def answers(self) -> bool:
        """Whether it takes work now."""


class Postgres:
    """Postgres in the foreground: loopback TCP with scram-sha-256, no Unix socket."""

    name = "postgres"
    program_name = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends the sessions, writes a checkpoint

    def __init__(
        self,
        *,
        directory: Path,
        port: int,
        password: str,
        spawner: Spawner,
        log_file: Path,
        fsync: bool,
    ) -> None:
        self.directory = directory
        self.port = port
        self._password = password
        self._spawner = spawner
        self._log_file = log_file
        self._fsync = fsync
        self.uid = spawner.account.uid
        self._root = spawner.root_of(POSTGRES)

    def prepare(self, is_unwanted: Callable[[float], bool]) -> None:
        """Make the cluster and its database beside the final place, then move it there."""
        if self.directory.exists():
            check_directory(self.directory, self._spawner.account)
            return
        fresh = self.directory.with_name(f"{self.directory.name}.new")
        password_file = self.directory.with_name("initdb-password")
        shutil.rmtree(fresh, ignore_errors=True)
        password_file.unlink(missing_ok=True)
        make_directory(fresh, self._spawner.account)
        try:
            password_file.touch(mode=0o600, exist_ok=False)
            password_file.write_text(self._password)
            self._spawner.account.own(password_file)
            self._run(self._initdb(fresh, password_file), b"", is_unwanted)
        finally:
            password_file.unlink(missing_ok=True)
        self._run(self._single(fresh), f"CREATE DATABASE {DATABASE}\n".encode(), is_unwanted)
        fresh.rename(self.directory)

    def start(self) -> subprocess.Popen[bytes]:
        """The postmaster."""
        settings = {
            "cluster_name": tag_of(self.directory),  # in the title of every process
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "password_encryption": "scram-sha-256",
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "max_wal_size": "256MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
            # A failed statement may hold a password or a prompt: keep its text out of the log.
            "log_min_error_statement": "panic",
        }
        if not self._fsync:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        # Who wrote it has ended, as the guard has made sure.  Postgres goes by the number alone,
        # which a process that is being reaped still has, and any other may have got.
        (self.directory / "postmaster.pid").unlink(missing_ok=True)
        command = [self._program("postgres"), "-D", str(self.directory)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        # SIGQUIT makes a postmaster without its guard end every backend at once; the next start
        # recovers from the log.
        return self._spawner.start(
            command, given=b"", log_file=self._log_file, death_signal=signal.SIGQUIT
        )

    def answers(self) -> bool:
        """Whether a start-up packet is answered with a request for the password."""
        return postgres_answers(self.port)

    def _initdb(self, directory: Path, password_file: Path) -> list[str]:
        return [
            self._program("initdb"),
            f"--pgdata={directory}",
            f"--username={OWNER_ROLE}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            # Postgres' own C.UTF-8: the same order everywhere, whatever the system's libc has.
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--no-instructions",
            *([] if self._fsync else ["--no-sync"]),
        ]

    def _single(self, directory: Path) -> list[str]:
        command = [self._program("postgres"), "--single", "-D", str(directory)]
        return [*command, "-c", "exit_on_error=on", "postgres"]

    def _run(self, command: list[str], given: bytes, is_unwanted: Callable[[float], bool]) -> None:
        child = self._spawner.start(
            command, given=given, log_file=self._log_file, death_signal=signal.SIGKILL
        )
        while child.poll() is None:
            if is_unwanted(0.5):
                child.kill()
                child.wait()
                raise ServerError("stopped while the database was being set up")
        if child.returncode != 0:
            last = self._log_file.read_text(errors="replace").strip().rpartition("\n")[2]
            raise ServerError(f"{Path(command[0]).name} failed: {last} (log: {self._log_file})")

    def _program(self, name: str) -> str:
        return str(program(POSTGRES, name, root=self._root))


class Valkey:
    """Valkey with named users and an append-only file; its configuration comes through stdin."""

    name = "valkey"
    program_name = "valkey-server"
    stop_signal = signal.SIGTERM

    def __init__(
        self,
        *,
        directory: Path,
        port: int,
        password: str,
        admin_password: str,
        spawner: Spawner,
        log_file: Path,
        fsync: bool,
    ) -> None:
        self.directory = directory
        self.port = port
        self._password = password
        self._admin_password = admin_password
        self._spawner = spawner
        self._log_file = log_file
        self._fsync = fsync
        self.uid = spawner.account.uid
        self._root = spawner.root_of(VALKEY)

    def prepare(self, is_unwanted: Callable[[float], bool]) -> None:
        """Make the data directory."""
        del is_unwanted  # nothing here takes time
        if not self.directory.exists():
            make_directory(self.directory, self._spawner.account)
        check_directory(self.directory, self._spawner.account)

    def start(self) -> subprocess.Popen[bytes]:
        """The server process."""
        command = [str(program(VALKEY, "valkey-server", root=self._root)), "-"]
        return self._spawner.start(
            command,
            given=self._configuration().encode(),
            log_file=self._log_file,
            death_signal=signal.SIGKILL,
        )

    def answers(self) -> bool:
        """Whether it knows our password and has read its data."""
        return valkey_answers(self.port, self._admin_password)

    def _configuration(self) -> str:
        """Passwords appear as digests only, so that no memory dump or log can give them away."""
        return "\n".join(
            [
                f"bind {HOST}",
                f"port {self.port}",
                f'proc-title-template "valkey-server {{listen-addr}} {tag_of(self.directory)}"',
                "protected-mode yes",
                f'dir "{self.directory}"',
                "appendonly yes",
                f"appendfsync {'everysec' if self._fsync else 'no'}",
                'save ""',
                "maxmemory-policy noeviction",
                "daemonize no",
                "user default off resetpass resetkeys resetchannels -@all",
                f"user {VALKEY_ADMIN} on #{_sha256(self._admin_password)} ~* &* +@all",
                f"user {VALKEY_USER} on #{_sha256(self._password)} ~* &* {APPLICATION_RIGHTS}",
                "",
            ]
        )


def _sha256(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def postgres_answers(port: int) -> bool:
    """Whether a Postgres on this port is ready for connections."""
    parameters = b"user\0" + OWNER_ROLE.encode() + b"\0database\0" + DATABASE.encode() + b"\0\0"
    packet = struct.pack("!ii", 8 + len(parameters), 3 << 16) + parameters
    # "R" asks for the password; "E" says that the server still starts or already stops.
    return _ask(port, packet, 1) == b"R"


def valkey_answers(port: int, admin_password: str) -> bool:
    """Whether a Valkey on this port knows the password and is ready."""
    request = f"AUTH {VALKEY_ADMIN} {admin_password}\r\nPING\r\n".encode()
    expected = b"+OK\r\n+PONG\r\n"
    return _ask(port, request, len(expected)) == expected


def _ask(port: int, request: bytes, num_bytes: int) -> bytes:
    """The first bytes of the answer; fewer if none or no more come."""
    answer = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((HOST, port), timeout=PROBE_SECONDS) as connection,
    ):
        connection.sendall(request)
        while len(answer) < num_bytes:
            received = connection.recv(num_bytes - len(answer))
            if not received:
                break
            answer += received
    return answer


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nobody listens on."""
    for _ in range(1000):
        port = secrets.choice(PORTS)
        if is_free(port):
            return port
    raise ServerError(f"no free port on {HOST} between {PORTS.start} and {PORTS.stop}")


def make_directory(path: Path, account: Account) -> None:
    """A new empty directory that only the account may enter."""
    path.mkdir(mode=0o700)
    account.own(path)


def check_directory(path: Path, account: Account) -> None:
    """Raise StateError unless `path` is a directory of the account, closed to others."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid:
        raise StateError(f"{path} is not a directory of user {account.uid}; remove it to go on")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise StateError(f"{path} is open to other users; remove it or restrict it to its owner")


def prepare_servers_directory(home: StateHome) -> Path:
    """The parent of the servers' data; for root a place in /var/tmp which only root writes to."""
    directory = home.servers_directory()
    if directory == home.path:
        return directory
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o711)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StateError(f"{directory} is not a directory of ours; remove it to go on")
    directory.chmod(0o711)
    return directory


def open_log(path: Path) -> IO[bytes]:
    """The log file, opened to append, 0600; a long one is put aside first."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    path.touch(mode=0o600)
    return path.open("ab")


def tag_of(directory: Path) -> str:
    """A word that appears in the process title of each server process of this data directory."""
    digest = hashlib.sha256(os.path.realpath(directory).encode()).hexdigest()
    return f"trimtab-{directory.name}-{digest[:16]}"


def stop_left_over(server: Server, *, stop_signal: signal.Signals) -> None:
    """End every process of a former server of this data directory; return when none is left.

    Only the main process is asked to stop; it ends its children in order.  A child that gets the
    signal of its own may end in a way that the main process takes for a crash.
    """
    for sent, find in ((stop_signal, _main_left_over), (signal.SIGKILL, left_over)):
        for pid in find(server):
            log.warning("left_over.stopped name=%s pid=%s signal=%s", server.name, pid, sent)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        deadline = time.monotonic() + LEFT_OVER_SECONDS
        while left_over(server):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise ServerError(f"a former {server.name} on {server.directory} does not end")


def left_over(server: Server) -> list[int]:
    """Pids of the server's processes that nobody waits for."""
    return [process.pid for process in _left_over(server)]


def _main_left_over(server: Server) -> list[int]:
    """Those among them that are no children of the server: Postgres puts a colon behind theirs."""
    return [
        process.pid
        for process in _left_over(server)
        if not _first_word(process.title).endswith(":")
    ]


def _left_over(server: Server) -> list["Process"]:
    """The server's processes, told by title and user.

    A pid noted in a file may long belong to somebody else, and root in a container may not look at
    more than that.
    """
    tag = tag_of(server.directory)
    listed = _processes() if sys.platform == "linux" else _processes_by_ps()
    return [
        process
        for process in listed
        if process.uid == server.uid
        and tag in process.title
        and server.program_name in _first_word(process.title)
    ]


def _first_word(title: str) -> str:
    return title.split(maxsplit=1)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A line of the process list."""

    pid: int
    uid: int
    title: str


def _processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                title = words.decode(errors="replace")
                yield Process(pid=int(entry.name), uid=entry.stat().st_uid, title=title)


def _processes_by_ps() -> Iterator[Process]:
    command = ["/bin/ps", "-axww", "-o", "pid=,uid=,command="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    for line in listed.stdout.splitlines():
        pid, uid, title = line.split(maxsplit=2)
        yield Process(pid=int(pid), uid=int(uid), title=title)


def make_servers(home: StateHome, passwords: Mapping[str, str], *, fsync: bool) -> list[Server]:
    """Both servers of the state directory, on their stored ports where those are free."""
    spawner = Spawner(Account.of_servers())
    directory = prepare_servers_directory(home)
    stored = home.running()
    return [
        Postgres(
            directory=directory / "pg",
            port=stored.postgres_port or free_port(),
            password=passwords["owner_password"],
            spawner=spawner,
            log_file=home.logs / "postgres.log",
            fsync=fsync,
        ),
        Valkey(
            directory=directory / "valkey",
            port=stored.valkey_port or free_port(),
            password=passwords["redis_password"],
            admin_password=passwords["redis_admin_password"],
            spawner=spawner,
            log_file=home.logs / "valkey.log",
            fsync=fsync,
        ),
    ]
