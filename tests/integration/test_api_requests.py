"""What holds for every request: keys, bodies, error answers, repeats, outages."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from core import keys
from core.db import Database
from core.ids import job_id_of
from tests.conftest import Servers, as_role, new_database, opened
from tests.factories import Tenant, make_tenant
from tests.live_api import LiveApi, create_job, job_body, live_api

JOBS = "/v1/fine_tuning/jobs"
NO_DATABASE = "postgresql://trimtab_api:secret@127.0.0.1:1/nothing"


def code_of(answer: httpx2.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Basic abc", "Bearer nonsense", "Bearer sk-tt-aaaaaaaaaaaa_b"],
)
def test_no_or_a_wrong_key_is_401(api: LiveApi, header: str | None) -> None:
    with api.client() as stranger:
        answer = stranger.get(JOBS, headers={} if header is None else {"Authorization": header})

    assert (answer.status_code, code_of(answer)) == (401, "invalid_api_key")
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_with_another_secret_is_401(api: LiveApi, tenant: Tenant) -> None:
    wrong = tenant.secret[:-1] + ("a" if tenant.secret[-1] != "a" else "b")

    with api.client() as stranger:
        answer = stranger.get(JOBS, headers={"Authorization": f"Bearer {wrong}"})

    assert answer.status_code == 401


def test_a_revoked_key_is_401_at_once(
    client: httpx2.Client, tenant: Tenant, owner_database: Database
) -> None:
    assert client.get(JOBS).status_code == 200

    with owner_database.begin() as tx:
        keys.revoke(tx, tenant.public_key_id)

    assert client.get(JOBS).status_code == 401


def test_a_key_without_the_right_is_403(api: LiveApi, owner_database: Database) -> None:
    reader = make_tenant(owner_database, scopes=["jobs:read", "files:read"])

    with api.client(reader) as client:
        assert client.get(JOBS).status_code == 200
        answers = [
            client.post(JOBS, content=b"broken", headers={"Content-Type": "application/json"}),
            client.post(f"{JOBS}/ftjob-{'0' * 32}/cancel"),
            client.get("/v1/models"),
            client.delete(f"/v1/files/file-{'0' * 32}"),
        ]

    assert [code_of(answer) for answer in answers] == ["insufficient_scope"] * 4
    assert {answer.status_code for answer in answers} == {403}


def test_the_key_is_checked_before_the_body_is_read(api: LiveApi) -> None:
    """A stranger's body is never parsed: 401 comes before any 400, 413 or 415."""
    with api.client() as stranger:
        answers = [
            stranger.post(JOBS, content=b"{broken"),
            stranger.post(JOBS, content=b"x" * 2_000_000),
            stranger.post("/v1/files", content=b"no form"),
            stranger.get("/v1/nothing/here"),
        ]

    assert [answer.status_code for answer in answers] == [401] * 4


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"{broken", "line 1, column 2"),
        (b'{\n  "a": 1,\n}', "line 3, column 1"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b"", "line 1, column 1"),
    ],
)
def test_broken_json_is_named_with_its_place(
    client: httpx2.Client, content: bytes, place: str
) -> None:
    answer = client.post(JOBS, content=content, headers={"Content-Type": "application/json"})

    assert (answer.status_code, code_of(answer)) == (400, "invalid_json")
    assert place in answer.json()["detail"]


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"text"'])
def test_a_body_that_is_no_object_is_refused(client: httpx2.Client, content: bytes) -> None:
    answer = client.post(JOBS, content=content, headers={"Content-Type": "application/json"})

    assert (answer.status_code, code_of(answer)) == (400, "invalid_type")


def test_another_media_type_is_415(client: httpx2.Client) -> None:
    answer = client.post(JOBS, content=b"a=b", headers={"Content-Type": "text/plain"})

    assert (answer.status_code, code_of(answer)) == (415, "unsupported_media_type")


def test_a_large_body_is_413(client: httpx2.Client) -> None:
    body = json.dumps({"model": "x" * 1_000_001}).encode()

    def in_chunks() -> Iterator[bytes]:
        yield from (body[start : start + 65536] for start in range(0, len(body), 65536))

    headers = {"Content-Type": "application/json"}
    answers = [client.post(JOBS, content=each, headers=headers) for each in (body, in_chunks())]

    assert [code_of(answer) for answer in answers] == ["request_too_large"] * 2
    assert [answer.status_code for answer in answers] == [413] * 2


def test_an_unknown_address_is_404(client: httpx2.Client) -> None:
    for url in ("/v1/nothing", "/v1", "/", "/v1/fine_tuning/jobs/", "/v2/models"):
        answer = client.get(url, headers={"Accept": "text/html"})

        assert (answer.status_code, code_of(answer)) == (404, "unknown_url"), url


def test_a_wrong_method_is_405(client: httpx2.Client) -> None:
    answer = client.put(JOBS)

    assert (answer.status_code, code_of(answer)) == (405, "method_not_allowed")
    assert "POST" in answer.headers["Allow"] or "GET" in answer.headers["Allow"]


