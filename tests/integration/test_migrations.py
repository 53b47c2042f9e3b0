import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import errors
from pydantic import SecretStr
from sqlalchemy import create_engine, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from core import models
from core.db import Database, driver_url
from core.rows import Job
from core.states import FINAL, TRANSITIONS, JobStatus
from migrations import commands
from migrations.head import HEAD
from migrations.roles import API_ROLE
from tests.conftest import Servers, as_role, new_database
from tests.factories import Tenant, make_job

VERSIONS = Path(commands.__file__).parent / "versions"
BEGINNINGS = {JobStatus.VALIDATING_FILES, JobStatus.QUEUED}


@pytest.fixture
def empty_url(servers: Servers) -> Iterator[str]:
    with new_database(servers.owner_url) as url:
        yield url


def tables(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "select table_name from information_schema.tables where table_schema = 'public'"
        ).fetchall()
    return {name for (name,) in rows}


def functions(url: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "select proname from pg_proc where pronamespace = 'public'::regnamespace"
        ).fetchall()


def test_up_down_and_up_again(empty_url: str) -> None:
    expected = set(models.metadata.tables) | {"alembic_version"}

    assert commands.upgrade(empty_url) == HEAD
    assert tables(empty_url) == expected
    assert commands.downgrade(empty_url, revision="base") is None
    assert tables(empty_url) == {"alembic_version"}
    assert functions(empty_url) == []
    assert commands.upgrade(empty_url) == HEAD
    assert tables(empty_url) == expected


def test_applying_all_of_them_twice_changes_nothing(empty_url: str) -> None:
    assert commands.upgrade(empty_url) == commands.upgrade(empty_url) == HEAD


