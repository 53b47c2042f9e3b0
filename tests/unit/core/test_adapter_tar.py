import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from core.adapter_tar import AdapterTar, StoredAdapter, open_adapter
from core.errors import ArtifactNotFound
from core.storage import ArtifactStore

FILES = {"adapter_model.safetensors": bytes(range(256)) * 5, "adapter_config.json": b"{}"}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    made = ArtifactStore(tmp_path)
    for name, content in FILES.items():
        made.put(f"ck/adapter/{name}", [content])
    return made


def tar_of(store: ArtifactStore) -> AdapterTar:
    return AdapterTar(store, {name: f"ck/adapter/{name}" for name in FILES})


def written_by_tarfile() -> bytes:
    """The same archive as Python's own module writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(FILES):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(FILES[name]), 0o644
            archive.addfile(entry, io.BytesIO(FILES[name]))
    return stream.getvalue()


def test_it_is_the_archive_that_tarfile_writes(store: ArtifactStore) -> None:
    archive = tar_of(store)

    content = b"".join(archive.read(0, archive.num_bytes))

    assert content == written_by_tarfile()
    assert archive.num_bytes == len(content)
    assert archive.sha256() == hashlib.sha256(content).hexdigest()


def test_any_range_of_it_can_be_read(store: ArtifactStore) -> None:
    archive, whole = tar_of(store), written_by_tarfile()
    places = [0, 1, 511, 512, 513, 1023, 1024, 1500, 2048, 3000, len(whole) - 1, len(whole)]

    for start in places:
        for stop in places:
            assert b"".join(archive.read(start, stop)) == whole[start:stop], (start, stop)


def test_a_missing_file_is_told_before_any_byte_is_sent(store: ArtifactStore) -> None:
    store.delete("ck/adapter/adapter_config.json")

    with pytest.raises(ArtifactNotFound):
        tar_of(store)


def test_a_file_of_another_size_is_not_served(store: ArtifactStore) -> None:
    archive = tar_of(store)
    stored = StoredAdapter(
        files=dict.fromkeys(FILES, ""), sha256=archive.sha256(), bytes=archive.num_bytes
    )
    store.put("ck/adapter/adapter_model.safetensors", [b"x" * 40_000])

    with pytest.raises(ArtifactNotFound, match="not whole"):
        open_adapter(store, "ck/adapter", stored)


def test_what_a_row_says_of_an_adapter_survives_json() -> None:
    stored = StoredAdapter(files={"a": "1"}, sha256="2", bytes=3)

    assert StoredAdapter.from_dict(stored.to_dict()) == stored