def test_an_error_speaks_both_languages(client: httpx2.Client) -> None:
    answer = client.get(f"{JOBS}/ftjob-{'0' * 32}")

    body = answer.json()
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert body["type"] == "/v1/errors/job_not_found"
    assert body["status"] == 404
    assert body["instance"] == f"{JOBS}/ftjob-{'0' * 32}"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["error"] == {
        "message": body["detail"],
        "type": "not_found_error",
        "param": None,
        "code": "job_not_found",
    }
    assert client.get(body["type"]).json()["status"] == 404


def test_every_answer_has_an_id_and_its_time(client: httpx2.Client) -> None:
    first, second = client.get(JOBS), client.get("/v1/healthz")

    assert first.headers["x-request-id"].startswith("req_")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert int(first.headers["openai-processing-ms"]) >= 0
    assert second.headers["Cache-Control"] == "no-store"


def test_health_needs_no_key(api: LiveApi) -> None:
    with api.client() as stranger:
        assert stranger.get("/v1/healthz").json() == {"status": "ok"}
        assert stranger.get("/v1/readyz").json() == {
            "status": "ready",
            "database": "ok",
            "schema": "current",
            "redis": "ok",
        }


def test_an_unknown_error_code_is_404(api: LiveApi) -> None:
    with api.client() as stranger:
        assert code_of(stranger.get("/v1/errors/nonsense")) == "error_not_found"


def test_without_its_database_the_api_is_503(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory, tenant: Tenant
) -> None:
    folder = tmp_path_factory.mktemp("down")
    with (
        live_api(NO_DATABASE, servers.redis_url, folder) as down,
        down.client(tenant) as client,
    ):
        answer = client.get(JOBS)
        ready = client.get("/v1/readyz")

    assert (answer.status_code, code_of(answer)) == (503, "database_unavailable")
    assert answer.headers["Retry-After"] == "2"
    assert "127.0.0.1" not in answer.text
    assert (ready.status_code, ready.json()["database"]) == (503, "unavailable")


def test_without_redis_jobs_are_taken(
    api_url: str, tmp_path_factory: pytest.TempPathFactory, tenant: Tenant
) -> None:
    folder = tmp_path_factory.mktemp("no-redis")
    with (
        live_api(api_url, "redis://127.0.0.1:1/0", folder) as running,
        running.client(tenant) as client,
    ):
        job = create_job(client)
        ready = client.get("/v1/readyz").json()

    assert job["status"] == "queued"
    assert (ready["status"], ready["redis"]) == ("ready", "unavailable")


def test_without_its_store_an_upload_leaves_nothing(
    servers: Servers, api_url: str, tmp_path: Path, tenant: Tenant
) -> None:
    (tmp_path / "artifacts").write_text("a file stands where the folder should be")
    with (
        live_api(api_url, servers.redis_url, tmp_path) as running,
        running.client(tenant) as client,
    ):
        answer = client.post(
            "/v1/files", files={"file": ("a", b"x")}, data={"purpose": "user_data"}
        )
        listed = client.get("/v1/files").json()["data"]

    assert (answer.status_code, code_of(answer)) == (503, "storage_unavailable")
    assert str(tmp_path) not in answer.text
    assert listed == []


def readiness(url: str, servers: Servers, folder: Path) -> httpx2.Response:
    as_api = as_role(url, "trimtab_api", servers.api_password)
    with live_api(as_api, servers.redis_url, folder) as running:
        return httpx2.get(f"{running.base_url}/readyz")


def test_without_tables_the_api_is_not_ready(servers: Servers, tmp_path: Path) -> None:
    with new_database(servers.owner_url) as empty:
        answer = readiness(empty, servers, tmp_path)

    assert (answer.status_code, answer.json()["schema"]) == (503, "outdated")


def test_with_another_schema_the_api_is_not_ready(
    servers: Servers, migrated_template: str, tmp_path: Path
) -> None:
    with new_database(servers.owner_url, template=migrated_template) as url:
        with opened(url) as owner, owner.begin() as tx:
            tx.execute(text("update alembic_version set version_num = 'older'"))
        answer = readiness(url, servers, tmp_path)

    assert (answer.status_code, answer.json()["schema"]) == (503, "outdated")


def test_our_own_fault_is_500_and_tells_nothing(
    client: httpx2.Client, owner_database: Database
) -> None:
    job = create_job(client)
    with owner_database.begin() as tx:
        tx.execute(text("update job set spec = '{}' where id = :id"), {"id": job_id_of(job["id"])})

    answer = client.get(f"{JOBS}/{job['id']}")

    assert (answer.status_code, code_of(answer)) == (500, "internal_error")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    for secret in ("Traceback", "KeyError", "method", "select", ".py"):
        assert secret not in answer.text


def num_jobs(client: httpx2.Client) -> int:
    return len(client.get(JOBS, params={"limit": 100}).json()["data"])


