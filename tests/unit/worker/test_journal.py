import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.events import EventCode, NewClipPass, NewEvent, NewMetric
from worker.errors import BrokenTrainer
from worker.journal import CheckpointFolder, FinalFolder, Journal, RowsFile, parse_line

METRICS = {"kind": "metrics", "step": 1, "at": 1.5, "values": {"reward_mean": 0.5, "entropy": None}}
CHECKPOINT = {
    "kind": "checkpoint",
    "step": 1,
    "at": 2.0,
    "path": "ck-1",
    "manifest_sha256": "ab",
    "good": True,
}
FINAL = {"kind": "final", "step": 1, "at": 3.0, "path": "final", "manifest_sha256": "cd"}


def written(path: Path, *lines: dict[str, Any], tail: str = "") -> Journal:
    text = "".join(
        json.dumps({"line": number, **line}) + "\n" for number, line in enumerate(lines, start=1)
    )
    path.write_text(text + tail)
    return Journal(path)


def line_of(**fields: Any) -> bytes:
    return json.dumps({"line": 1, "step": 3, "at": 1.5} | fields).encode()


def test_a_journal_that_does_not_exist_yet_has_no_lines(tmp_path: Path) -> None:
    assert Journal(tmp_path / "metrics.jsonl").entries(10).entries == ()


def test_a_line_without_its_end_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    batch = written(path, METRICS, tail='{"line": 2, "kind"').entries(10)

    assert [entry.line for entry in batch.entries] == [1]
    with path.open("a") as file:
        file.write(': "final", "step": 1, "at": 1, "path": "final", "manifest_sha256": "x"}\n')

    assert [entry.line for entry in batch.behind.entries(10).entries] == [2]


def test_reading_does_not_move_on(tmp_path: Path) -> None:
    journal = written(tmp_path / "metrics.jsonl", METRICS, METRICS)

    assert journal.entries(1) == journal.entries(1)


def test_lines_come_in_batches(tmp_path: Path) -> None:
    journal = written(tmp_path / "metrics.jsonl", *[METRICS] * 5)
    taken = []

    while batch := journal.entries(2).entries:
        taken.append(len(batch))
        journal = journal.entries(2).behind

    assert taken == [2, 2, 1]


def test_a_folder_comes_alone(tmp_path: Path) -> None:
    journal = written(tmp_path / "metrics.jsonl", METRICS, CHECKPOINT, METRICS, FINAL)
    kinds = []

    while batch := journal.entries(10).entries:
        kinds.append([type(entry) for entry in batch])
        journal = journal.entries(10).behind

    assert kinds == [[NewMetric], [CheckpointFolder], [NewMetric], [FinalFolder]]


def test_a_long_line_is_read_whole(tmp_path: Path) -> None:
    note = {**METRICS, "note": "x" * 3_000_000}

    batch = written(tmp_path / "metrics.jsonl", note, METRICS).entries(10)
    rest = batch.behind.entries(10)

    assert [entry.line for entry in (*batch.entries, *rest.entries)] == [1, 2]


def test_a_missing_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"line": 2, **METRICS}) + "\n")

    with pytest.raises(BrokenTrainer, match="line 2 follows 0"):
        Journal(path).entries(10)


def test_each_kind_becomes_its_row() -> None:
    sums = base64.b64encode(b"\x00" * 24).decode()

    assert parse_line(line_of(kind="metrics", values={"a": 1, "b": None})) == NewMetric(
        line=1, step=3, at=datetime(1970, 1, 1, 0, 0, 1, 500_000, UTC), values={"a": 1, "b": None}
    )
    assert parse_line(
        line_of(kind="clip", epoch=1, minibatch=2, values={"counts": {"x": 1}}, histogram=sums)
    ) == NewClipPass(
        line=1, step=3, epoch=1, minibatch=2, values={"counts": {"x": 1}}, histogram=b"\x00" * 24
    )
    assert parse_line(
        line_of(kind="event", level="warn", code="resume.not_identical", message="m", data={"a": 1})
    ) == NewEvent(
        line=1,
        step=3,
        level="warn",
        code=EventCode.RESUME_NOT_IDENTICAL,
        message="m",
        data={"a": 1},
    )
    for kind in ("sample", "tokens"):
        assert parse_line(line_of(kind=kind, path="samples/3.jsonl.gz")) == RowsFile(
            line=1, step=3, path="samples/3.jsonl.gz", kind=kind
        )


@pytest.mark.parametrize(
    "text",
    [
        b"no json",
        b"[]",
        b"{}",
        b'{"line": 1, "kind": "metrics", "step": 1, "at": 1, "values": {"a": NaN}}',
        line_of(kind="metrics", values={"a": "1"}),
        line_of(kind="metrics", values={"a": True}),
        line_of(kind="metrics", values={}, line=-1),
        line_of(kind="metrics", values={}, line=1.0),
        line_of(kind="metrics", values={}, at=1e30),
        line_of(kind="clip", epoch=0, minibatch=0, values={}, histogram="%%%"),
        line_of(kind="event", level="loud", code="job.failed", message="m", data={}),
        line_of(kind="event", level="info", code="nobody.knows", message="m", data={}),
        line_of(kind="sample", path="../../etc/passwd"),
        line_of(kind="sample", path="/etc/passwd"),
        line_of(kind="final", path="", manifest_sha256="x"),
        line_of(kind="surprise"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(text: bytes) -> None:
    with pytest.raises(BrokenTrainer):
        parse_line(text)
