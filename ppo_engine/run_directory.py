"""The folder through which a supervisor and this process speak (protocol version 1).

The supervisor writes `run.json` and `stop`; this process appends to `metrics.jsonl` and writes
`exit.json` last.  Nothing else passes between them.
"""

import base64
import gzip
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from ppo_engine.errors import EngineError, InvalidConfig
from ppo_engine.export import BaseModelRef
from ppo_engine.folders import write_json
from ppo_engine.reports import EngineEvent, PassReport, StepReport

PROTOCOL_VERSION = 1
_NEEDED = {
    "train": ("data", "config", "reward", "resume_from"),
    "sample": (
        *("data", "adapter", "reward", "samples_per_prompt", "precision"),
        *("max_prompt_tokens", "max_response_tokens", "temperature"),
    ),
}
"""What each kind of run must find in its file, besides what all have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """What `run.json` asks for."""

    kind: Literal["train", "sample"]
    job_id: str
    attempt: int
    seed: int
    device: str
    base_model: BaseModelRef
    folder: Path
    """The run directory: everything is written below it."""
    start_adapter: str | None
    """An adapter to start from, which is then the frozen reference too; None: the bare base."""
    content: dict[str, Any]
    """The whole file; what only one kind of run needs is read from here."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """The checked file; `InvalidConfig` says what is wrong with it."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["protocol_version"] != PROTOCOL_VERSION:
                raise InvalidConfig(
                    f"run.json speaks protocol {content['protocol_version']}, "
                    f"this engine {PROTOCOL_VERSION}",
                    param="protocol_version",
                )
            if content["kind"] not in _NEEDED:
                raise InvalidConfig(f"unknown kind of run: {content['kind']}", param="kind")
            for name in _NEEDED[content["kind"]]:
                content[name]  # what is missing is told now, not in the middle of the run
            return cls(
                kind=content["kind"],
                job_id=content["job_id"],
                attempt=content["attempt"],
                seed=content["seed"],
                device=content["device"],
                base_model=BaseModelRef(**content["base_model"]),
                folder=path.parent / content["out"],
                start_adapter=content.get("start_adapter"),
                content=content,
            )
        except (OSError, ValueError, TypeError) as error:
            raise InvalidConfig(f"run.json cannot be read: {error}") from error
        except KeyError as error:
            raise InvalidConfig(f"run.json lacks {error}", param=str(error.args[0])) from error

    def path(self, name: str | None) -> Path | None:
        """A path given in the file; relative ones start at the run directory."""
        return None if name is None else self.folder / name


class RunDirectory:
    """Writes the lines of `metrics.jsonl`, and reads the stop request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._line = 0

    def stop_request(self) -> str | None:
        """`pause`, `cancel` or `finish`, once the supervisor wants it."""
        try:
            return (self._folder / "stop").read_text().strip() or None
        except FileNotFoundError:
            return None

    def write_step(self, report: StepReport) -> None:
        """Samples, clip statistics, events and, last, the metrics of an update."""
        self._write_rows("sample", report.step, "samples", report.samples)
        self._write_rows("tokens", report.step, "tokens", report.tokens)
        for each in report.passes:
            self._write_pass(report.step, each)
        for event in report.events:
            self.write_event(report.step, event)
        self._write("metrics", report.step, values=_json_numbers(report.values))

    def write_event(self, step: int, event: EngineEvent) -> None:
        """Something that happened."""
        self._write(
            "event",
            step,
            level=event.level,
            code=event.code,
            message=event.message,
            data=event.data,
        )

    def write_checkpoint(
        self, step: int, folder: Path, manifest_sha256: str, *, is_good: bool
    ) -> None:
        """A checkpoint that is complete on the disk, and whether the run was healthy then."""
        name = folder.relative_to(self._folder).as_posix()
        self._write("checkpoint", step, path=name, manifest_sha256=manifest_sha256, good=is_good)
        os.fsync(self._file.fileno())

    def write_final(self, step: int, folder: Path, manifest_sha256: str) -> None:
        """The finished adapter, complete on the disk."""
        name = folder.relative_to(self._folder).as_posix()
        self._write("final", step, path=name, manifest_sha256=manifest_sha256)
        os.fsync(self._file.fileno())

    def _write_pass(self, step: int, report: PassReport) -> None:
        self._write(
            "clip",
            step,
            epoch=report.epoch,
            minibatch=report.minibatch,
            values=report.stored_values(),
            histogram=base64.b64encode(report.histogram).decode(),
        )

    def _write_rows(
        self, kind: str, step: int, folder: str, rows: Sequence[dict[str, Any]]
    ) -> None:
        """A file of rows, if there are any, complete before its line is written."""
        if not rows:
            return
        path = self._folder / folder / f"{step}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        text = "".join(
            json.dumps(_json_numbers(row), ensure_ascii=False, allow_nan=False) + "\n"
            for row in rows
        )
        path.write_bytes(gzip.compress(text.encode("utf-8", "replace"), mtime=0))
        self._write(kind, step, path=path.relative_to(self._folder).as_posix(), rows=len(rows))

    def _write(self, kind: str, step: int, **content: Any) -> None:
        self._line += 1
        line = {"line": self._line, "kind": kind, "step": step, "at": time.time(), **content}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()


def write_exit(folder: Path, code: int, reason: str, error: EngineError | None = None) -> None:
    """The last file of a run directory: how the run ended."""
    told = error and {"code": error.code, "message": error.message, "param": error.param}
    temporary = folder / "exit.json.tmp"
    write_json(temporary, {"code": code, "reason": reason, "error": told})
    temporary.replace(folder / "exit.json")


def _json_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
