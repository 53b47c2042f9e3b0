"""Bytes of files, checkpoints and results, by key.

An object exists whole or not at all: it is written beside, synced and renamed.  A key is a name
such as `jobs/<id>/attempt-1/ck-10/manifest.json`; its parts are opened one by one and links are
never followed.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from core.errors import ArtifactNotFound, StoredFileCorrupt

CHUNK_BYTES = 1 << 20
INCOMING = ".incoming"
"""Folder of objects that are not complete."""
_NO_LINKS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object that is complete."""

    key: str
    bytes: int
    sha256: str


def check_key(key: str) -> tuple[str, ...]:
    """The parts of a key; ArtifactNotFound for anything that is no plain relative name."""
    parts = tuple(key.split("/"))
    is_plain = all(
        part not in {"", ".", "..", INCOMING} and "\x00" not in part and "\\" not in part
        for part in parts
    )
    if not is_plain:
        raise ArtifactNotFound
    return parts


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_below(root: Path, name: str) -> BinaryIO:
    """A regular file below a folder; ArtifactNotFound if there is none or a link is on the way."""
    *folders, last = check_key(name)
    folder = _open_folder(root)
    try:
        for part in folders:
            folder = _step_into(folder, part)
        return _reader(folder, last)
    finally:
        os.close(folder)


class ArtifactStore:
    """Objects in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, chunks: Iterable[bytes]) -> Stored:
        """Store the chunks as one object; what was under the key is replaced in one step."""
        target = self._path(key)
        digest, size = hashlib.sha256(), 0
        with self._incoming() as (path, stream):
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            _sync(stream)
            _move(path, target)
        return Stored(key=key, bytes=size, sha256=digest.hexdigest())

    def put_file(self, key: str, folder: Path, name: str, *, sha256: str | None = None) -> Stored:
        """Store a copy of the regular file `name` below a folder, reached without a link.

        StoredFileCorrupt if there is none or if it has not the digest expected.  A copy, because
        whoever wrote the file may still hold it open.
        """
        target = self._path(key)
        with _source(folder, name) as origin, self._incoming() as (path, stream):
            digest, size = _copy(origin, stream)
            if sha256 is not None and digest != sha256:
                raise StoredFileCorrupt(f"{name}: sha256 is {digest}, expected {sha256}")
            _sync(stream)
            _move(path, target)
        return Stored(key=key, bytes=size, sha256=digest)

    def open(self, key: str) -> BinaryIO:
        """The object, from its start; ArtifactNotFound if there is none."""
        return open_below(self.root, key)

    def size(self, key: str) -> int:
        """Bytes of the object."""
        with self.open(key) as stream:
            return os.fstat(stream.fileno()).st_size

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The object, or `length` bytes of it from `start`, in chunks; opened at the call."""
        stream = self.open(key)
        return _chunks(stream, start, length)

    def fetch(self, key: str, destination: Path, *, sha256: str | None = None) -> Path:
        """A copy of the object at `destination`, verified; StoredFileCorrupt if it differs."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(f"{destination.name}.partial-{secrets.token_hex(8)}")
        try:
            with self.open(key) as origin, partial.open("xb") as stream:
                digest, _ = _copy(origin, stream)
                if sha256 is not None and digest != sha256:
                    raise StoredFileCorrupt(f"{key}: sha256 is {digest}, expected {sha256}")
                _sync(stream)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)
        return destination

    def keys(self, prefix: str) -> list[str]:
        """All keys below a folder-like prefix, sorted."""
        top = self._path(prefix)
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in top.rglob("*")
            if path.is_file() and not path.is_symlink()
        )

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def delete_all(self, prefix: str) -> None:
        """Remove everything below a folder-like prefix."""
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(PurePosixPath(*check_key(key)))

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new file on the same file system; gone afterwards unless it was moved away."""
        folder = self.root / INCOMING
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / secrets.token_hex(16)
        try:
            with path.open("xb") as stream:
                yield path, stream
        finally:
            path.unlink(missing_ok=True)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _move(path: Path, target: Path) -> None:
    """Rename into place and make the name last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    folder = _open_folder(target.parent)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _copy(origin: BinaryIO, stream: BinaryIO) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := origin.read(CHUNK_BYTES):
        stream.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _source(folder: Path, name: str) -> BinaryIO:
    try:
        return open_below(folder, name)
    except ArtifactNotFound:
        raise StoredFileCorrupt(f"{name}: no regular file, or behind a link") from None


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, _NO_LINKS | os.O_DIRECTORY)
    except FileNotFoundError:
        raise ArtifactNotFound from None


def _step_into(folder: int, part: str) -> int:
    """The descriptor of a folder inside `folder`, which is closed."""
    try:
        inner = os.open(part, _NO_LINKS | os.O_DIRECTORY, dir_fd=folder)
    except OSError:
        raise ArtifactNotFound from None
    os.close(folder)
    return inner


def _reader(folder: int, name: str) -> BinaryIO:
    try:
        descriptor = os.open(name, _NO_LINKS | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        raise ArtifactNotFound from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactNotFound
    return os.fdopen(descriptor, "rb")


def _chunks(stream: BinaryIO, start: int, length: int | None) -> Iterator[bytes]:
    with stream:
        stream.seek(start)
        left = length
        while chunk := stream.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
            yield chunk
            left = None if left is None else left - len(chunk)
