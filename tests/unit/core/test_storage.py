import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import ArtifactNotFound, StoredFileCorrupt
from core.storage import CHUNK_BYTES, ArtifactStore, sha256_of

KEY = "jobs/1/attempt-1/ck-10/adapter.safetensors"
CONTENT = b"0123456789" * 300_000


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def read(store: ArtifactStore, key: str) -> bytes:
    return b"".join(store.read(key))


def leftovers(store: ArtifactStore) -> list[Path]:
    return list((store.root / ".incoming").iterdir())


def test_bytes_come_back_with_size_and_digest(store: ArtifactStore) -> None:
    stored = store.put(KEY, [CONTENT[:7], b"", CONTENT[7:]])

    assert (stored.key, stored.bytes) == (KEY, len(CONTENT))
    assert stored.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert read(store, KEY) == CONTENT
    assert store.size(KEY) == len(CONTENT)
    assert leftovers(store) == []


@pytest.mark.parametrize(
    ("start", "length"), [(0, 0), (0, 1), (5, 9), (CHUNK_BYTES - 1, 2), (7, None), (10**9, 5)]
)
def test_a_range_is_what_a_slice_is(store: ArtifactStore, start: int, length: int | None) -> None:
    store.put(KEY, [CONTENT])
    stop = None if length is None else start + length

    got = b"".join(store.read(KEY, start=start, length=length))

    assert got == CONTENT[start:stop]


def test_a_writer_that_breaks_off_leaves_nothing(store: ArtifactStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.put(KEY, broken())

    assert leftovers(store) == []
    with pytest.raises(ArtifactNotFound):
        store.open(KEY)


def test_an_object_is_replaced_in_one_step(store: ArtifactStore) -> None:
    store.put(KEY, [b"old"])
    with store.open(KEY) as earlier_reader:
        store.put(KEY, [b"new"])

        assert (earlier_reader.read(), read(store, KEY)) == (b"old", b"new")


def test_a_copy_does_not_change_with_its_source(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"right")
    store.put_file(KEY, tmp_path, "source", sha256=sha256_of(source))

    with source.open("r+b") as still_open:
        still_open.write(b"wrong")

    assert read(store, KEY) == b"right"


def test_a_file_of_the_wrong_digest_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"altered")

    with pytest.raises(StoredFileCorrupt, match="source"):
        store.put_file(KEY, tmp_path, "source", sha256="0" * 64)

    assert leftovers(store) == []
    with pytest.raises(ArtifactNotFound):
        store.open(KEY)


def test_links_folders_and_pipes_are_not_published(store: ArtifactStore, tmp_path: Path) -> None:
    secret, link, pipe = tmp_path / "secret", tmp_path / "link", tmp_path / "pipe"
    secret.write_bytes(b"secret")
    link.symlink_to(secret)
    os.mkfifo(pipe)

    (tmp_path / "linked").symlink_to(tmp_path)

    for odd in ("link", "pipe", "linked", "linked/secret", "gone"):
        with pytest.raises(StoredFileCorrupt, match=odd):
            store.put_file(KEY, tmp_path, odd)


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../secret",
        "a/../../secret",
        "a//b",
        "a/",
        "a/./b",
        "a\x00b",
        "a\\..\\b",
        ".incoming/x",
        "nothing",
        "nothing/at/all",
        "folder",
        "file/below",
    ],
)
def test_a_key_that_names_no_object_is_not_found(store: ArtifactStore, key: str) -> None:
    store.put("folder/inner", [b"x"])
    store.put("file", [b"x"])
    (store.root.parent / "secret").write_bytes(b"secret")

    with pytest.raises(ArtifactNotFound):
        store.open(key)
    with pytest.raises(ArtifactNotFound):
        store.read(key)


@pytest.mark.parametrize("key", ["", "../x", "/x", "a/../b", ".incoming/x", "a\x00"])
def test_nothing_is_written_or_removed_outside(store: ArtifactStore, key: str) -> None:
    for act in (
        lambda: store.put(key, [b"x"]),
        lambda: store.delete(key),
        lambda: store.delete_all(key),
        lambda: store.keys(key),
    ):
        with pytest.raises(ArtifactNotFound):
            act()


def test_links_inside_the_store_are_not_followed(store: ArtifactStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store.put("a/file", [b"x"])
    (store.root / "linked").symlink_to(outside)
    (store.root / "a" / "link").symlink_to(outside / "secret")
    os.mkfifo(store.root / "a" / "pipe")

    for key in ("linked/secret", "a/link", "a/pipe"):
        with pytest.raises(ArtifactNotFound):
            store.open(key)
    assert store.keys("a") == ["a/file"]


def test_a_fetched_copy_is_verified(store: ArtifactStore, tmp_path: Path) -> None:
    stored = store.put(KEY, [CONTENT])
    target = tmp_path / "run" / "file"

    assert store.fetch(KEY, target, sha256=stored.sha256).read_bytes() == CONTENT
    (store.root / KEY).write_bytes(b"rotten")
    with pytest.raises(StoredFileCorrupt, match="ck-10"):
        store.fetch(KEY, target, sha256=stored.sha256)

    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_deleting_takes_what_is_there_and_no_more(store: ArtifactStore) -> None:
    for key in ("jobs/1/a", "jobs/1/b/c", "jobs/10/a"):
        store.put(key, [b"x"])

    store.delete("jobs/1/a")
    store.delete("jobs/1/a")
    store.delete("jobs/1/a/below")
    assert store.keys("jobs") == ["jobs/1/b/c", "jobs/10/a"]
    store.delete_all("jobs/1")
    store.delete_all("never")

    assert store.keys("jobs") == ["jobs/10/a"]
    assert store.keys("never") == []
