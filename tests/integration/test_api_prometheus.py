"""`/metrics`: on an address of its own, with labels that do not grow with the data."""

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest
import redis
from sqlalchemy import text, update
from sqlalchemy.dialects import postgresql

from api.prometheus import unfinished_jobs
from core import attempts, models
from core.db import Database, now
from core.dispatch import presence_key
from core.ids import job_id_of, public_job_id
from tests.conftest import Servers
from tests.factories import TTL, Tenant
from tests.live_api import LiveApi, create_job, live_api, wait_until
from trimtab.stack import free_port

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def api(
    servers: Servers, api_url: str, metrics_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    folder = tmp_path_factory.mktemp("api")
    with live_api(api_url, servers.redis_url, folder, metrics_port=metrics_port) as running:
        running.app.state.exposition.serve("127.0.0.1", metrics_port)
        yield running
        running.app.state.exposition.end()


def scrape(port: int) -> dict[str, float]:
    """Each sample by its name and labels, as the text has them."""
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        f"{name}{{{labels}}}" if labels else name: float(value)
        for name, labels, value in SAMPLE.findall(text)
    }


def test_requests_are_counted_by_template_and_never_by_id(
    api: LiveApi, tenant: Tenant, metrics_port: int
) -> None:
    with api.client(tenant) as client:
        job = create_job(client)
        for _ in range(3):
            client.get(f"/v1/fine_tuning/jobs/{job['id']}")
        client.get("/v1/nowhere-at-all")
        client.request("PURGE", "/v1/models")

    found = scrape(metrics_port)

    route = "/v1/fine_tuning/jobs/{job_id}"
    name = f'trimtab_http_requests_total{{method="GET",route="{route}",status="200"}}'
    assert found[name] == 3
    assert found[f'trimtab_http_request_seconds_count{{route="{route}"}}'] == 3
    assert 'method="other"' in " ".join(found)
    assert 'route="unmatched"' in " ".join(found)
    assert job["id"] not in " ".join(found)
    assert "nowhere" not in " ".join(found)


def test_the_state_of_the_service_is_told(
    api: LiveApi,
    tenant: Tenant,
    metrics_port: int,
    redis_url: str,
    owner_database: Database,
    worker_database: Database,
) -> None:
    with api.client(tenant) as client:
        waiting, silent = (job_id_of(create_job(client)["id"]) for _ in range(2))
    with worker_database.begin() as tx:
        assert attempts.claim(tx, silent, task_id="t", worker_label="w", ttl=TTL) is not None
    with owner_database.begin() as tx:
        job, ago = models.job, timedelta(seconds=90)
        tx.execute(update(job).where(job.c.id == waiting).values(created_at=now() - ago))
        tx.execute(update(job).where(job.c.id == silent).values(lease_until=now() - ago))
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(presence_key("cpu", "one"), "1")
        connection.set(presence_key("cpu", "two"), "1")
    with api.client(tenant) as client:
        url = f"/v1/fine_tuning/jobs/{public_job_id(waiting)}/stream"
        with client.stream("GET", url):
            wait_until(lambda: scrape(metrics_port)["trimtab_streams_open"] == 1)
            found = scrape(metrics_port)
    wait_until(lambda: scrape(metrics_port)["trimtab_streams_open"] == 0)

    assert found["trimtab_database_up"] == found["trimtab_redis_up"] == 1
    assert found['trimtab_jobs{status="queued"}'] >= 1
    assert found['trimtab_jobs{status="running"}'] == 1
    assert 90 <= found["trimtab_oldest_new_job_seconds"] < 150
    assert found['trimtab_workers_online{queue="cpu"}'] == 2
    assert found["trimtab_leases_expired"] == 1
    assert found['trimtab_streams_closed_total{reason="slow"}'] == 0
    assert found["process_resident_memory_bytes"] > 0


def test_counting_jobs_reads_none_that_has_ended(database: Database) -> None:
    question = unfinished_jobs().compile(dialect=postgresql.dialect())

    with database.begin() as tx:
        tx.execute(text("set local enable_seqscan = off"))  # a small table is read whole
        plan = "\n".join(tx.execute(text(f"explain {question}")).scalars())

    assert "ix_job_unfinished" in plan


def test_the_public_address_knows_no_metrics(api: LiveApi, tenant: Tenant) -> None:
    with api.client(tenant) as client:
        assert client.get("/metrics").status_code == 404


def test_without_servers_the_rest_is_told(tmp_path: Path) -> None:
    port = free_port()
    nowhere = "postgresql://trimtab_api:x@127.0.0.1:1/none"
    with live_api(nowhere, "redis://127.0.0.1:1/0", tmp_path, metrics_port=port) as running:
        running.app.state.exposition.serve("127.0.0.1", port)
        found = scrape(port)
        running.app.state.exposition.end()

    assert found["trimtab_database_up"] == found["trimtab_redis_up"] == 0
    assert not [name for name in found if name.startswith("trimtab_jobs")]


def test_a_taken_port_is_told_with_its_setting(
    api_url: str, servers: Servers, metrics_port: int, api: LiveApi
) -> None:
    del api
    done = subprocess.run(
        [sys.executable, "-m", "api"],
        env={
            "PATH": "/usr/bin",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DATABASE_URL": api_url,
            "REDIS_URL": servers.redis_url,
            "TRIMTAB_METRICS_PORT": str(metrics_port),
            "TRIMTAB_PORT": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 69
    assert "TRIMTAB_METRICS_PORT" in done.stderr
