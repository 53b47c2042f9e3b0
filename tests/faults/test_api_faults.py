"""A job that the API took is done, whatever happens to the API or to Redis after its answer."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from core.ids import job_id_of
from core.states import JobStatus
from migrations.roles import API_ROLE
from tests.conftest import as_role
from tests.fakes.bench import Bench, bench_on
from tests.fakes.waiting import wait_until
from tests.live_api import create_job
from trimtab.embedded import EmbeddedServers
from trimtab.stack import free_port


@pytest.fixture
def bench(tmp_path: Path, own_servers: EmbeddedServers) -> Iterator[Bench]:
    with bench_on(own_servers, tmp_path / "home") as opened:
        yield opened


@contextmanager
def serving(
    bench: Bench, servers: EmbeddedServers
) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Client]]:
    """A real API process of this bench, and a client of its tenant."""
    port, points = free_port(), servers.endpoints
    with (bench.home / "api.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"],
            env={
                **bench.environment(),
                "DATABASE_URL": as_role(points.owner_url, API_ROLE, points.api_password),
                "TRIMTAB_PORT": str(port),
            },
            stdout=log,
            stderr=log,
        )
    bench.processes.append(process)
    url = f"http://127.0.0.1:{port}"
    with httpx2.Client(base_url=url, headers=bench.tenant.headers, timeout=30) as client:
        wait_until(lambda: answers(client))
        yield process, client


def answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/v1/healthz").status_code == 200
    except httpx2.TransportError:
        return False


def test_an_api_killed_after_its_answer_with_nobody_listening_loses_no_job(
    bench: Bench, own_servers: EmbeddedServers
) -> None:
    """The notice of the commit reaches no dispatcher; the first look of one finds the job."""
    with serving(bench, own_servers) as (api, client):
        job = create_job(client, max_steps=2, batch_size=8)
        os.kill(api.pid, signal.SIGKILL)
        api.wait()

    bench.start_dispatcher()
    bench.start_worker()

    bench.wait_for_status(job_id_of(job["id"]), JobStatus.SUCCEEDED)


def test_a_post_is_answered_without_redis_and_its_job_runs_once_redis_is_back(
    bench: Bench, own_servers: EmbeddedServers
) -> None:
    bench.start_dispatcher()
    bench.start_worker()
    valkey = psutil.Process(own_servers.endpoints.valkey_pid)
    with serving(bench, own_servers) as (_, client):
        valkey.suspend()
        try:
            job = create_job(client, max_steps=2, batch_size=8)
            ready = client.get("/v1/readyz")
        finally:
            valkey.resume()

    assert (ready.status_code, ready.json()["redis"]) == (200, "unavailable")
    bench.wait_for_status(job_id_of(job["id"]), JobStatus.SUCCEEDED, seconds=60)
