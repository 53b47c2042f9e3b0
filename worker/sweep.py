"""Removes what nobody will ask for: what a death left behind, and what is past its time."""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import structlog
from sqlalchemy import Connection, and_, or_, select

from core import idempotency, models
from core.attempts import Holder
from core.db import Database, now
from core.states import FINAL
from core.storage import INCOMING, ArtifactStore

KEPT_FOR = timedelta(hours=24)
KEYS_AT_ONCE = 1000

log = structlog.get_logger(__name__)


def sweep(database: Database, store: ArtifactStore, *, kept_for: timedelta = KEPT_FOR) -> int:
    """Delete the files of attempts that are old enough and have no row; how many there were."""
    orphans: list[Path] = []
    before = time.time() - kept_for.total_seconds()
    for folder in sorted((store.root / "jobs").glob("*/attempt-*")):
        if (attempt := _attempt_of(folder)) is None:
            continue
        with database.begin() as tx:
            orphans += _orphans(tx, store.root, folder, attempt, before)
    for path in orphans:
        path.unlink(missing_ok=True)
        _remove_empty(path.parent, below=store.root)
    if orphans:
        log.info("sweep.removed", files=len(orphans))
    return len(orphans)


def sweep_uploads(
    database: Database, store: ArtifactStore, *, kept_for: timedelta = KEPT_FOR
) -> int:
    """Delete old bytes of uploads that no row names, or whose file is deleted or expired.

    And uploads that were never completed.  A file that an unfinished job reads stays.
    """
    before = time.time() - kept_for.total_seconds()
    old = [path for path in _files(store.root / "files") if is_older(path, before)]
    keys = {path.relative_to(store.root).as_posix(): path for path in old}
    unneeded = [keys[key] for key in keys.keys() - _needed_uploads(database, list(keys))]
    unneeded += [path for path in _files(store.root / INCOMING) if is_older(path, before)]
    for path in unneeded:
        path.unlink(missing_ok=True)
    if unneeded:
        log.info("sweep.removed_uploads", files=len(unneeded))
    return len(unneeded)


def sweep_answers(database: Database) -> int:
    """Forget the stored answers of requests that can no longer be repeated."""
    with database.begin() as tx:
        count = idempotency.sweep(tx)
    if count:
        log.info("sweep.forgot_answers", answers=count)
    return count


def sweep_runs(database: Database, scratch: Path, *, kept_for: timedelta = KEPT_FOR) -> int:
    """Delete old run directories whose attempt is over: of workers that died in them."""
    before = time.time() - kept_for.total_seconds()
    over: list[Path] = []
    for folder in sorted(scratch.glob("*/attempt-*")):
        attempt = _attempt_of(folder)
        if attempt is None or folder.is_symlink() or folder.stat().st_mtime >= before:
            continue
        with database.begin() as tx:
            if not _is_held(tx, attempt):
                over.append(folder)
    for folder in over:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(folder.parent, below=scratch)
    if over:
        log.info("sweep.removed_runs", folders=len(over))
    return len(over)


def _needed_uploads(database: Database, keys: list[str]) -> set[str]:
    """Those of the keys that somebody may still ask for."""
    file, job = models.file.c, models.job.c
    is_used = (
        select(job.id)
        .where(
            or_(job.training_file_id == file.id, job.validation_file_id == file.id),
            job.status.not_in(FINAL),
        )
        .exists()
    )
    is_kept = and_(
        file.deleted_at.is_(None), or_(file.expires_at.is_(None), file.expires_at > now())
    )
    needed: set[str] = set()
    for start in range(0, len(keys), KEYS_AT_ONCE):
        some = keys[start : start + KEYS_AT_ONCE]
        with database.begin() as tx:
            rows = tx.execute(select(file.uri).where(file.uri.in_(some), or_(is_kept, is_used)))
            needed |= set(rows.scalars())
    return needed


def is_older(path: Path, moment: float) -> bool:
    """Whether it is a file, no link, last written before the moment; a vanished one is not."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_mtime < moment


def _attempt_of(folder: Path) -> Holder | None:
    """Whose folder it is, `<job>/attempt-<n>`; None for a name that is not ours."""
    number = folder.name.removeprefix("attempt-")
    try:
        job_id = UUID(folder.parent.name)
    except ValueError:
        return None
    return Holder(job_id=job_id, attempt=int(number)) if number.isdecimal() else None


def _orphans(
    tx: Connection, root: Path, folder: Path, attempt: Holder, before: float
) -> list[Path]:
    """Old files of one attempt that neither an artifact nor a checkpoint names."""
    old = [path for path in _files(folder) if is_older(path, before)]
    if not old or _is_held(tx, attempt):
        return []
    table = models.artifact
    named = set(tx.execute(select(table.c.uri).where(table.c.job_id == attempt.job_id)).scalars())
    kept = _kept_folders(tx, attempt.job_id)
    keys = {path.relative_to(root).as_posix(): path for path in old}
    return [
        path
        for key, path in keys.items()
        if key not in named and not any(key.startswith(folder) for folder in kept)
    ]


def _kept_folders(tx: Connection, job_id: UUID) -> list[str]:
    """What of a job's checkpoints stays: the whole, or the adapter of one that was given up."""
    saved = models.checkpoint.c
    rows = tx.execute(select(saved.uri, saved.resumable).where(saved.job_id == job_id))
    return [f"{row.uri}/" if row.resumable else f"{row.uri}/adapter/" for row in rows]


def _files(folder: Path) -> Iterator[Path]:
    """Everything below that is no folder; folders that vanish meanwhile are passed over."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _is_held(tx: Connection, attempt: Holder) -> bool:
    job = models.job.c
    row = tx.execute(
        select(job.id).where(
            job.id == attempt.job_id, job.attempt == attempt.attempt, job.lease_until.is_not(None)
        )
    ).one_or_none()
    return row is not None


def _remove_empty(folder: Path, *, below: Path) -> None:
    """Remove the folder and its parents as long as nothing is in them."""
    with contextlib.suppress(OSError):
        while folder != below:
            folder.rmdir()
            folder = folder.parent
