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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.adapter_tar import MEDIA_TYPE, AdapterTar, StoredAdapter
from core.artifacts import ADAPTER_PATH, ADAPTER_ROLE, METRICS_PATH
from core.attempts import NewArtifact, NewCheckpoint
from core.errors import ArtifactNotFound, StoredFileCorrupt
from core.feed import MetricPoint
from core.files import StoredFile
from core.rows import Checkpoint, Job
from core.storage import ArtifactStore, Stored, open_below
from worker.errors import BrokenTrainer
from worker.journal import CheckpointFolder, FinalFolder, RowsFile

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

    def fetch_adapter(self, start: Checkpoint) -> str:
        """The adapter of another job's checkpoint, every file verified against its row.

        StoredFileCorrupt says what is wrong, ArtifactNotFound that a file is not there.
        """
        if start.adapter is None:
            raise StoredFileCorrupt("no digest of its adapter was kept")
        name = f"start/{ADAPTER_FOLDER}"
        for path, digest in start.adapter.files.items():
            key = f"{start.uri}/{ADAPTER_FOLDER}/{path}"
            self._store.fetch(key, self.folder / name / path, sha256=digest)
        return name

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
        folder = PurePosixPath(told.path)
        text = self._manifest_text(folder, told.manifest_sha256)
        manifest = _parse(CheckpointManifest, text)
        if manifest.step != told.step:
            raise BrokenTrainer(f"{told.path} is of step {manifest.step}, not {told.step}")
        uri = f"{self._prefix}/ck-{told.step}"
        for path, described in manifest.files.items():
            self._put(f"{uri}/{path}", folder / path, described.sha256)
        self._put(f"{uri}/{MANIFEST}", folder / MANIFEST, told.manifest_sha256)
        size = len(text) + sum(described.bytes for described in manifest.files.values())
        shutil.rmtree(self.folder / folder)
        return NewCheckpoint(
            step=told.step,
            uri=uri,
            manifest_sha256=told.manifest_sha256,
            bytes=size,
            adapter=self._stored_adapter(uri, manifest),
            is_good=told.good,
        )

    def _stored_adapter(self, uri: str, manifest: CheckpointManifest) -> StoredAdapter:
        """What the checkpoint's row says of the adapter in it."""
        folder = f"{ADAPTER_FOLDER}/"
        digests = {
            path.removeprefix(folder): described.sha256
            for path, described in manifest.files.items()
            if path.startswith(folder)
        }
        if not digests:
            raise BrokenTrainer("a checkpoint holds no adapter")
        archive = AdapterTar(self._store, {name: f"{uri}/{folder}{name}" for name in digests})
        return StoredAdapter(files=digests, sha256=archive.sha256(), bytes=archive.num_bytes)

    def publish_rows(self, told: RowsFile) -> NewArtifact:
        """A file of stored responses, or of their tokens."""
        stored = self._put(f"{self._prefix}/{told.path}", PurePosixPath(told.path))
        return NewArtifact(
            path=told.path,
            role=told.kind,
            media_type="application/gzip",
            uri=stored.key,
            sha256=stored.sha256,
            bytes=stored.bytes,
        )

    def publish_result(self, told: FinalFolder, curves: Sequence[MetricPoint]) -> list[NewArtifact]:
        """All files of the result, the adapter as one tar, and the curves as a table."""
        folder = PurePosixPath(told.path)
        manifest = _parse(ResultManifest, self._manifest_text(folder, told.manifest_sha256))
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
        write_tar(self._fresh(ADAPTER_PATH), self._store, _adapter_keys(artifacts))
        with self._fresh(METRICS_PATH).open("x", encoding="utf-8") as table:
            table.write(metrics_table(curves))
        return [
            *artifacts,
            self._put_artifact(
                ADAPTER_PATH,
                PurePosixPath(ADAPTER_PATH),
                role=ADAPTER_ROLE,
                media_type=MEDIA_TYPE,
            ),
            self._put_artifact(
                METRICS_PATH, PurePosixPath(METRICS_PATH), role="export", media_type="text/csv"
            ),
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
        self,
        path: str,
        source: PurePosixPath,
        *,
        role: str,
        media_type: str,
        sha256: str | None = None,
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

    def _put(self, key: str, source: PurePosixPath, sha256: str | None = None) -> Stored:
        try:
            return self._store.put_file(key, self.folder, source.as_posix(), sha256=sha256)
        except (StoredFileCorrupt, ArtifactNotFound) as fault:
            raise BrokenTrainer(fault.message) from fault

    def _fresh(self, name: str) -> Path:
        """Where a file of ours may be made; what the trainer left there, perhaps a link, goes."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path

    def _manifest_text(self, folder: PurePosixPath, digest: str) -> bytes:
        try:
            with open_below(self.folder, (folder / MANIFEST).as_posix()) as stream:
                text = stream.read(LONGEST_MANIFEST_BYTES)
        except ArtifactNotFound as fault:
            raise BrokenTrainer(f"{folder.name} has no manifest") from fault
        if hashlib.sha256(text).hexdigest() != digest:
            raise BrokenTrainer(f"the manifest of {folder.name} is not the one announced")
        return text


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


def write_tar(target: Path, store: ArtifactStore, keys: Mapping[str, str]) -> None:
    """A new ustar archive of stored objects by their names in it: same objects, same bytes."""
    archive = AdapterTar(store, keys)
    with target.open("xb") as stream:
        stream.writelines(archive.read(0, archive.num_bytes))


def _adapter_keys(artifacts: Iterable[NewArtifact]) -> dict[str, str]:
    """The keys of what lies below `adapter/`, by the path there."""
    folder = f"{ADAPTER_FOLDER}/"
    return {
        one.path.removeprefix(folder): one.uri for one in artifacts if one.path.startswith(folder)
    }


def is_full(fault: OSError) -> bool:
    """Whether a disk or a quota was full."""
    return fault.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _parse(kind: type[Manifest], text: bytes) -> Manifest:
    try:
        return kind.model_validate_json(text)
    except ValidationError as fault:
        raise BrokenTrainer(f"{MANIFEST} is not what the protocol says") from fault
