"""The processes: `python -m api` and `python -m api.keys`."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from core import keys
from core.db import Database
from tests.conftest import Servers, as_role, new_database
from tests.factories import Tenant
from tests.live_api import wait_until

ROOT = Path(__file__).parents[2]


def environment(**settings: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | settings


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment(**settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def serving(
    api_url: str, redis_url: str, home: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A running `python -m api` and its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "api"],
        env=environment(
            DATABASE_URL=api_url,
            REDIS_URL=redis_url,
            TRIMTAB_HOME=str(home),
            TRIMTAB_PORT=str(port),
        ),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    origin = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(origin))
        assert process.poll() is None, "the process ended"
        yield process, origin
    finally:
        process.kill()
        process.wait()


def answers(origin: str) -> bool:
    try:
        return httpx2.get(f"{origin}/v1/readyz").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(
    servers: Servers, api_url: str, tenant: Tenant, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    with serving(api_url, servers.redis_url, tmp_path) as (process, origin):
        headers = tenant.headers
        with httpx2.Client(base_url=origin, headers=headers, timeout=20) as client:
            assert client.get("/v1/models").json()["data"] == []

            process.send_signal(number)

            assert process.wait(15) in (0, -number, 128 + number)


def test_missing_settings_are_named() -> None:
    done = run("api")

    assert done.returncode == 64
    assert "DATABASE_URL" in done.stderr
    assert "REDIS_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_schema_is_told_with_its_remedy(servers: Servers) -> None:
    with new_database(servers.owner_url) as empty:
        url = as_role(empty, "trimtab_api", servers.api_password)
        done = run("api", DATABASE_URL=url, REDIS_URL=servers.redis_url)

    assert done.returncode == 69
    assert "python -m migrations" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_absent_database_is_told(servers: Servers) -> None:
    url = "postgresql://trimtab_api:hidden@127.0.0.1:1/nothing"

    done = run("api", DATABASE_URL=url, REDIS_URL=servers.redis_url)

    assert done.returncode == 69
    assert "DATABASE_URL" in done.stderr
    assert "hidden" not in done.stderr


def test_a_key_is_made_listed_and_revoked(owner_url: str, database: Database) -> None:
    made = run("api.keys", "create", "--tenant", "acme", "--name", "ci", DATABASE_URL=owner_url)
    secret = made.stdout.strip()
    with database.begin() as tx:
        caller = keys.authenticate(tx, secret)

    listed = run("api.keys", "list", "--tenant", "acme", DATABASE_URL=owner_url).stdout
    public_id = listed.split("\t")[0]
    revoked = run("api.keys", "revoke", public_id, DATABASE_URL=owner_url)

    assert made.stdout == f"{secret}\n"
    assert caller.tenant_slug == "acme"
    assert secret not in listed
    assert "active" in listed
    assert "revoked" in revoked.stdout


def test_a_key_with_one_right(owner_url: str, database: Database) -> None:
    made = run(
        *("api.keys", "create", "--name", "reader", "--scope", "jobs:read"), DATABASE_URL=owner_url
    )

    with database.begin() as tx:
        caller = keys.authenticate(tx, made.stdout.strip())
    assert (caller.tenant_slug, caller.scopes) == ("local", {"jobs:read"})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("revoke", "nonsense"), "no key"),
        (("create", "--tenant", "Not A Slug", "--name", "x"), "tenant"),
    ],
)
def test_a_refused_command_says_why(
    owner_url: str, arguments: tuple[str, ...], complaint: str
) -> None:
    done = run("api.keys", *arguments, DATABASE_URL=owner_url)

    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stdout == ""


def test_the_apis_role_makes_no_keys(api_url: str) -> None:
    done = run("api.keys", "create", "--name", "x", DATABASE_URL=api_url)

    assert done.returncode == 1
    assert "owner" in done.stderr
    assert "Traceback" not in done.stderr
