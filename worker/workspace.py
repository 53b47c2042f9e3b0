"""The run directory of one attempt: what goes in, and what is verified and published out of it.

A checkpoint or a result exists once its row exists; here are only the files. Everything is stored
below `jobs/<id>/attempt-<n>/`, so a late attempt never touches the files of a newer one.
"""

import csv
import errno
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.artifacts import ADAPTER_PATH, ADAPTER_ROLE, METRICS_PATH
from core.attempts import NewArtifact, NewCheckpoint
from core.errors import ArtifactNotFound, StoredFileCorrupt
from core.feed import MetricPoint
from core.files import StoredFile
from core.rows import Checkpoint, Job
from core.storage import ArtifactStore, Stored
from worker.errors import BrokenTrainer
from worker.journal import CheckpointFolder, FinalFolder, SampleFile

MANIFEST = "manifest.json"
ADAPTER_FOLDER = PurePosixPath("adapter")
LONGEST_MANIFEST_BYTES = 1 << 22


class _Described(BaseModel):
    """A file of a checkpoint, as its manifest describes it."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    bytes: int


class CheckpointManifest(BaseModel):
    """`ck-<step>/manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    files: dict[str, _Described] = Field(min_length=1)


class _ResultFile(_Described):
    path: str
    role: str
    media_type: str


class ResultManifest(BaseModel):
    """`final/manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    step: int
    files: list[_ResultFile] = Field(min_length=1)


