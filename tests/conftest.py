"""What tests stand on: servers once per run, one migrated database per module, clean Redis.

`DATABASE_URL` (an owner's) and `REDIS_URL`, if set, replace the embedded servers.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from core.db import Database
from migrations import commands
from migrations.roles import API_ROLE, WORKER_ROLE
from tests.factories import Tenant, make_tenant
from tests.tiny_model import make_tiny_model
from trimtab.embedded import EmbeddedServers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads

BUDGET_MINUTES = {
    "unit": 1,
    "mutation": 2,
    "differential": 0.5,
    "integration": 5,
    "contract": 3,
    "faults": 5,
    "chaos": 2,
    "e2e": 4,
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each kind of test took of its budget."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                _, _, rest = report.nodeid.partition("tests/")
                kind = rest.split("/")[0] if "/" in rest else "(top)"
                seconds[kind] = seconds.get(kind, 0.0) + report.duration
    for kind, spent in sorted(seconds.items()):
        budget = BUDGET_MINUTES.get(kind)
        allowed = f" of {60 * budget} s" if budget else ""
        terminalreporter.write_line(f"{kind}: {spent:.1f} s{allowed}")


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Postgres and Redis of this run."""

    owner_url: str
    redis_url: str
    redis_admin_url: str
    api_password: str
    worker_password: str


def at_database(url: str, name: str) -> str:
    """The same server and role, another database."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def as_role(url: str, role: str, password: str) -> str:
    """The same database, another role."""
    changed = make_url(url).set(username=role, password=password)
    return changed.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    given = os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL")
    if all(given):
        yield Servers(
            owner_url=given[0] or "",
            redis_url=given[1] or "",
            redis_admin_url=given[1] or "",
            api_password=secrets.token_urlsafe(24),
            worker_password=secrets.token_urlsafe(24),
        )
        return
    embedded = EmbeddedServers(tmp_path_factory.mktemp("servers") / "home", fsync=False)
    try:
        with embedded:
            points = embedded.endpoints
            yield Servers(
                owner_url=given[0] or points.owner_url,
                redis_url=given[1] or points.redis_url,
                redis_admin_url=given[1] or points.redis_admin_url,
                api_password=points.api_password,
                worker_password=points.worker_password,
            )
    finally:
        embedded.home.remove()


@contextmanager
def new_database(owner_url: str, *, template: str = "template0") -> Iterator[str]:
    """The owner's address of a fresh database, dropped at the end."""
    name = f"test_{secrets.token_hex(8)}"
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    try:
        yield at_database(owner_url, name)
    finally:
        with psycopg.connect(owner_url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
            )


@pytest.fixture(scope="session")
def migrated_template(servers: Servers) -> Iterator[str]:
    """Name of a database with all migrations, to copy from."""
    with new_database(servers.owner_url) as url:
        commands.upgrade(
            url,
            api_password=SecretStr(servers.api_password),
            worker_password=SecretStr(servers.worker_password),
        )
        yield make_url(url).database or ""


@pytest.fixture(scope="module")
def owner_url(servers: Servers, migrated_template: str) -> Iterator[str]:
    """This module's own database, as its owner."""
    with new_database(servers.owner_url, template=migrated_template) as url:
        yield url


@pytest.fixture(scope="module")
def api_url(servers: Servers, owner_url: str) -> str:
    """This module's own database, as the api."""
    return as_role(owner_url, API_ROLE, servers.api_password)


@pytest.fixture(scope="module")
def worker_url(servers: Servers, owner_url: str) -> str:
    """This module's own database, as the worker."""
    return as_role(owner_url, WORKER_ROLE, servers.worker_password)


@contextmanager
def opened(url: str) -> Iterator[Database]:
    database = Database(url, pool_size=8)
    try:
        yield database
    finally:
        database.dispose()


@pytest.fixture(scope="module")
def owner_database(owner_url: str) -> Iterator[Database]:
    with opened(owner_url) as database:
        yield database


@pytest.fixture(scope="module")
def database(api_url: str) -> Iterator[Database]:
    with opened(api_url) as database:
        yield database


@pytest.fixture(scope="module")
def worker_database(worker_url: str) -> Iterator[Database]:
    with opened(worker_url) as database:
        yield database


@pytest.fixture
def tenant(owner_database: Database) -> Tenant:
    """A tenant of its own, with a key that may do everything."""
    return make_tenant(owner_database)


@pytest.fixture
def redis_url(servers: Servers) -> str:
    """An empty Redis, as the service's user."""
    with redis.Redis.from_url(servers.redis_admin_url) as admin:
        admin.flushdb()
    return servers.redis_url


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that trains in seconds."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