def test_the_same_key_and_body_make_one_job(client: httpx2.Client) -> None:
    body, headers = job_body(client), {"Idempotency-Key": "first"}

    first = client.post(JOBS, json=body, headers=headers)
    second = client.post(
        JOBS, json=dict(reversed(body.items())), headers={"Idempotency-Key": '"first"'}
    )

    assert second.text == first.text
    assert second.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Location"] == first.headers["Location"]
    assert num_jobs(client) == 1


def test_a_key_with_another_body_or_address_is_422(client: httpx2.Client) -> None:
    body, headers = job_body(client), {"Idempotency-Key": "first"}
    job = client.post(JOBS, json=body, headers=headers).json()

    answers = [
        client.post(JOBS, json=body | {"seed": 3}, headers=headers),
        client.post(f"{JOBS}/{job['id']}/cancel", headers=headers),
    ]

    assert [code_of(answer) for answer in answers] == ["idempotency_key_reused"] * 2
    assert [answer.status_code for answer in answers] == [422] * 2
    assert num_jobs(client) == 1


def test_keys_of_two_tenants_do_not_meet(
    api: LiveApi, client: httpx2.Client, owner_database: Database
) -> None:
    headers = {"Idempotency-Key": "shared"}
    client.post(JOBS, json=job_body(client), headers=headers)

    with api.client(make_tenant(owner_database)) as other:
        answer = other.post(JOBS, json=job_body(other), headers=headers)

    assert answer.status_code == 200


def test_a_failed_request_leaves_its_key_free(client: httpx2.Client) -> None:
    body, headers = job_body(client), {"Idempotency-Key": "again"}

    refused = client.post(JOBS, json=body | {"model": "none"}, headers=headers)
    taken = client.post(JOBS, json=body, headers=headers)

    assert (refused.status_code, taken.status_code) == (400, 200)


@pytest.mark.parametrize("key", ["", '""', "a b", "é", "x" * 256])
def test_a_malformed_key_is_refused(client: httpx2.Client, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode())]

    answer = client.post(JOBS, json=job_body(client), headers=headers)

    assert (answer.status_code, code_of(answer)) == (400, "invalid_idempotency_key")


def test_twenty_at_once_make_one_job(api: LiveApi, client: httpx2.Client, tenant: Tenant) -> None:
    body, answers = job_body(client), []

    def post() -> None:
        with api.client(tenant) as own:
            answers.append(own.post(JOBS, json=body, headers={"Idempotency-Key": "race"}))

    threads = [threading.Thread(target=post) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    taken = [answer for answer in answers if answer.status_code == 200]
    waiting = [answer for answer in answers if answer.status_code == 409]
    assert len(taken) + len(waiting) == 20
    assert len({answer.json()["id"] for answer in taken}) == 1
    assert {code_of(answer) for answer in waiting} <= {"idempotency_in_progress"}
    assert all("x-should-retry" not in answer.headers for answer in waiting)
    assert num_jobs(client) == 1


def retry(count: int) -> dict[str, str]:
    return {"x-stainless-retry-count": str(count)}


def test_the_clients_own_retry_is_answered_without_a_second_job(client: httpx2.Client) -> None:
    body = job_body(client)

    answers = [client.post(JOBS, json=body, headers=retry(n)).json()["id"] for n in (0, 1, 2)]

    assert len(set(answers)) == 1
    assert num_jobs(client) == 1


def test_two_equal_first_requests_are_two_wishes(client: httpx2.Client) -> None:
    body = job_body(client)

    for _ in range(2):
        client.post(JOBS, json=body, headers=retry(0))

    assert num_jobs(client) == 2


def test_a_retry_of_another_body_is_new(client: httpx2.Client) -> None:
    body = job_body(client)
    client.post(JOBS, json=body, headers=retry(0))

    client.post(JOBS, json=body | {"seed": 9}, headers=retry(1))

    assert num_jobs(client) == 2


def test_an_upload_is_repeated_by_what_it_holds(client: httpx2.Client) -> None:
    """Each try has a new multipart boundary; the digest is of the parsed parts."""

    def send(boundary: str, content: str, key: str) -> dict[str, Any]:
        parts = [("purpose", "", "user_data"), ("file", '; filename="a"', content)]
        body = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
            f"{value}\r\n"
            for name, more, value in parts
        )
        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Idempotency-Key": key,
        }
        whole = f"{body}--{boundary}--\r\n".encode()
        answer: dict[str, Any] = client.post("/v1/files", content=whole, headers=headers).json()
        return answer

    first = send("one", "hello", "k")
    second = send("two", "hello", "k")
    other = send("three", "other", "k")

    assert second["id"] == first["id"]
    assert other["error"]["code"] == "idempotency_key_reused"


def test_cancel_can_be_repeated_too(client: httpx2.Client) -> None:
    job = create_job(client)
    headers = {"Idempotency-Key": "stop"}

    first, second = (client.post(f"{JOBS}/{job['id']}/cancel", headers=headers) for _ in range(2))

    assert first.text == second.text
    assert second.headers["Idempotent-Replayed"] == "true"
