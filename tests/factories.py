"""Valid objects for tests; a test states only what matters to it."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select

from core import feed, files, jobs, keys, models
from core.adapter_tar import StoredAdapter
from core.attempts import Claim, NewArtifact, NewCheckpoint, claim
from core.db import Database
from core.events import NewClipPass, NewMetric
from core.files import NewFile, StoredFile
from core.ids import public_file_id
from core.jobs import NewJob
from core.rows import Job
from core.spec import parse_spec, resolve
from core.storage import ArtifactStore

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TTL = timedelta(seconds=60)
DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A tenant with one key."""

    tenant_id: UUID
    slug: str
    key_id: UUID
    public_key_id: str
    secret: str
    """The whole key, as a client sends it."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}


def make_tenant(owner_database: Database, slug: str | None = None, **key: Any) -> Tenant:
    slug = slug or f"tenant-{secrets.token_hex(6)}"
    with owner_database.begin() as tx:
        made = keys.create(tx, tenant=slug, name="test", **key)
    return Tenant(
        tenant_id=made.key.tenant_id,
        slug=slug,
        key_id=made.key.id,
        public_key_id=made.key.public_id,
        secret=made.secret.get_secret_value(),
    )


def spec_dict(**hyperparameters: Any) -> dict[str, Any]:
    """The body of a job request, with these hyperparameters."""
    return {
        "model": MODEL,
        "training_file": public_file_id(UUID(int=1)),
        "method": {
            "type": "ppo",
            "ppo": {"reward": {"type": "sentiment"}, "hyperparameters": hyperparameters},
        },
    }


def prompt_lines(count: int = 8) -> bytes:
    """A file of prompts."""
    rows = [f'{{"prompt": "Tell me about thing {number}."}}\n' for number in range(count)]
    return "".join(rows).encode()


def make_file(
    tx: Connection, tenant: Tenant, *, store: ArtifactStore | None = None, **over: Any
) -> StoredFile:
    """A checked file of prompts; with a store its bytes exist too."""
    fields: dict[str, Any] = {
        "tenant_id": tenant.tenant_id,
        "created_by": tenant.key_id,
        "purpose": files.TRAINING_PURPOSE,
        "filename": "prompts.jsonl",
        "bytes": 0,
        "sha256": DIGEST,
        "uri": f"files/{secrets.token_hex(8)}",
        "status": "processed",
        "rows": 8,
        "report": {"valid": True, "rows": 8, "error_count": 0, "errors": [], "warnings": []},
    }
    fields |= over
    if store is not None:
        stored = store.put(fields["uri"], [prompt_lines(fields["rows"])])
        fields |= {"bytes": stored.bytes, "sha256": stored.sha256}
    return files.add(tx, NewFile(**fields))


def make_job(
    tx: Connection,
    tenant: Tenant,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    file: StoredFile | None = None,
    **over: Any,
) -> Job:
    """A queued job."""
    training = file or make_file(tx, tenant)
    body = spec_dict(**(hyperparameters or {}))
    body["training_file"] = public_file_id(training.id)
    spec = parse_spec(body)
    resolved = resolve(spec, prompts=training.rows or 8, seed=7)
    fields: dict[str, Any] = {
        "tenant_id": tenant.tenant_id,
        "created_by": tenant.key_id,
        "spec": spec.stored(),
        "resolved": resolved.to_dict(),
        "model": spec.model,
        "training_file_id": training.id,
        "queue": "cpu",
    }
    return jobs.create(tx, NewJob(**(fields | over)))


def claim_job(tx: Connection, job: Job, *, task_id: str = "", ttl: timedelta = TTL) -> Claim:
    """The job, held by a worker."""
    held = claim(
        tx, job.id, task_id=task_id or secrets.token_hex(8), worker_label="tester", ttl=ttl
    )
    assert held is not None
    return held


def metric(line: int, step: int, **values: float | None) -> NewMetric:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=line)
    return NewMetric(line=line, step=step, at=at, values=values or {"reward_mean": float(step)})


def clip_pass(line: int, step: int, *, epoch: int = 0, minibatch: int = 0) -> NewClipPass:
    return NewClipPass(
        line=line,
        step=step,
        epoch=epoch,
        minibatch=minibatch,
        values={"tokens": 10},
        histogram=b"\x00" * 24,
    )


def stored_checkpoint(step: int) -> NewCheckpoint:
    return NewCheckpoint(
        step=step,
        uri=f"ck-{step}",
        manifest_sha256=DIGEST,
        bytes=10,
        adapter=StoredAdapter(
            files={"adapter_model.safetensors": DIGEST}, sha256=DIGEST, bytes=10_240
        ),
        is_good=True,
    )


def artifact(path: str = "adapter.tar", role: str = "adapter") -> NewArtifact:
    return NewArtifact(
        path=path,
        role=role,
        media_type="application/x-tar",
        uri=f"results/{secrets.token_hex(8)}",
        sha256=DIGEST,
        bytes=10,
    )


def visible_passes(tx: Connection, job_id: UUID) -> list[feed.ClipPass]:
    """The clip statistics of a job that no resume made void, by step, epoch and minibatch."""
    table = models.clip_pass
    rows = tx.execute(
        select(table)
        .where(table.c.job_id == job_id, feed.is_visible(table))
        .order_by(table.c.step, table.c.epoch, table.c.minibatch)
    )
    return [feed.clip_pass(row) for row in rows]
