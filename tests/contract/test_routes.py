"""Every route of the OpenAPI document: keys, foreign ids, unknown parameters, error forms.

The lists are generated from the document, so a new route is covered, or fails, by itself.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from api import openapi, schemas
from api.app import create_app
from api.error_codes import ERROR_CODES
from api.settings import ApiSettings
from core import attempts, jobs
from core.db import Database
from core.ids import job_id_of
from tests.conftest import Servers
from tests.factories import Tenant, claim_job, make_tenant
from tests.live_api import LiveApi, create_job, live_api, put_artifact

PUBLIC = {"/v1/healthz", "/v1/readyz", "/v1/errors/{code}"}
EXPECTED = {
    "GET /v1/errors/{code}",
    "GET /v1/files",
    "GET /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "GET /v1/files/{file_id}/validation",
    "GET /v1/fine_tuning/jobs",
    "GET /v1/fine_tuning/jobs/{job_id}",
    "GET /v1/fine_tuning/jobs/{job_id}/adapter",
    "GET /v1/fine_tuning/jobs/{job_id}/artifacts",
    "GET /v1/fine_tuning/jobs/{job_id}/artifacts/{path}",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "GET /v1/fine_tuning/jobs/{job_id}/clip",
    "GET /v1/fine_tuning/jobs/{job_id}/clip/histogram",
    "GET /v1/fine_tuning/jobs/{job_id}/clip/sweep",
    "GET /v1/fine_tuning/jobs/{job_id}/clip/tokens",
    "GET /v1/fine_tuning/jobs/{job_id}/diagnosis",
    "GET /v1/fine_tuning/jobs/{job_id}/events",
    "GET /v1/fine_tuning/jobs/{job_id}/metrics",
    "GET /v1/fine_tuning/jobs/{job_id}/stream",
    "GET /v1/healthz",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/readyz",
    "POST /v1/files",
    "POST /v1/fine_tuning/jobs",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel",
    "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume",
    "POST /v1/ppo/clip/explain",
    "DELETE /v1/files/{file_id}",
}


def built_document() -> dict[str, Any]:
    settings = ApiSettings(
        database_url="postgresql://nobody:none@127.0.0.1:1/none",
        redis_url="redis://127.0.0.1:1/0",
    )
    return openapi.document(create_app(settings))


DOCUMENT = built_document()
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
WITH_KEY = [(method, path) for method, path, _ in OPERATIONS if path not in PUBLIC]
WITH_ID = [(method, path) for method, path in WITH_KEY if "{" in path]


@pytest.fixture(scope="module")
def api(
    servers: Servers, api_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    with live_api(api_url, servers.redis_url, tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture(scope="module")
def owner(owner_database: Database) -> Tenant:
    return make_tenant(owner_database)


@pytest.fixture(scope="module")
def stranger(api: LiveApi, owner_database: Database) -> Iterator[httpx2.Client]:
    """Another tenant, with every right."""
    with api.client(make_tenant(owner_database)) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(api: LiveApi, owner: Tenant, worker_database: Database) -> dict[str, str]:
    """Ids of a tenant that has one of everything."""
    with api.client(owner) as client:
        job = create_job(client)
        with worker_database.begin() as tx:
            row = jobs.get(tx, job_id_of(job["id"]), tenant_id=owner.tenant_id)
            holder = claim_job(tx, row).holder
            left = put_artifact(api.store, "adapter.tar", b"bytes", role="adapter")
            attempts.finish(tx, holder, artifacts=(left,), fine_tuned_model="ft:x:y::z")
    return {
        "job_id": job["id"],
        "file_id": job["training_file"],
        "path": "adapter.tar",
        "model": "ft:x:y::z",
    }


def test_the_routes_are_these() -> None:
    assert {f"{method} {path}" for method, path, _ in OPERATIONS} == EXPECTED


@pytest.mark.parametrize(("method", "path"), WITH_KEY)
def test_no_key_no_answer(api: LiveApi, ids: dict[str, str], method: str, path: str) -> None:
    with api.client() as client:
        answer = client.request(method, path.format(**ids), content=b"{broken")

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(("method", "path"), WITH_ID)
def test_another_tenants_ids_are_404(
    stranger: httpx2.Client, ids: dict[str, str], method: str, path: str
) -> None:
    answer = stranger.request(method, path.format(**ids))

    assert answer.status_code == 404
    assert answer.json()["error"]["code"].endswith("_not_found")


@pytest.mark.parametrize(("method", "path"), [each for each in WITH_ID if each[0] == "GET"])
def test_the_owner_gets_an_answer(
    api: LiveApi, owner: Tenant, ids: dict[str, str], method: str, path: str
) -> None:
    """Without this, the test above would pass on a wrong address."""
    with api.client(owner) as client:
        answer = client.request(method, path.format(**ids))

    assert answer.status_code == 200


@pytest.mark.parametrize(("method", "path"), [(m, p) for m, p, _ in OPERATIONS])
def test_an_unknown_query_parameter_is_refused(
    api: LiveApi, owner: Tenant, ids: dict[str, str], method: str, path: str
) -> None:
    with api.client(owner) as client:
        url = path.format(**ids, code="job_not_found")
        answer = client.request(method, url, params={"nonsense": "1"})

    assert answer.status_code == 400
    assert "unknown_parameter" in {fault["code"] for fault in answer.json()["errors"]}


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS)
def test_every_route_documents_its_errors(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    assert operation["summary"], (method, path)
    if path in PUBLIC:
        return
    assert {"400", "401", "403", "500", "503"} <= operation["responses"].keys()
    for status, answer in operation["responses"].items():
        if status >= "400":
            assert "application/problem+json" in answer["content"], status


def test_the_document_is_served_without_a_key(api: LiveApi) -> None:
    with api.client() as client:
        served = client.get("/v1/openapi.json").json()

    assert served == DOCUMENT
    assert served["openapi"].startswith("3.1")
    assert "clip_range" in served["components"]["schemas"]["PpoHyperparameters"]["properties"]


def test_every_reference_of_the_document_leads_somewhere() -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert set(references(DOCUMENT)) <= known


@pytest.mark.parametrize("code", sorted(ERROR_CODES))
def test_every_error_code_has_a_page(api: LiveApi, code: str) -> None:
    with api.client() as client:
        body = client.get(f"/v1/errors/{code}").json()

    assert (body["code"], body["status"]) == (code, ERROR_CODES[code].status)
    assert body["title"]
    assert body["remedy"]


def test_the_fields_of_a_job_are_these() -> None:
    """A field of the database does not slip out by itself."""
    assert set(schemas.Job.model_fields) == {
        "attempt",
        "cancel_requested_at",
        "created_at",
        "error",
        "estimated_finish",
        "fine_tuned_model",
        "finished_at",
        "health",
        "hyperparameters",
        "id",
        "integrations",
        "latest",
        "limits",
        "links",
        "metadata",
        "method",
        "model",
        "object",
        "organization_id",
        "pause_requested_at",
        "phase",
        "priority",
        "progress",
        "queue",
        "resolved",
        "result_files",
        "resumed_from_step",
        "seed",
        "started_at",
        "status",
        "start_checkpoint",
        "stream_cursor",
        "trained_tokens",
        "training_file",
        "usage",
        "user_provided_suffix",
        "validation_file",
        "warnings",
        "worker",
    }


def test_the_api_loads_no_torch() -> None:
    program = "import sys, api.app; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "set()"
