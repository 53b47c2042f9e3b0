"""What is past its time goes; what anybody may still ask for stays."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update

from core import files, models
from core.db import Database
from core.idempotency import LIFETIME
from core.storage import INCOMING, ArtifactStore
from tests.factories import Tenant, claim_job, make_file, make_job
from worker.sweep import sweep_answers, sweep_runs, sweep_uploads

LONG_AGO = time.time() - 48 * 3600
YESTERDAY = datetime.now(UTC) - timedelta(days=1)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def age(path: Path) -> Path:
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def stored(store: ArtifactStore) -> set[str]:
    return {path.name for path in (store.root / "files").rglob("*") if path.is_file()}


def test_uploads_that_nobody_may_ask_for_are_swept(
    store: ArtifactStore, database: Database, worker_database: Database, tenant: Tenant
) -> None:
    with database.begin() as tx:
        for name in ("kept", "deleted"):
            make_file(tx, tenant, store=store, uri=f"files/{name}")
        make_file(tx, tenant, store=store, uri="files/expired", expires_at=YESTERDAY)
        used = make_file(tx, tenant, store=store, uri="files/in-use", expires_at=YESTERDAY)
        make_job(tx, tenant, file=used)
        gone = tx.execute(select(models.file.c.id).where(models.file.c.uri == "files/deleted"))
        files.delete(tx, gone.scalar_one(), tenant_id=tenant.tenant_id)
    store.put("files/orphan", [b"its row was never committed"])
    for path in (store.root / "files").iterdir():
        age(path)
    store.put("files/young", [b"its row may be on the way"])
    unfinished = store.root / INCOMING / "unfinished"
    unfinished.write_bytes(b"half")

    assert sweep_uploads(worker_database, store) == 3
    assert stored(store) == {"kept", "in-use", "young"}
    assert unfinished.exists()

    age(unfinished)
    assert sweep_uploads(worker_database, store) == 1
    assert not unfinished.exists()


def test_answers_past_their_time_are_forgotten(
    worker_database: Database, owner_database: Database, tenant: Tenant
) -> None:
    row = {
        "tenant_id": tenant.tenant_id,
        "caller": tenant.key_id,
        "retry_count": 0,
        "method": "POST",
        "path": "/",
        "query": "",
        "body_sha256": b"",
        "answer": {},
    }
    with owner_database.begin() as tx:
        for key, at in (("old", func.now() - LIFETIME), ("new", func.now())):
            tx.execute(insert(models.idempotency).values(**row, key=key, created_at=at))

    assert sweep_answers(worker_database) == 1

    with owner_database.begin() as tx:
        assert tx.execute(select(models.idempotency.c.key)).scalars().all() == ["new"]


@pytest.fixture
def runs(
    tmp_path: Path, database: Database, worker_database: Database, tenant: Tenant
) -> Iterator[Path]:
    """A scratch folder with run directories: of a held job, and of two that are over."""
    scratch = tmp_path / "scratch"
    with database.begin() as tx:
        held, over = make_job(tx, tenant), make_job(tx, tenant)
    with worker_database.begin() as tx:
        claim_job(tx, held)
    for job, name in ((held, "held"), (over, "over"), (over, "young")):
        folder = scratch / str(job.id) / f"attempt-{2 if name == 'young' else 1}"
        folder.mkdir(parents=True)
        (folder / name).write_text("")
        if name != "young":
            age(folder)
    yield scratch
    with worker_database.begin() as tx:
        tx.execute(update(models.job).values(lease_until=None, status="queued"))


def test_run_directories_of_attempts_that_are_over_are_swept(
    runs: Path, worker_database: Database
) -> None:
    assert sweep_runs(worker_database, runs) == 1
    assert {path.name for path in runs.glob("*/*/*")} == {"held", "young"}
