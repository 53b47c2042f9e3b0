"""What a job left: manifest, files, adapter, models."""

import hashlib
from typing import Any

import httpx2
import pytest

from core import attempts, jobs
from core.attempts import JobError
from core.db import Database
from core.ids import job_id_of
from tests.factories import MODEL, Tenant, claim_job, make_tenant
from tests.live_api import MODEL_SHA256, LiveApi, create_job, put_artifact

JOBS = "/v1/fine_tuning/jobs"
TAR = bytes(range(256)) * 20
CSV = b"step,reward_mean\n1,0.5\n"
NESTED = "adapter/adapter_config.json"


@pytest.fixture
def finished(
    api: LiveApi, client: httpx2.Client, worker_database: Database, tenant: Tenant
) -> dict[str, Any]:
    """A job that succeeded, as the API shows it."""
    job = create_job(client)
    left = (
        put_artifact(api.store, "adapter.tar", TAR, role="adapter"),
        put_artifact(api.store, NESTED, b"{}", role="adapter"),
        put_artifact(api.store, "metrics.csv", CSV, role="export"),
    )
    with worker_database.begin() as tx:
        row = jobs.get(tx, job_id_of(job["id"]), tenant_id=tenant.tenant_id)
        holder = claim_job(tx, row).holder
        name = f"ft:{MODEL}:{tenant.slug}::{row.id.hex}"
        usage = {"response_tokens": 1234}
        attempts.finish(tx, holder, artifacts=left, fine_tuned_model=name, usage=usage)
    shown: dict[str, Any] = client.get(f"{JOBS}/{job['id']}").json()
    return shown


def test_a_finished_job_names_its_results(client: httpx2.Client, finished: dict[str, Any]) -> None:
    metrics, adapter = finished["result_files"]

    assert finished["status"] == "succeeded"
    assert finished["trained_tokens"] == 1234
    assert client.get(f"/v1/files/{metrics}/content").content == CSV
    assert client.get(f"/v1/files/{adapter}/content").content == TAR
    file = client.get(f"/v1/files/{adapter}").json()
    assert (file["filename"], file["purpose"]) == ("adapter.tar", "fine-tune-results")


def test_the_manifest_lists_every_file(client: httpx2.Client, finished: dict[str, Any]) -> None:
    manifest = client.get(finished["links"]["artifacts"]).json()

    assert manifest["schema_version"] == 1
    assert manifest["job_id"] == finished["id"]
    assert manifest["base_model"] == {"id": MODEL, "sha256": MODEL_SHA256}
    assert manifest["adapter"]["sha256"] == hashlib.sha256(TAR).hexdigest()
    assert {each["path"]: each["role"] for each in manifest["files"]} == {
        "adapter.tar": "adapter",
        NESTED: "adapter",
        "metrics.csv": "export",
    }
    for each in manifest["files"]:
        content = client.get(each["url"]).content
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            each["bytes"],
            each["sha256"],
        )


def test_a_cut_download_goes_on_and_verifies(
    client: httpx2.Client, finished: dict[str, Any]
) -> None:
    adapter = client.get(finished["links"]["artifacts"]).json()["adapter"]

    start = client.get(adapter["url"], headers={"Range": "bytes=0-999"})
    rest = client.get(
        adapter["url"],
        headers={"Range": "bytes=1000-", "If-Range": f'"sha256-{adapter["sha256"]}"'},
    )

    whole = start.content + rest.content
    assert hashlib.sha256(whole).hexdigest() == adapter["sha256"]
    assert rest.status_code == 206


def test_downloads_carry_their_digest(client: httpx2.Client, finished: dict[str, Any]) -> None:
    answer = client.get(finished["links"]["adapter"])

    assert answer.headers["ETag"] == f'"sha256-{hashlib.sha256(TAR).hexdigest()}"'
    assert answer.headers["Repr-Digest"].startswith("sha-256=:")
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Length"] == str(len(TAR))
    assert answer.headers["Cache-Control"] == "private, immutable"
    assert "attachment" in answer.headers["Content-Disposition"]
    assert "Content-Encoding" not in answer.headers
    again = client.get(
        finished["links"]["adapter"], headers={"If-None-Match": answer.headers["ETag"]}
    )
    assert again.status_code == 304


@pytest.mark.parametrize(
    "path",
    [
        "nothing.txt",
        "../secrets.json",
        "..%2f..%2fsecrets.json",
        "%2e%2e/secrets.json",
        "adapter%5cadapter_config.json",
        "adapter.tar%00",
        "/etc/passwd",
        "adapter",
    ],
)
def test_a_path_is_a_name_and_nothing_else(
    client: httpx2.Client, finished: dict[str, Any], path: str
) -> None:
    answer = client.get(f"{JOBS}/{finished['id']}/artifacts/{path}")

    assert answer.status_code == 404


def test_before_the_end_there_is_no_adapter(client: httpx2.Client) -> None:
    job = create_job(client)

    answers = [client.get(f"{JOBS}/{job['id']}/{path}") for path in ("adapter", "artifacts")]

    assert [answer.status_code for answer in answers] == [409, 409]
    assert answers[0].json()["error"]["code"] == "adapter_not_ready"
    assert answers[0].headers["x-should-retry"] == "false"


def test_a_failed_job_says_why_and_has_no_adapter(
    client: httpx2.Client, worker_database: Database, tenant: Tenant
) -> None:
    job = create_job(client)
    with worker_database.begin() as tx:
        row = jobs.get(tx, job_id_of(job["id"]), tenant_id=tenant.tenant_id)
        holder = claim_job(tx, row).holder
        error = JobError(code="reward_failed", message="NaN for row 3", param="reward")
        attempts.fail(tx, holder, error=error, exit_code=70)

    shown = client.get(f"{JOBS}/{job['id']}").json()
    answer = client.get(f"{JOBS}/{job['id']}/adapter")

    assert shown["status"] == "failed"
    assert shown["error"] == {
        "code": "reward_failed",
        "message": "NaN for row 3",
        "param": "reward",
        "attempt": 1,
    }
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_adapter")


def test_another_tenant_gets_no_byte(
    api: LiveApi, finished: dict[str, Any], owner_database: Database
) -> None:
    urls = [
        finished["links"]["adapter"],
        finished["links"]["artifacts"],
        f"{finished['links']['artifacts']}/metrics.csv",
        f"/v1/files/{finished['result_files'][0]}",
        f"/v1/files/{finished['result_files'][1]}/content",
        f"/v1/models/{finished['fine_tuned_model']}",
    ]

    with api.client(make_tenant(owner_database)) as other:
        statuses = [other.get(url).status_code for url in urls]

    assert statuses == [404] * len(urls)


def test_models_are_bases_and_what_jobs_made(
    client: httpx2.Client, finished: dict[str, Any]
) -> None:
    models = client.get("/v1/models").json()["data"]

    base, made = models
    assert (base["id"], base["kind"], base["context_length"]) == (MODEL, "base", 2048)
    assert (made["id"], made["kind"]) == (finished["fine_tuned_model"], "adapter")
    assert (made["base_model"], made["job_id"]) == (MODEL, finished["id"])


@pytest.mark.parametrize("name", [MODEL, MODEL.replace("/", "%2F"), "smollm2-135m-instruct"])
def test_a_model_is_found_by_id_or_alias(client: httpx2.Client, name: str) -> None:
    assert client.get(f"/v1/models/{name}").json()["id"] == MODEL


def test_an_unknown_model_is_404(client: httpx2.Client) -> None:
    answer = client.get("/v1/models/gpt-7")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
