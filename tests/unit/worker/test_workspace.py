import errno
import hashlib
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from uuid import UUID

import pytest

from core.feed import MetricPoint
from core.rows import Job
from core.storage import ArtifactStore
from worker.errors import BrokenTrainer
from worker.journal import FinalFolder
from worker.workspace import Workspace, is_full, metrics_table, write_tar


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def workspace(tmp_path: Path, store: ArtifactStore) -> Workspace:
    """A run directory that exists, of a job of which only the name matters."""
    job = cast(Job, SimpleNamespace(id=UUID(int=1), attempt=1))
    made = Workspace(tmp_path / "scratch", store, job)
    made.folder.mkdir(parents=True)
    return made


def stored(store: ArtifactStore, *names: str) -> dict[str, str]:
    """Objects that hold their names, as `write_tar` wants them."""
    return {name: store.put(f"result/{name}", [name.encode()]).key for name in names}


def write_files(folder: Path, *names: str) -> None:
    """Files that hold their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def result(workspace: Workspace, *names: str) -> FinalFolder:
    """A result whose manifest lists files that hold their names, whether they exist or not."""
    files = [
        {
            "path": name,
            "role": "adapter",
            "media_type": "text/plain",
            "bytes": len(name),
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
        }
        for name in names
    ]
    text = json.dumps({"schema_version": 1, "step": 1, "files": files})
    (workspace.folder / "final").mkdir(exist_ok=True)
    (workspace.folder / "final" / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return FinalFolder(line=1, step=1, path="final", manifest_sha256=digest)


def names_in(store: ArtifactStore, key: str) -> list[str]:
    with store.open(key) as content, tarfile.open(fileobj=content) as archive:
        return archive.getnames()


def point(step: int, **values: float | None) -> MetricPoint:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return MetricPoint(attempt=1, line=step, seq=step, step=step, at=at, values=values)


def test_the_same_files_make_the_same_archive(tmp_path: Path, store: ArtifactStore) -> None:
    names = ("b.json", "a/deep.bin")
    digests = set()

    for turn in ("one", "two"):
        keys = stored(store, *(reversed(names) if turn == "two" else names))
        write_tar(tmp_path / f"{turn}.tar", store, keys)
        digests.add(hashlib.sha256((tmp_path / f"{turn}.tar").read_bytes()).hexdigest())

    assert len(digests) == 1


def test_the_archive_has_the_adapter_at_its_root(tmp_path: Path, store: ArtifactStore) -> None:
    keys = stored(store, "b.json", "a/deep.bin", "README.md")

    write_tar(tmp_path / "x.tar", store, keys)

    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getnames() == ["README.md", "a/deep.bin", "b.json"]
        assert {entry.mode for entry in archive.getmembers()} == {0o644}
        content = archive.extractfile("b.json")
        assert content is not None
        assert content.read() == b"b.json"


def test_the_adapter_holds_what_the_manifest_lists(
    workspace: Workspace, store: ArtifactStore
) -> None:
    final = workspace.folder / "final"
    write_files(final, "adapter/weights", "adapter/unlisted", "training/config")
    told = result(workspace, "adapter/weights", "training/config")

    published = {one.path: one for one in workspace.publish_result(told, [])}

    assert names_in(store, published["adapter.tar"].uri) == ["weights"]


def test_a_linked_folder_is_not_published(
    workspace: Workspace, store: ArtifactStore, tmp_path: Path
) -> None:
    write_files(tmp_path / "elsewhere", "adapter/weights")
    told = result(workspace, "adapter/weights")
    (workspace.folder / "final" / "adapter").symlink_to(tmp_path / "elsewhere" / "adapter")

    with pytest.raises(BrokenTrainer, match="weights"):
        workspace.publish_result(told, [])

    assert store.keys("jobs") == []


@pytest.mark.parametrize("name", ["adapter.tar", "metrics.csv"])
def test_a_link_in_the_way_is_not_written_through(
    workspace: Workspace, tmp_path: Path, name: str
) -> None:
    write_files(tmp_path, "precious")
    (workspace.folder / name).symlink_to(tmp_path / "precious")

    write_files(workspace.folder / "final", "adapter/weights")
    workspace.publish_result(result(workspace, "adapter/weights"), [])

    assert (tmp_path / "precious").read_text() == "precious"


def test_a_missing_file_is_told_without_a_path_of_the_machine(
    workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(BrokenTrainer) as caught:
        workspace.publish_result(result(workspace, "adapter/weights"), [])

    assert "final/adapter/weights" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_table_has_a_column_for_every_name() -> None:
    text = metrics_table([point(1, reward_mean=0.5), point(2, reward_mean=0.25, entropy=None)])

    assert text == (
        "step,attempt,at,entropy,reward_mean\n1,1,1767225600.0,,0.5\n2,1,1767225600.0,,0.25\n"
    )


def test_a_table_without_rows_has_its_header() -> None:
    assert metrics_table([]) == "step,attempt,at\n"


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EACCES, False)])
def test_a_full_disk_is_told_from_other_faults(number: int, full: bool) -> None:  # noqa: FBT001
    assert is_full(OSError(number, "x")) is full
