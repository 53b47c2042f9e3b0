"""The adapter of a checkpoint or a result as one tar, made of stored objects on the fly.

ustar, names sorted, no times and no owners: the same files are the same bytes each time, so that
it has one digest, and any range of it can be read without making the rest.
"""

import dataclasses
import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from core.errors import ArtifactNotFound
from core.storage import ArtifactStore

MEDIA_TYPE = "application/x-tar"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """What a checkpoint's row says of its adapter."""

    files: dict[str, str]
    """Digest of each file, by its name in the tar."""
    sha256: str
    """Of the whole tar."""
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from JSON."""
        return cls(**data)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the archive: bytes of its own, or those of a stored object."""

    start: int
    size: int
    source: bytes | str
    """The bytes, or the key of the object."""


class AdapterTar:
    """An archive of stored objects; nothing of it is kept in memory but its headers."""

    def __init__(self, store: ArtifactStore, keys: Mapping[str, str]) -> None:
        """`keys` are by name in the archive; ArtifactNotFound if an object is missing."""
        self._store = store
        self._pieces: list[_Piece] = []
        self.num_bytes = 0
        for name, key in sorted(keys.items()):
            size = store.size(key)
            header = tarfile.TarInfo(name)
            header.size, header.mode = size, 0o644
            self._add(header.tobuf(tarfile.USTAR_FORMAT))
            self._add(key, size)
            self._add(bytes(-size % tarfile.BLOCKSIZE))
        self._add(bytes(2 * tarfile.BLOCKSIZE))
        self._add(bytes(-self.num_bytes % tarfile.RECORDSIZE))

    def _add(self, source: bytes | str, size: int | None = None) -> None:
        length = len(source) if size is None else size
        self._pieces.append(_Piece(self.num_bytes, length, source))
        self.num_bytes += length

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from the first offset up to, not including, the second, in chunks."""
        for piece in self._pieces:
            first = max(start - piece.start, 0)
            last = min(stop - piece.start, piece.size)
            if first >= last:
                continue
            if isinstance(piece.source, bytes):
                yield piece.source[first:last]
            else:
                yield from self._store.read(piece.source, start=first, length=last - first)

    def sha256(self) -> str:
        """Digest of the whole archive."""
        digest = hashlib.sha256()
        for chunk in self.read(0, self.num_bytes):
            digest.update(chunk)
        return digest.hexdigest()


def open_adapter(store: ArtifactStore, prefix: str, adapter: StoredAdapter) -> AdapterTar:
    """The tar of a checkpoint's adapter; ArtifactNotFound unless it has the size it was given."""
    keys = {name: f"{prefix}/{name}" for name in adapter.files}
    archive = AdapterTar(store, keys)
    if archive.num_bytes != adapter.bytes:
        raise ArtifactNotFound("The checkpoint's adapter is not whole in the store.")
    return archive
