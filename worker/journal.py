"""What a trainer wrote into `metrics.jsonl`, as rows for the database and entries for the stream.

The format is described in `docs/trainer-protocol.md`.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from core.events import EventCode, Level, NewClipPass, NewEvent, NewMetric
from worker.errors import BrokenTrainer

CHUNK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsFile:
    """A file of stored responses, or of their tokens, lies ready."""

    line: int
    step: int
    path: str
    kind: Literal["sample", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFolder:
    """A complete checkpoint lies ready."""

    line: int
    step: int
    path: str
    manifest_sha256: str
    good: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalFolder:
    """The adapter lies ready; nothing follows."""

    line: int
    step: int
    path: str
    manifest_sha256: str


Entry = NewMetric | NewClipPass | NewEvent | RowsFile | CheckpointFolder | FinalFolder


@dataclass(frozen=True, slots=True)
class Journal:
    """One attempt's `metrics.jsonl`, read from where the last stored line ended.

    Reading does not move on: `after(entries)` is the journal behind lines that are stored. So a
    transaction that failed is tried again with the same lines.
    """

    path: Path
    offset: int = 0
    last_line: int = 0

    def entries(self, limit: int) -> "Batch":
        """The next complete lines, at most so many; a folder always comes alone."""
        entries: list[Entry] = []
        offset = self.offset
        for text in self._complete_lines():
            entry = parse_line(text)
            if entry.line != self.last_line + len(entries) + 1:
                raise BrokenTrainer(f"line {entry.line} follows {self.last_line + len(entries)}")
            is_folder = isinstance(entry, CheckpointFolder | FinalFolder)
            if is_folder and entries:
                break
            entries.append(entry)
            offset += len(text)
            if is_folder or len(entries) == limit:
                break
        behind = Journal(self.path, offset, self.last_line + len(entries))
        return Batch(entries=tuple(entries), behind=behind)

    def _complete_lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read(CHUNK_BYTES)
            while text and b"\n" not in text and len(text) < LONGEST_LINE_BYTES:
                more = file.read(CHUNK_BYTES)
                if not more:
                    return []
                text += more
        if len(text) >= LONGEST_LINE_BYTES and b"\n" not in text:
            raise BrokenTrainer(f"line {self.last_line + 1} does not end")
        return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Lines read together, and the journal behind them."""

    entries: tuple[Entry, ...]
    behind: Journal


def parse_line(text: bytes) -> Entry:
    """One line of the journal; BrokenTrainer when it is none."""
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
        return _parse_fields(fields)
    except (ValueError, KeyError, TypeError, OverflowError, binascii.Error) as fault:
        raise BrokenTrainer(f"a line of metrics.jsonl breaks the protocol: {fault}") from fault


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_fields(fields: Mapping[str, Any]) -> Entry:
    line, step = _count(fields["line"]), _count(fields["step"])
    match fields["kind"]:
        case "metrics":
            return NewMetric(
                line=line,
                step=step,
                at=datetime.fromtimestamp(fields["at"], UTC),
                values={name: _number(value) for name, value in fields["values"].items()},
            )
        case "clip":
            return NewClipPass(
                line=line,
                step=step,
                epoch=_count(fields["epoch"]),
                minibatch=_count(fields["minibatch"]),
                values=dict(fields["values"]),
                histogram=base64.b64decode(fields["histogram"], validate=True),
            )
        case "event":
            return NewEvent(
                line=line,
                step=step,
                level=_level(fields["level"]),
                code=EventCode(fields["code"]),
                message=str(fields["message"]),
                data=dict(fields["data"]),
            )
        case "sample" | "tokens" as kind:
            return RowsFile(line=line, step=step, path=_inside(fields["path"]), kind=kind)
        case "checkpoint":
            return CheckpointFolder(
                line=line,
                step=step,
                path=_inside(fields["path"]),
                manifest_sha256=str(fields["manifest_sha256"]),
                good=bool(fields["good"]),
            )
        case "final":
            return FinalFolder(
                line=line,
                step=step,
                path=_inside(fields["path"]),
                manifest_sha256=str(fields["manifest_sha256"]),
            )
        case kind:
            raise ValueError(f"unknown kind {kind!r}")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _number(value: Any) -> float | None:
    if value is None or (type(value) in {int, float} and math.isfinite(value)):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"{value!r} is no finite number")


def _level(value: Any) -> Level:
    if value not in get_args(Level):
        raise ValueError(f"unknown level {value!r}")
    return value  # type: ignore[no-any-return]


def _inside(path: Any) -> str:
    """A path that stays below the run directory."""
    parts = Path(str(path)).parts
    if not parts or ".." in parts or Path(path).is_absolute():
        raise ValueError(f"{path!r} leaves the run directory")
    return str(path)
