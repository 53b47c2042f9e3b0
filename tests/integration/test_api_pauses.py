"""Pause and resume over HTTP, limits, starts from a checkpoint, and adapters of checkpoints."""

import hashlib
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from sqlalchemy import text, update

from core import attempts, jobs, models
from core.adapter_tar import AdapterTar, StoredAdapter
from core.attempts import Holder, JobError, NewCheckpoint
from core.db import Database
from core.ids import job_id_of
from core.rows import Job
from core.states import Phase
from tests.factories import MODEL, TTL, Tenant, claim_job, make_tenant
from tests.live_api import LiveApi, create_job, job_body, put_artifact, wait_until

JOBS = "/v1/fine_tuning/jobs"
WEIGHTS = "adapter_model.safetensors"
UNKNOWN_CHECKPOINT = f"ftckpt_{'0' * 32}-1-1"


def row_of(database: Database, job: dict[str, Any], tenant: Tenant) -> Job:
    with database.begin() as tx:
        return jobs.get(tx, job_id_of(job["id"]), tenant_id=tenant.tenant_id)


def run(database: Database, job: dict[str, Any], tenant: Tenant) -> Holder:
    """Make the job run, as a worker would."""
    row = row_of(database, job, tenant)
    with database.begin() as tx:
        return claim_job(tx, row).holder


def save(database: Database, api: LiveApi, holder: Holder, step: int) -> bytes:
    """A checkpoint with an adapter of its own; the bytes of its weights."""
    uri = f"jobs/{holder.job_id}/attempt-{holder.attempt}/ck-{step}"
    weights = f"weights of step {step}".encode() * 40
    stored = [
        api.store.put(f"{uri}/adapter/{name}", [content])
        for name, content in ((WEIGHTS, weights), ("adapter_config.json", b"{}"))
    ]
    archive = AdapterTar(api.store, {one.key.rpartition("/")[2]: one.key for one in stored})
    adapter = StoredAdapter(
        files={one.key.rpartition("/")[2]: one.sha256 for one in stored},
        sha256=archive.sha256(),
        bytes=archive.num_bytes,
    )
    new = NewCheckpoint(
        step=step, uri=uri, manifest_sha256="0" * 64, bytes=10, adapter=adapter, is_good=True
    )
    with database.begin() as tx:
        attempts.checkpoint(tx, holder, new, ttl=TTL)
    return weights