def test_tables_are_what_the_code_thinks_they_are(owner_url: str) -> None:
    engine = create_engine(driver_url(owner_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        differences = compare_metadata(context, models.metadata)
    engine.dispose()

    assert differences == []


def test_checks_are_what_the_code_thinks_they_are(owner_url: str, servers: Servers) -> None:
    """Alembic does not compare checks: let Postgres print them for both."""

    def checks(url: str) -> set[tuple[str, str]]:
        with psycopg.connect(url) as connection:
            rows = connection.execute(
                "select conname, pg_get_constraintdef(oid) from pg_constraint where contype = 'c'"
                " and connamespace = 'public'::regnamespace"
            ).fetchall()
        return set(rows)

    with new_database(servers.owner_url) as plain_url:
        engine = create_engine(driver_url(plain_url))
        models.metadata.create_all(engine)
        engine.dispose()
        expected = checks(plain_url)

    assert checks(owner_url) == expected
    assert "ck_job_lease" in {name for name, _ in expected}


@pytest.mark.parametrize("path", sorted(VERSIONS.glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_every_migration_locks_briefly_and_imports_nothing_of_ours(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    first_calls = re.findall(r'def (?:up|down)grade.*?""".*?"""\s+(.*?)\n', source, re.DOTALL)

    assert first_calls == ["op.execute(\"set local lock_timeout = '5s'\")"] * 2
    assert not re.search(r"^\s*(?:from|import) (?:api|core|worker|trimtab)", source, re.MULTILINE)


# The rule of the states.


COLUMNS: dict[JobStatus, dict[str, str]] = {
    JobStatus.RUNNING: {"lease_until": "now()"},
    **{status: {"finished_at": "now()"} for status in FINAL},
}


def put(connection: psycopg.Connection, status: JobStatus, old: JobStatus, job: Job) -> None:
    """Change the status as a careless statement would, with the columns the checks want."""
    wanted = {"lease_until": "null", "finished_at": "null"} | COLUMNS.get(status, {})
    changes = ", ".join(f"{name} = {value}" for name, value in wanted.items())
    connection.execute(
        f"update job set status = '{status}', {changes} where id = %s and status = %s",  # noqa: S608
        [job.id, old],
    )


@pytest.mark.parametrize(
    ("old", "new"), [pair for pair in product(JobStatus, JobStatus) if pair[0] != pair[1]]
)
def test_the_trigger_allows_just_what_the_states_say(
    owner_url: str, owner_database: Database, tenant: Tenant, old: JobStatus, new: JobStatus
) -> None:
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)
    with psycopg.connect(owner_url) as connection:
        connection.execute("alter table job disable trigger job_changes")
        put(connection, old, JobStatus.QUEUED, job)
        connection.execute("alter table job enable trigger job_changes")

        if new in TRANSITIONS[old]:
            put(connection, new, old, job)
        else:
            with pytest.raises(errors.CheckViolation, match=f"from {old} to {new}"):
                put(connection, new, old, job)
        connection.rollback()


@pytest.mark.parametrize("status", JobStatus)
def test_a_job_begins_only_where_it_may(
    owner_url: str, owner_database: Database, tenant: Tenant, status: JobStatus
) -> None:
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)
    copied = "tenant_id, created_by, spec, resolved, model, method, training_file_id, seed, queue"
    insert = (
        f"insert into job ({copied}, total_steps, status, lease_until, finished_at)"  # noqa: S608
        f" select {copied}, total_steps, %s, %s, %s from job where id = %s"
    )
    columns = COLUMNS.get(status, {})
    values = [status, *("now" if n in columns else None for n in ("lease_until", "finished_at"))]

    with psycopg.connect(owner_url) as connection:
        if status in BEGINNINGS:
            connection.execute(insert, [*values, job.id])
        else:
            with pytest.raises(errors.CheckViolation, match=f"begin as {status}"):
                connection.execute(insert, [*values, job.id])
        connection.rollback()


@pytest.mark.parametrize(
    "columns",
    [
        {"lease_until": models.job.c.created_at},
        {"stop_wanted": "pause"},
        {"stop_wanted": "stop"},
        {"finished_at": models.job.c.created_at},
        {"status": "running"},
        {"status": "cancelled"},
        {"status": "lost"},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(
    owner_database: Database, tenant: Tenant, columns: dict[str, object]
) -> None:
    with owner_database.begin() as tx:
        job = make_job(tx, tenant)

    with pytest.raises(IntegrityError), owner_database.begin() as tx:
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(**columns))


# What the roles must not do.


NOBODY_MAY = [
    "create table mine (a int)",
    "alter table job add column x int",
    "drop table job",
    "truncate job_event",
    "alter table job disable trigger job_changes",
    "create function f() returns int language sql as 'select 1'",
    "create role helper",
    "update job_event set message = 'never happened'",
    "delete from job_event",
    "delete from job",
    "update metric set step = 0",
    "delete from artifact",
    "update file set sha256 = ''",
    "update file set tenant_id = gen_random_uuid()",
    "insert into tenant (slug) values ('mine')",
    "update tenant set slug = 'mine'",
    "insert into api_key select * from api_key",
    "update api_key set scopes = '{admin}'",
    "update api_key set revoked_at = null",
    "update alembic_version set version_num = '0'",
    "select pg_read_file('/etc/passwd')",
    "copy job to program 'cat'",
]
API_MAY_NOT = [
    "update job set attempt = 9",
    "update job set lease_until = now()",
    "update job set spec = '{}'",
    "update job set tenant_id = gen_random_uuid()",
    "update job set fine_tuned_model = 'x'",
    "insert into metric select * from metric",
    "insert into artifact select * from artifact",
    "insert into attempt select * from attempt",
    "update checkpoint set resumable = true",
]
WORKER_MAY_NOT = [
    "select secret_sha256 from api_key",
    "select id from api_key",
    "select answer from idempotency",
    "insert into job select * from job",
    "insert into file select * from file",
    "update file set deleted_at = now()",
    "update job set spec = '{}'",
    "update job set tenant_id = gen_random_uuid()",
    "update job set created_by = gen_random_uuid()",
    "update checkpoint set manifest_sha256 = ''",
    "update attempt set worker_label = ''",
]


@pytest.mark.parametrize("statement", [*NOBODY_MAY, *API_MAY_NOT])
def test_the_api_role_must_not(api_url: str, statement: str) -> None:
    with psycopg.connect(api_url) as connection, pytest.raises(errors.InsufficientPrivilege):
        connection.execute(statement)


@pytest.mark.parametrize("statement", [*NOBODY_MAY, *WORKER_MAY_NOT])
def test_the_worker_role_must_not(worker_url: str, statement: str) -> None:
    with psycopg.connect(worker_url) as connection, pytest.raises(errors.InsufficientPrivilege):
        connection.execute(statement)


@pytest.mark.parametrize("role", ["api", "worker"])
def test_a_role_is_an_ordinary_one_that_owns_nothing(
    api_url: str, worker_url: str, role: str
) -> None:
    with psycopg.connect({"api": api_url, "worker": worker_url}[role]) as connection:
        powers = connection.execute(
            "select rolsuper, rolbypassrls, rolcreatedb, rolcreaterole, rolreplication"
            " from pg_roles where rolname = current_user"
        ).fetchone()
        owned = connection.execute(
            "select count(*) from pg_class where relowner = current_user::regrole"
        ).fetchone()

    assert powers == (False,) * 5
    assert owned == (0,)


def test_a_wrong_password_opens_nothing(owner_url: str) -> None:
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(as_role(owner_url, API_ROLE, "wrong")).close()


# The command.


def run_migrations(url: str | None, *arguments: str, **extra: str) -> tuple[int, str]:
    environment = {"PATH": os.environ["PATH"], **extra}
    if url is not None:
        environment["DATABASE_URL"] = url
    done = subprocess.run(
        [sys.executable, "-m", "migrations", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=VERSIONS.parent.parent,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_the_command_migrates_and_lets_the_api_in(
    servers: Servers, empty_url: str, tmp_path: Path
) -> None:
    password_file = tmp_path / "password"
    password_file.write_text(servers.worker_password + "\n")
    secrets = {
        "TRIMTAB_API_PASSWORD": servers.api_password,
        "TRIMTAB_WORKER_PASSWORD_FILE": str(password_file),
    }

    up, said = run_migrations(empty_url, **secrets)
    with psycopg.connect(as_role(empty_url, API_ROLE, servers.api_password)) as connection:
        seen = connection.execute("select count(*) from job").fetchone()
    down, _ = run_migrations(empty_url, "downgrade", "base")

    assert (up, down, seen) == (0, 0, (0,))
    assert f'"revision": "{HEAD}"' in said
    for secret in (*secrets.values(), make_url(empty_url).password or ""):
        assert secret not in said.replace(str(password_file), "")


def test_the_command_says_what_is_missing() -> None:
    code, said = run_migrations(None)

    assert code == 64
    assert "DATABASE_URL" in said
    assert "Traceback" not in said


def test_the_command_says_that_nobody_answers() -> None:
    code, said = run_migrations("postgresql://owner:hidden@127.0.0.1:1/none")

    assert code == 69
    assert "refused" in said
    assert "hidden" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("downgrade", "nonsense"), "nonsense"), (("upgrade", "9999"), "9999")],
)
def test_the_command_says_that_a_revision_is_unknown(
    empty_url: str, arguments: tuple[str, ...], reason: str
) -> None:
    code, said = run_migrations(empty_url, *arguments)

    assert code == 69
    assert reason in said
    assert "Traceback" not in said


def test_the_command_says_that_it_is_not_the_owner(api_url: str) -> None:
    code, said = run_migrations(api_url, TRIMTAB_API_PASSWORD="another")

    assert code == 69
    assert "permission denied" in said
    assert "Traceback" not in said


def test_a_password_reaches_the_server_only_as_a_verifier(empty_url: str, servers: Servers) -> None:
    commands.upgrade(empty_url, api_password=SecretStr(servers.api_password))

    with psycopg.connect(empty_url) as connection:
        (stored,) = connection.execute(
            "select rolpassword from pg_authid where rolname = %s", [API_ROLE]
        ).fetchone() or ("",)
    assert stored.startswith("SCRAM-SHA-256$")
    assert servers.api_password not in stored
