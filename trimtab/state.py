"""The state directory (`TRIMTAB_HOME`): its layout, its secrets and the record of running servers.

Only paths and small JSON files live here; what runs on them is in `trimtab.servers`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT_STATE_PARENT = Path("/var/tmp")  # noqa: S108 - every directory made in it is checked
SERVER_SECRETS = (
    "owner_password",
    "api_password",
    "worker_password",
    "redis_password",
    "redis_admin_password",
    "state_id",
)


class StateError(Exception):
    """The state directory cannot be used as it is."""


class HomeIsHeld(StateError):
    """Another guard runs on this state directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What `endpoints.json` says: the stored ports, and the process ids while the servers run."""

    postgres_port: int | None = None
    valkey_port: int | None = None
    postgres_pid: int | None = None
    valkey_pid: int | None = None
    guard_pid: int | None = None


class StateHome:
    """The files of one state directory. Made on first use, readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.secrets_file = self.path / "secrets.json"
        self.endpoints_file = self.path / "endpoints.json"
        self.lock_file = self.path / "lock"
        self.logs = self.path / "logs"

    def prepare(self) -> None:
        """Make the directory, 0700; refuse one that others own or may write to."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.path.stat()
        if found.st_uid != os.geteuid():
            raise StateError(
                f"{self.path} belongs to user {found.st_uid}: start as that user, "
                "or set TRIMTAB_HOME to a directory of your own"
            )
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise StateError(
                f"{self.path} may be written to by others: set TRIMTAB_HOME to a directory of "
                "its own"
            )
        self.path.chmod(0o700)
        self.logs.mkdir(mode=0o700, exist_ok=True)

    def secrets(self) -> dict[str, str]:
        """Every stored secret by name; empty before the first start."""
        try:
            stored: dict[str, str] = json.loads(self.secrets_file.read_text())
        except FileNotFoundError:
            return {}
        return stored

    def store_secrets(self, added: Mapping[str, str]) -> dict[str, str]:
        """All secrets after `added` joined them, 0600, durable before this returns."""
        stored = self.secrets() | dict(added)
        _replace(self.secrets_file, json.dumps(stored, indent=1))
        return stored

    def ensure_server_secrets(self) -> dict[str, str]:
        """All secrets; those of the servers are drawn (24 random bytes each) where they lack."""
        stored = self.secrets()
        missing = {name: secrets.token_hex(24) for name in SERVER_SECRETS if name not in stored}
        return self.store_secrets(missing) if missing else stored

    def running(self) -> Running:
        """The last record of ports and process ids; all None before the first start."""
        try:
            return Running(**json.loads(self.endpoints_file.read_text()))
        except FileNotFoundError:
            return Running()

    def record(self, running: Running) -> None:
        """Store the record, whole or not at all."""
        _replace(self.endpoints_file, json.dumps(asdict(running), indent=1))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The lock on this directory, for one process at a time; raises HomeIsHeld at once."""
        with self.lock_file.open("a") as lock:
            self.lock_file.chmod(0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HomeIsHeld(f"a guard already runs on {self.path}") from None
            yield

    def is_held(self) -> bool:
        """Whether a guard holds the lock now."""
        try:
            with self.held():
                return False
        except HomeIsHeld:
            return True

    def servers_directory(self) -> Path:
        """Where the servers keep their data: here, or for root where `nobody` can reach it."""
        if os.geteuid() != 0:
            return self.path
        name = f"{self.path.resolve()}\0{self.secrets()['state_id']}"
        return ROOT_STATE_PARENT / f"trimtab-{hashlib.sha256(name.encode()).hexdigest()[:20]}"

    def remove(self) -> None:
        """Delete the state and the servers' data. For tests and resets; nothing may run on it."""
        if "state_id" in self.secrets():
            shutil.rmtree(self.servers_directory(), ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    """Write `path` anew, 0600, through a temporary file beside it, flushed to disk."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