Manifest = TypeVar("Manifest", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedInputs:
    """Paths inside the run directory, as `run.json` names them."""

    training_file: str
    validation_file: str | None


class Workspace:
    """The run directory `<scratch>/<job>/attempt-<n>/` of a job that is held."""

    def __init__(self, scratch: Path, store: ArtifactStore, job: Job) -> None:
        self._store = store
        self._prefix = f"jobs/{job.id}/attempt-{job.attempt}"
        self.folder = scratch.resolve() / str(job.id) / f"attempt-{job.attempt}"

    def fetch_inputs(self, training: StoredFile, validation: StoredFile | None) -> FetchedInputs:
        """The data in a fresh run directory, verified against the digests of their rows."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "data").mkdir(parents=True)
        self._store.fetch(
            training.uri, self.folder / "data" / "train.jsonl", sha256=training.sha256
        )
        if validation is None:
            return FetchedInputs(training_file="data/train.jsonl", validation_file=None)
        self._store.fetch(
            validation.uri, self.folder / "data" / "validation.jsonl", sha256=validation.sha256
        )
        return FetchedInputs(
            training_file="data/train.jsonl", validation_file="data/validation.jsonl"
        )

    def fetch_checkpoint(self, saved: Checkpoint) -> str:
        """A stored checkpoint, every file verified; StoredFileCorrupt says what is wrong."""
        name = f"resume/ck-{saved.step}"
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        try:
            manifest_path = self._store.fetch(
                f"{saved.uri}/{MANIFEST}", target / MANIFEST, sha256=saved.manifest_sha256
            )
            manifest = _parse(CheckpointManifest, manifest_path.read_bytes())
            for path, described in manifest.files.items():
                self._store.fetch(f"{saved.uri}/{path}", target / path, sha256=described.sha256)
        except ArtifactNotFound:
            raise StoredFileCorrupt("a file is missing") from None
        except BrokenTrainer:
            raise StoredFileCorrupt("its manifest cannot be read") from None
        return name

    def write_run_file(self, content: dict[str, Any]) -> None:
        """Leave `run.json` for the trainer."""
        (self.folder / "run.json").write_text(json.dumps(content, indent=2, allow_nan=False))

    def publish_checkpoint(self, told: CheckpointFolder) -> NewCheckpoint:
        """The checkpoint's files verified and stored, the manifest last."""
        folder = self.folder / told.path
        text = _manifest_text(folder, told.manifest_sha256)
        manifest = _parse(CheckpointManifest, text)
        if manifest.step != told.step:
            raise BrokenTrainer(f"{told.path} is of step {manifest.step}, not {told.step}")
        uri = f"{self._prefix}/ck-{told.step}"
        for path, described in manifest.files.items():
            self._put(f"{uri}/{path}", folder / path, described.sha256)
        self._put(f"{uri}/{MANIFEST}", folder / MANIFEST, told.manifest_sha256)
        size = len(text) + sum(described.bytes for described in manifest.files.values())
        shutil.rmtree(folder)
        return NewCheckpoint(
            step=told.step, uri=uri, manifest_sha256=told.manifest_sha256, bytes=size
        )

    def publish_sample(self, told: SampleFile) -> NewArtifact:
        """A file of stored rollouts."""
        stored = self._put(f"{self._prefix}/{told.path}", self.folder / told.path)
        return NewArtifact(
            path=told.path,
            role="sample",
            media_type="application/gzip",
            uri=stored.key,
            sha256=stored.sha256,
            bytes=stored.bytes,
        )

    def publish_result(self, told: FinalFolder, curves: Sequence[MetricPoint]) -> list[NewArtifact]:
        """All files of the result, the adapter as one tar, and the curves as a table."""
        folder = self.folder / told.path
        manifest = _parse(ResultManifest, _manifest_text(folder, told.manifest_sha256))
        artifacts = [
            self._put_artifact(
                file.path,
                folder / file.path,
                role=file.role,
                media_type=file.media_type,
                sha256=file.sha256,
            )
            for file in manifest.files
        ]
        tar = self.folder / ADAPTER_PATH
        write_tar(tar, folder / ADAPTER_FOLDER)
        table = self.folder / METRICS_PATH
        table.write_text(metrics_table(curves), encoding="utf-8")
        return [
            *artifacts,
            self._put_artifact(
                ADAPTER_PATH, tar, role=ADAPTER_ROLE, media_type="application/x-tar"
            ),
            self._put_artifact(METRICS_PATH, table, role="export", media_type="text/csv"),
        ]

    def unpublish_result(self) -> None:
        """Take back what `publish_result` stored; for a job that did not succeed after all."""
        self._store.delete_all(f"{self._prefix}/result")

    def thin_checkpoint(self, old: Checkpoint) -> None:
        """Delete what only a resume would need; the adapter stays."""
        for key in self._store.keys(old.uri):
            if not key.startswith(f"{old.uri}/{ADAPTER_FOLDER}/"):
                self._store.delete(key)

    def remove(self) -> None:
        """Delete the run directory, and the job's folder with the last of them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.exists() and not any(self.folder.parent.iterdir()):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _put_artifact(
        self, path: str, source: Path, *, role: str, media_type: str, sha256: str | None = None
    ) -> NewArtifact:
        stored = self._put(f"{self._prefix}/result/{path}", source, sha256)
        return NewArtifact(
            path=path,
            role=role,
            media_type=media_type,
            uri=stored.key,
            sha256=stored.sha256,
            bytes=stored.bytes,
        )

    def _put(self, key: str, source: Path, sha256: str | None = None) -> Stored:
        try:
            return self._store.put_file(key, source, sha256=sha256)
        except (StoredFileCorrupt, ArtifactNotFound, FileNotFoundError) as fault:
            raise BrokenTrainer(f"{key}: {fault}") from fault


def metrics_table(curves: Iterable[MetricPoint]) -> str:
    """The visible values as CSV: a row per step, a column per name, empty where there is none."""
    points = list(curves)
    names = sorted({name for point in points for name in point.values})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", "attempt", "at", *names])
    for point in points:
        values = (point.values.get(name) for name in names)
        table.writerow([point.step, point.attempt, point.at.timestamp(), *values])
    return text.getvalue()


def write_tar(target: Path, folder: Path) -> None:
    """The folder's files at the root of a ustar archive: same files, same bytes."""
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            entry.mode = 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)


def is_full(fault: OSError) -> bool:
    """Whether a disk or a quota was full."""
    return fault.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _manifest_text(folder: Path, digest: str) -> bytes:
    try:
        with (folder / MANIFEST).open("rb") as stream:
            text = stream.read(LONGEST_MANIFEST_BYTES)
    except OSError as fault:
        raise BrokenTrainer(f"{folder.name} has no manifest") from fault
    if hashlib.sha256(text).hexdigest() != digest:
        raise BrokenTrainer(f"the manifest of {folder.name} is not the one announced")
    return text


def _parse(kind: type[Manifest], text: bytes) -> Manifest:
    try:
        return kind.model_validate_json(text)
    except ValidationError as fault:
        raise BrokenTrainer(f"{MANIFEST} is not what the protocol says") from fault