def weights_in(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.extractfile(WEIGHTS)
        assert member is not None
        return member.read()


def code_of(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# Pause and resume.


def test_a_waiting_job_pauses_at_once_and_resumes(client: httpx2.Client) -> None:
    job = create_job(client)

    paused = client.post(f"{JOBS}/{job['id']}/pause").json()
    again = client.post(f"{JOBS}/{job['id']}/pause").json()
    resumed = client.post(f"{JOBS}/{job['id']}/resume").json()

    assert (paused["status"], paused["phase"]) == ("paused", None)
    assert paused["pause_requested_at"] is not None
    assert again == paused
    assert (resumed["status"], resumed["phase"], resumed["pause_requested_at"]) == (
        "queued",
        "waiting",
        None,
    )


def test_a_running_job_is_asked_and_may_be_asked_not_to(
    client: httpx2.Client, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    run(worker_database, job, tenant)

    pausing = client.post(f"{JOBS}/{job['id']}/pause").json()
    going_on = client.post(f"{JOBS}/{job['id']}/resume").json()

    assert (pausing["status"], pausing["phase"]) == ("running", "pausing")
    assert pausing["pause_requested_at"] is not None
    assert (going_on["status"], going_on["phase"]) == ("running", "starting")
    assert going_on["pause_requested_at"] is None


@pytest.mark.parametrize("wish", ["pause", "resume"])
def test_a_cancel_that_is_pending_is_a_permanent_conflict(
    client: httpx2.Client, worker_database: Database, tenant: Tenant, wish: str
) -> None:
    job = create_job(client)
    run(worker_database, job, tenant)
    client.post(f"{JOBS}/{job['id']}/cancel")

    answer = client.post(f"{JOBS}/{job['id']}/{wish}")

    assert code_of(answer) == (409, "cancel_pending")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("wish", ["pause", "resume"])
def test_an_ended_job_neither_pauses_nor_resumes(client: httpx2.Client, wish: str) -> None:
    job = create_job(client)
    client.post(f"{JOBS}/{job['id']}/cancel")

    answer = client.post(f"{JOBS}/{job['id']}/{wish}")

    assert code_of(answer) == (409, "job_already_finished")
    assert answer.headers["x-should-retry"] == "false"


def test_a_pause_with_an_old_tag_is_refused(
    client: httpx2.Client, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    tag = client.get(f"{JOBS}/{job['id']}").headers["ETag"]
    run(worker_database, job, tenant)

    answer = client.post(f"{JOBS}/{job['id']}/pause", headers={"If-Match": tag})

    assert code_of(answer) == (412, "precondition_failed")
    assert row_of(worker_database, job, tenant).stop_wanted is None


def test_a_change_on_its_way_counts_for_the_tag(
    client: httpx2.Client, owner_database: Database, worker_database: Database, tenant: Tenant
) -> None:
    """The job is claimed by a transaction that ends after the pause has been asked for."""
    job = create_job(client)
    tag = client.get(f"{JOBS}/{job['id']}").headers["ETag"]
    row = row_of(worker_database, job, tenant)

    def waits_for_a_lock() -> bool:
        waiting = text(
            "select count(*) from pg_locks l join pg_stat_activity a using (pid)"
            " where not l.granted and a.datname = current_database()"
        )
        with owner_database.begin() as tx:
            return bool(tx.execute(waiting).scalar_one())

    with ThreadPoolExecutor(1) as pool:
        with worker_database.begin() as tx:
            claim_job(tx, row)
            answer = pool.submit(
                client.post, f"{JOBS}/{job['id']}/pause", headers={"If-Match": tag}
            )
            wait_until(waits_for_a_lock)

        assert code_of(answer.result()) == (412, "precondition_failed")
    assert row_of(worker_database, job, tenant).stop_wanted is None


# Limits.


def test_a_job_shows_its_limits_and_where_it_stands(
    client: httpx2.Client, worker_database: Database, tenant: Tenant
) -> None:
    body = job_body(client) | {"limits": {"max_generated_tokens": 50}}
    job = client.post(JOBS, json=body).json()
    holder = run(worker_database, job, tenant)

    with worker_database.begin() as tx:
        attempts.heartbeat(tx, holder, ttl=TTL, phase=Phase.TRAINING, usage={"response_tokens": 50})

    limits = {"max_runtime_seconds": None, "max_generated_tokens": 50, "on_limit": "pause"}
    shown = client.get(f"{JOBS}/{job['id']}").json()
    assert job["limits"] == {**limits, "reached": None}
    assert shown["limits"] == {**limits, "reached": "max_generated_tokens"}
    assert shown["phase"] == "pausing"
    assert create_job(client)["limits"] is None


# Starting from a checkpoint.


@pytest.fixture
def source(
    client: httpx2.Client, api: LiveApi, worker_database: Database, tenant: Tenant
) -> dict[str, Any]:
    """A checkpoint, as the API lists it."""
    job = create_job(client, lora={"rank": 4, "alpha": 8})
    save(worker_database, api, run(worker_database, job, tenant), 3)
    (found,) = client.get(f"{JOBS}/{job['id']}/checkpoints").json()["data"]
    return dict(found)


def test_a_checkpoint_as_model_starts_a_job_from_it(
    client: httpx2.Client, worker_database: Database, tenant: Tenant, source: dict[str, Any]
) -> None:
    answer = client.post(JOBS, json=job_body(client) | {"model": source["id"]})

    job = answer.json()
    assert answer.status_code == 200, answer.text
    assert (job["model"], job["start_checkpoint"]) == (MODEL, source["id"])
    assert (job["resolved"]["lora"]["rank"], job["resolved"]["lora"]["alpha"]) == (4, 8.0)
    row = row_of(worker_database, job, tenant)
    assert (row.start_attempt, row.start_step) == (1, 3)


def test_the_form_of_the_adapter_may_be_repeated_but_not_changed(
    client: httpx2.Client, source: dict[str, Any]
) -> None:
    same = client.post(JOBS, json=job_body(client, lora={"rank": 4}) | {"model": source["id"]})
    other = client.post(JOBS, json=job_body(client, lora={"rank": 8}) | {"model": source["id"]})

    assert same.status_code == 200
    assert code_of(other) == (400, "invalid_combination")
    assert [fault["pointer"] for fault in other.json()["errors"]] == [
        "/method/ppo/hyperparameters/lora/rank",
        "/model",
    ]
    assert "lora.rank is 8" in other.json()["detail"]


@pytest.mark.parametrize("name", [UNKNOWN_CHECKPOINT, "ftckpt_x", "ftckpt_"])
def test_an_unknown_checkpoint_as_model_is_the_requests_fault(
    client: httpx2.Client, name: str
) -> None:
    answer = client.post(JOBS, json=job_body(client) | {"model": name})

    assert code_of(answer) == (400, "checkpoint_not_found")
    assert answer.json()["error"]["param"] == "model"


def test_another_tenants_checkpoint_is_as_absent(
    api: LiveApi, owner_database: Database, source: dict[str, Any]
) -> None:
    with api.client(make_tenant(owner_database)) as other:
        answer = other.post(JOBS, json=job_body(other) | {"model": source["id"]})

    assert code_of(answer) == (400, "checkpoint_not_found")


def test_a_checkpoint_without_a_kept_digest_is_refused(
    client: httpx2.Client, owner_database: Database, source: dict[str, Any]
) -> None:
    with owner_database.begin() as tx:
        tx.execute(
            update(models.checkpoint)
            .where(models.checkpoint.c.job_id == job_id_of(source["fine_tuning_job_id"]))
            .values(adapter=None)
        )

    answer = client.post(JOBS, json=job_body(client) | {"model": source["id"]})

    assert code_of(answer) == (400, "checkpoint_not_found")
    assert "older version" in answer.json()["detail"]


def test_a_finished_model_starts_a_job_from_the_checkpoint_with_its_weights(
    client: httpx2.Client, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    holder = run(worker_database, job, tenant)
    weights = save(worker_database, api, holder, 3)
    name = f"ft:{MODEL}:{tenant.slug}::{job['id']}"
    left = put_artifact(api.store, f"adapter/{WEIGHTS}", weights, role="adapter")
    with worker_database.begin() as tx:
        attempts.finish(tx, holder, artifacts=[left], fine_tuned_model=name)

    made = client.post(JOBS, json=job_body(client) | {"model": name}).json()
    unknown = client.post(JOBS, json=job_body(client) | {"model": f"{name}x"})

    assert made["start_checkpoint"] == f"ftckpt_{job_id_of(job['id']).hex}-1-3"
    assert code_of(unknown) == (400, "model_not_found")


# The adapter before, at and without a good end.


def test_a_running_job_serves_its_last_checkpoints_adapter(
    client: httpx2.Client, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    url = f"{JOBS}/{job['id']}/adapter"
    holder = run(worker_database, job, tenant)
    early = client.get(url)
    seen = []

    for step in (1, 2):
        weights = save(worker_database, api, holder, step)
        answer = client.get(url)
        seen.append(weights_in(answer.content) == weights)
        digest = hashlib.sha256(answer.content).hexdigest()
        assert answer.headers["ETag"] == f'"sha256-{digest}"'
        assert answer.headers["Cache-Control"] == "private, no-cache"
        assert f"step-{step}-adapter.tar" in answer.headers["Content-Disposition"]

    assert code_of(early) == (409, "adapter_not_ready")
    assert seen == [True, True]


def test_a_part_of_a_checkpoints_adapter_can_be_fetched_until_another_takes_its_place(
    client: httpx2.Client, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    url = f"{JOBS}/{job['id']}/adapter"
    holder = run(worker_database, job, tenant)
    save(worker_database, api, holder, 1)
    whole = client.get(url)
    headers = {"Range": "bytes=700-", "If-Range": whole.headers["ETag"]}

    part = client.get(url, headers=headers)
    save(worker_database, api, holder, 2)
    stale = client.get(url, headers=headers)

    assert (part.status_code, part.content) == (206, whole.content[700:])
    assert stale.status_code == 200


def end_as(database: Database, client: httpx2.Client, holder: Holder, url: str, end: str) -> None:
    if end == "failed":
        with database.begin() as tx:
            attempts.fail(tx, holder, JobError(code="reward_failed", message="NaN"))
        return
    client.post(f"{url}/{'cancel' if end == 'cancelled' else 'pause'}")
    with database.begin() as tx:
        attempts.release(tx, holder, reason="stopped")


@pytest.mark.parametrize(
    ("end", "without"),
    [
        ("paused", (409, "adapter_not_ready")),
        ("cancelled", (404, "no_adapter")),
        ("failed", (404, "no_adapter")),
    ],
)
def test_a_job_without_a_result_serves_its_last_checkpoint_or_none(
    client: httpx2.Client,
    api: LiveApi,
    worker_database: Database,
    tenant: Tenant,
    end: str,
    without: tuple[int, str],
) -> None:
    bare, saved = create_job(client), create_job(client)
    for job in (bare, saved):
        holder = run(worker_database, job, tenant)
        if job is saved:
            weights = save(worker_database, api, holder, 4)
        end_as(worker_database, client, holder, f"{JOBS}/{job['id']}", end)
        assert client.get(f"{JOBS}/{job['id']}").json()["status"] == end

    nothing = client.get(f"{JOBS}/{bare['id']}/adapter")
    answer = client.get(f"{JOBS}/{saved['id']}/adapter")
    manifest = client.get(f"{JOBS}/{saved['id']}/artifacts").json()

    assert code_of(nothing) == without
    assert weights_in(answer.content) == weights
    checkpoint = f"ftckpt_{job_id_of(saved['id']).hex}-1-4"
    assert (manifest["checkpoint_id"], manifest["step"]) == (checkpoint, 4)
    fixed = client.get(manifest["adapter"]["url"])
    assert fixed.content == answer.content
    assert fixed.headers["Cache-Control"] == "private, immutable"
    assert manifest["adapter"]["sha256"] == hashlib.sha256(fixed.content).hexdigest()


def test_any_checkpoint_of_a_job_can_be_asked_for_and_no_other(
    client: httpx2.Client, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job, other = create_job(client), create_job(client)
    url = f"{JOBS}/{job['id']}"
    holder = run(worker_database, job, tenant)
    first, _ = (save(worker_database, api, holder, step) for step in (1, 2))
    save(worker_database, api, run(worker_database, other, tenant), 2)
    with worker_database.begin() as tx:
        left = [put_artifact(api.store, "adapter.tar", b"the result", role="adapter")]
        attempts.finish(tx, holder, artifacts=left, fine_tuned_model=f"ft:{job['id']}")
    newest, oldest = client.get(f"{url}/checkpoints").json()["data"]

    found = client.get(f"{url}/adapter", params={"checkpoint": oldest["id"]})
    manifest = client.get(f"{url}/artifacts", params={"checkpoint": oldest["id"]}).json()
    foreign = client.get(f"{JOBS}/{other['id']}/adapter", params={"checkpoint": newest["id"]})

    assert client.get(f"{url}/adapter").content == b"the result"
    assert client.get(f"{url}/artifacts").json()["checkpoint_id"] is None
    assert weights_in(found.content) == first
    assert (manifest["checkpoint_id"], manifest["files"]) == (oldest["id"], [])
    assert code_of(foreign) == (404, "checkpoint_not_found")


def test_a_checkpoint_whose_adapter_is_gone_from_the_store_is_404(
    client: httpx2.Client, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    holder = run(worker_database, job, tenant)
    save(worker_database, api, holder, 1)
    api.store.delete_all(f"jobs/{holder.job_id}")

    answer = client.get(f"{JOBS}/{job['id']}/adapter")

    assert code_of(answer) == (404, "artifact_not_found")
