import errno
import hashlib
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.feed import MetricPoint
from worker.workspace import is_full, metrics_table, write_tar


def folder_with(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


def point(step: int, **values: float | None) -> MetricPoint:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return MetricPoint(attempt=1, line=step, seq=step, step=step, at=at, values=values)


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    names = ("b.json", "a/deep.bin")
    digests = set()

    for turn in ("one", "two"):
        written = reversed(names) if turn == "two" else names
        folder = folder_with(tmp_path / turn, *written)
        write_tar(tmp_path / f"{turn}.tar", folder)
        digests.add(hashlib.sha256((tmp_path / f"{turn}.tar").read_bytes()).hexdigest())

    assert len(digests) == 1


def test_the_archive_has_the_adapter_at_its_root(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "adapter", "b.json", "a/deep.bin", "README.md")

    write_tar(tmp_path / "x.tar", folder)

    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getnames() == ["README.md", "a/deep.bin", "b.json"]
        assert {entry.mode for entry in archive.getmembers()} == {0o644}
        content = archive.extractfile("b.json")
        assert content is not None
        assert content.read() == b"b.json"


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
