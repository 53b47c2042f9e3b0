"""What the doctor finds in real servers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import func, update

from core import models
from core.db import Database
from core.dispatch import presence_key
from tests.conftest import Servers, as_role, new_database
from tests.factories import Tenant, claim_job, make_job

ROOT = Path(__file__).parents[2]


def findings(database_url: str, redis_url: str) -> dict[str, Any]:
    """Each check by its name."""
    done = subprocess.run(
        [sys.executable, "-m", "api.doctor"],
        env={"DATABASE_URL": database_url, "REDIS_URL": redis_url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return {one["check"]: one for one in map(json.loads, done.stdout.splitlines())}


def test_good_servers_are_good(api_url: str, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(presence_key("cpu", "one"), "1")

    found = findings(api_url, redis_url)

    assert {name: one["verdict"] for name, one in found.items()} == {
        "postgres": "good",
        "clock": "good",
        "schema": "good",
        "jobs": "good",
        "redis": "good",
        "workers": "good",
    }


def test_a_job_out_of_contact_and_no_worker_are_doubtful(
    api_url: str,
    redis_url: str,
    worker_database: Database,
    owner_database: Database,
    tenant: Tenant,
) -> None:
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)
    with worker_database.begin() as tx:
        claim_job(tx, job)
    with owner_database.begin() as tx:
        tx.execute(
            update(models.job).values(lease_until=func.now() - func.make_interval(0, 0, 0, 1))
        )

    found = findings(api_url, redis_url)

    assert found["jobs"]["verdict"] == found["workers"]["verdict"] == "doubtful"
    assert "dispatcher" in found["jobs"]["remedy"]
    assert "trimtab worker" in found["workers"]["remedy"]


def test_an_empty_database_is_told_with_its_remedy(servers: Servers, redis_url: str) -> None:
    with new_database(servers.owner_url) as empty:
        found = findings(as_role(empty, "trimtab_api", servers.api_password), redis_url)

    assert found["schema"]["verdict"] == "bad"
    assert "trimtab migrate" in found["schema"]["remedy"]


def test_a_redis_that_evicts_is_bad(servers: Servers, api_url: str) -> None:
    with redis.Redis.from_url(servers.redis_admin_url) as admin:
        admin.config_set("maxmemory-policy", "allkeys-lru")
        try:
            found = findings(api_url, servers.redis_url)
        finally:
            admin.config_set("maxmemory-policy", "noeviction")

    assert found["redis"]["verdict"] == "bad"
    assert "noeviction" in found["redis"]["remedy"]


@pytest.mark.parametrize("address", ["postgresql://u:hidden@127.0.0.1:1/d"])
def test_no_password_is_shown(address: str) -> None:
    found = findings(address, "redis://:hidden@127.0.0.1:1/0")

    assert "hidden" not in json.dumps(found)
    assert {one["verdict"] for one in found.values()} == {"bad"}
