"""Who may enter the embedded servers, and where their passwords never appear."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis

from tests.faults.guard_owner import Owner, Person, ordinary_user, owner_of, root
from trimtab.servers import HOST

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start as root")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(root, id="root", marks=needs_root),
        pytest.param(ordinary_user, id="user"),
    ],
)
def person(request: pytest.FixtureRequest) -> Iterator[Person]:
    with request.param() as started_by:
        yield started_by


@pytest.fixture(scope="module")
def owner(person: Person) -> Iterator[Owner]:
    """Servers as `trimtab up` starts them, with flushing to disk, shared by these tests."""
    with person.home() as home, owner_of(person, home, fsync=True) as started:
        yield started


@pytest.fixture
def application(owner: Owner) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(owner.endpoints.redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def admin(owner: Owner) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(owner.endpoints.redis_admin_url, decode_responses=True) as client:
        yield client


def say(port: int | None, request: bytes) -> bytes:
    """The first answer to bytes sent on a fresh connection."""
    with socket.create_connection((HOST, port or 0), timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(200)


def test_valkey_answers_nothing_without_a_password(owner: Owner) -> None:
    port = owner.home.running().valkey_port

    assert say(port, b"PING\r\n").startswith(b"-NOAUTH")
    assert say(port, b"AUTH default \r\n").startswith(b"-WRONGPASS")
    assert say(port, b"AUTH trimtab wrong\r\n").startswith(b"-WRONGPASS")


@pytest.mark.parametrize("password", [None, "wrong"])
def test_postgres_lets_nobody_in_without_the_password(owner: Owner, password: str | None) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(
            host=HOST,
            port=owner.home.running().postgres_port,
            user="trimtab_owner",
            dbname="trimtab",
            password=password,
            passfile="/nonexistent",
        )


REFUSED = """
    FLUSHALL; FLUSHDB; SWAPDB 0 1; KEYS *; SORT x; CONFIG GET *; CONFIG SET maxmemory 1;
    DEBUG SLEEP 0; MODULE LIST; MODULE LOAD /x; SHUTDOWN; SAVE; BGSAVE; BGREWRITEAOF;
    REPLICAOF NO ONE; ACL LIST; ACL SETUSER x on nopass; MONITOR; CLIENT LIST; CLIENT KILL ID 1;
    SLOWLOG GET; LATENCY DOCTOR; MIGRATE 127.0.0.1 1 x 0 1; RESTORE x 0 y; FUNCTION FLUSH;
    SCRIPT FLUSH; SCRIPT KILL
"""


@pytest.mark.parametrize("command", [line.strip() for line in REFUSED.split(";")])
def test_the_application_may_not(application: redis.Redis, command: str) -> None:
    run: Any = application.execute_command

    with pytest.raises(redis.exceptions.ResponseError, match=r"no permissions|not allowed"):
        run(*command.split())


def test_the_application_may_queue_stream_publish_and_script(
    application: redis.Redis,
) -> None:
    application.lpush("queue", "job")
    application.xadd("feed", {"item": "1"}, id="1-1", maxlen=10)
    counted = application.register_script("return redis.call('LLEN', KEYS[1])")

    assert application.llen("queue") == 1
    assert counted(keys=["queue"]) == 1
    assert application.brpop(["queue"], 1) == ("queue", "job")
    read: Any = application.xread({"feed": "0-0"})
    assert read[0][1] == [("1-1", {"item": "1"})]
    assert application.publish("doorbell", "x") == 0
    assert application.info("server")["valkey_version"].startswith("9.")


def test_valkey_keeps_what_it_was_told(admin: redis.Redis) -> None:
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}

    assert {name: admin.config_get(name)[name] for name in wanted} == wanted


def test_postgres_is_durable_utf8_and_asks_for_scram(owner: Owner) -> None:
    with psycopg.connect(owner.endpoints.owner_url) as connection:
        told = connection.execute(
            "SELECT current_setting('fsync'), current_setting('server_encoding'),"
            " current_setting('server_version_num')::int / 10000,"
            " (SELECT datlocale FROM pg_database WHERE datname = current_database()),"
            " (SELECT array_agg(DISTINCT auth_method) FROM pg_hba_file_rules),"
            " (SELECT left(rolpassword, 13) FROM pg_authid WHERE rolname = current_user)"
        ).fetchone()

    assert told == ("on", "UTF8", 18, "C.UTF-8", ["scram-sha-256"], "SCRAM-SHA-256")


def test_only_loopback_addresses_and_no_unix_socket(owner: Owner) -> None:
    for pid in (owner.endpoints.postgres_pid, owner.endpoints.valkey_pid):
        connections = psutil.Process(pid).net_connections("all")
        listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}

        assert listening == {HOST}
        assert [c for c in connections if c.family == socket.AF_UNIX and c.laddr] == []


def test_no_server_runs_as_root(owner: Owner, person: Person) -> None:
    servers = owner.processes()[1:]

    assert len(servers) > 3
    for process in servers:
        assert 0 not in process.uids()
        assert 0 not in process.gids()
        if person.uid != 0:
            assert set(process.uids()) == {person.uid}


def test_only_the_owner_can_read_the_state(owner: Owner, person: Person) -> None:
    home, data = owner.home.path, owner.home.servers_directory()

    assert (
        mode(home) == mode(owner.home.logs) == mode(data / "pg") == mode(data / "valkey") == 0o700
    )
    for file in (owner.home.secrets_file, owner.home.endpoints_file, owner.home.lock_file):
        assert mode(file) == 0o600
    for path in [*home.rglob("*"), *data.rglob("*")]:
        if path not in {data / "pg", data / "valkey"} and path.exists():
            assert mode(path) & 0o077 == 0, path
    if person.uid == 0:
        assert (mode(data), data.stat().st_uid) == (0o711, 0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_passwords_are_in_no_process_list_log_or_left_file(owner: Owner) -> None:
    passwords = [value for name, value in owner.home.secrets().items() if name != "state_id"]
    shown = ""
    for process in owner.processes():
        shown += " ".join(process.cmdline()) + str(process.environ())
    for log in owner.home.logs.iterdir():
        shown += log.read_text()
    shown += repr(owner.endpoints)

    assert len(passwords) == 5
    assert all(len(password) == 48 for password in passwords)
    assert [password for password in passwords if password in shown] == []
    data = owner.home.servers_directory()
    names = {path.name for path in data.iterdir()}
    assert not names & {"initdb-password", "pg.new"}


def test_failed_statements_leave_no_password_in_the_log(owner: Owner) -> None:
    with (
        psycopg.connect(owner.endpoints.owner_url) as connection,
        pytest.raises(psycopg.errors.UndefinedObject),
    ):
        connection.execute("ALTER ROLE nobody_at_all PASSWORD 'a-new-password'")

    log = (owner.home.logs / "postgres.log").read_text()
    assert "nobody_at_all" in log
    assert "a-new-password" not in log
