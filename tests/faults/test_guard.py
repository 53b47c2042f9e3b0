"""The kill matrix of the embedded servers, for root and for an ordinary user.

Whoever dies, and however: nothing survives its owner, and nothing that was stored is lost.
"""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.faults.guard_owner import (
    Owner,
    Person,
    ordinary_user,
    owner_of,
    root,
    try_to_own,
    wait_until,
)
from trimtab.servers import HOST, is_free, postgres_answers

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


@pytest.fixture
def home(person: Person) -> Iterator[Path]:
    with person.home() as path:
        yield path


def store(owner: Owner, text: str) -> None:
    """Put `text` into both servers."""
    with psycopg.connect(owner.endpoints.owner_url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (text text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [text])
    with redis.Redis.from_url(owner.endpoints.redis_url) as client:
        client.set("kept", text)


def stored(owner: Owner) -> set[str]:
    """What both servers hold."""
    with psycopg.connect(owner.endpoints.owner_url) as connection:
        rows = connection.execute("SELECT text FROM kept").fetchall()
    with redis.Redis.from_url(owner.endpoints.redis_url, decode_responses=True) as client:
        return {*(row[0] for row in rows), str(client.get("kept"))}


def answer(owner: Owner) -> bool:
    """Whether both servers let us in."""
    with contextlib.suppress(psycopg.OperationalError, redis.exceptions.ConnectionError):
        with redis.Redis.from_url(owner.endpoints.redis_url) as client:
            client.ping()
        psycopg.connect(owner.endpoints.owner_url).close()
        return True
    return False


def stopped_in_order(owner: Owner) -> bool:
    """Whether both servers ended by their own shutdown, the last time they ran."""
    postgres = (owner.home.logs / "postgres.log").read_text().strip().splitlines()[-1]
    valkey = (owner.home.logs / "valkey.log").read_text().strip().splitlines()[-1]
    return "database system is shut down" in postgres and "bye bye" in valkey


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_a_signal_that_ends_the_owner(
    person: Person, home: Path, number: signal.Signals
) -> None:
    with owner_of(person, home) as owner:
        owner.kill(owner.process.pid, number)

        owner.wait_until_all_is_gone()
        assert stopped_in_order(owner)


def test_ctrl_c_reaches_the_owner_alone_and_stops_everything(person: Person, home: Path) -> None:
    with owner_of(person, home) as owner:
        owner.family = owner.processes()

        os.killpg(owner.process.pid, signal.SIGINT)

        assert owner.process.wait(30) == 130
        owner.wait_until_all_is_gone()
        assert stopped_in_order(owner)
        assert "died" not in (owner.home.logs / "guard.log").read_text()


def test_sigterm_to_the_guard_stops_the_servers(person: Person, home: Path) -> None:
    with owner_of(person, home) as owner:
        owner.kill(owner.endpoints.guard_pid, signal.SIGTERM)

        owner.wait_until_all_is_gone()
        assert stopped_in_order(owner)


def test_the_servers_die_with_a_killed_guard_and_the_next_start_finds_their_data(
    person: Person,
    home: Path,
) -> None:
    with owner_of(person, home) as owner:
        store(owner, "before the kill")

        owner.kill(owner.endpoints.guard_pid)

        owner.wait_until_all_is_gone()
    with owner_of(person, home) as owner:
        assert stored(owner) == {"before the kill"}


def test_nothing_survives_when_owner_and_guard_are_killed_at_once(
    person: Person, home: Path
) -> None:
    with owner_of(person, home) as owner:
        owner.family = owner.processes()

        os.kill(owner.process.pid, signal.SIGKILL)
        os.kill(owner.endpoints.guard_pid, signal.SIGKILL)

        owner.wait_until_all_is_gone()


def test_kill_9_of_the_whole_process_group_leaves_the_guard_to_tidy_up(
    person: Person, home: Path
) -> None:
    with owner_of(person, home) as owner:
        owner.family = owner.processes()

        os.killpg(owner.process.pid, signal.SIGKILL)

        owner.wait_until_all_is_gone()
        assert stopped_in_order(owner)


@pytest.mark.parametrize("server", ["postgres_pid", "valkey_pid"])
def test_a_killed_server_comes_back_at_its_address_with_its_data(
    person: Person, home: Path, server: str
) -> None:
    with owner_of(person, home) as owner:
        store(owner, "before the kill")
        killed = getattr(owner.endpoints, server)

        owner.kill(killed)

        wait_until(lambda: getattr(owner.home.running(), server) not in (None, killed), "restart")
        wait_until(lambda: answer(owner), "both servers answer")
        assert stored(owner) == {"before the kill"}


def test_both_servers_come_back_again_and_again(person: Person, home: Path) -> None:
    with owner_of(person, home) as owner:
        for _ in range(3):
            killed = pids(owner)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

            wait_until(partial(replaced, owner, killed), "both restart")
            wait_until(lambda: answer(owner), "both servers answer")


def pids(owner: Owner) -> set[int]:
    """The running servers' process ids."""
    running = owner.home.running()
    return {pid for pid in (running.postgres_pid, running.valkey_pid) if pid}


def replaced(owner: Owner, killed: set[int]) -> bool:
    """Whether both servers run as other processes than before."""
    return len(pids(owner) - killed) == 2


def test_data_and_addresses_persist_between_runs(person: Person, home: Path) -> None:
    with owner_of(person, home, fsync=True) as owner:
        first = owner.endpoints
        store(owner, "of the first run")
        assert owner.close() == 0
        owner.wait_until_all_is_gone()

    with owner_of(person, home, fsync=True) as owner:
        assert stored(owner) == {"of the first run"}
        assert owner.endpoints.owner_url == first.owner_url
        assert owner.endpoints.redis_url == first.redis_url


def test_a_stored_port_that_somebody_took_is_replaced(person: Person, home: Path) -> None:
    with owner_of(person, home) as owner:
        store(owner, "on the old port")
        port = owner.home.running().postgres_port
        owner.close()

    with socket.create_server((HOST, port or 0)), owner_of(person, home) as owner:
        assert owner.home.running().postgres_port != port
        assert stored(owner) == {"on the old port"}


def test_a_second_start_attaches_and_leaves_the_servers_running(person: Person, home: Path) -> None:
    with owner_of(person, home) as first:
        with owner_of(person, home) as second:
            assert second.endpoints == first.endpoints
            assert (first.is_owner, second.is_owner) == (True, False)
            store(second, "through the second")

            assert second.close() == 0

        assert stored(first) == {"through the second"}


def test_two_starts_at_the_same_moment_share_one_pair_of_servers(
    person: Person, home: Path
) -> None:
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            owners = list(pool.map(lambda _: try_to_own(person, home), range(2)))
        up = [owner for owner in owners if isinstance(owner, Owner)]
        for owner in up:
            stack.callback(owner.end)

        assert len(up) == 2, owners
        assert up[0].endpoints == up[1].endpoints
        assert sorted(owner.is_owner for owner in up) == [False, True]


def test_left_over_servers_are_stopped_first(person: Person, home: Path) -> None:
    with owner_of(person, home) as owner:
        store(owner, "before the left-over")
        postgres = psutil.Process(owner.endpoints.postgres_pid)
        valkey = psutil.Process(owner.endpoints.valkey_pid)
        postgres_command, uid = postgres.cmdline(), postgres.uids().real
        valkey_command = [valkey.exe(), "--dir", valkey.cwd(), "--appendonly", "yes",
                          "--proc-title-template", " ".join(valkey.cmdline()),
                          "--port", str(owner.home.running().valkey_port)]  # fmt: skip
        ports = owner.home.running()
        owner.close()
    left_over = [start_unguarded(command, uid) for command in (postgres_command, valkey_command)]
    wait_until(lambda: postgres_answers(ports.postgres_port or 0), "Postgres runs")
    wait_until(lambda: not is_free(ports.valkey_port or 0), "Valkey runs")

    with owner_of(person, home) as owner:
        assert [process.wait(0) for process in left_over] == [0, 0]
        assert owner.home.running().postgres_port == ports.postgres_port
        assert owner.home.running().valkey_port == ports.valkey_port
        assert stored(owner) == {"before the left-over"}


def test_a_lock_file_whose_server_is_gone_is_no_obstacle(person: Person, home: Path) -> None:
    """Its number may belong to another process by now, or to a zombie that nobody waits for."""
    with owner_of(person, home) as owner:
        store(owner, "before the end")
        postgres = psutil.Process(owner.endpoints.postgres_pid)
        command, uid = postgres.cmdline(), postgres.uids().real
        lock_file = Path(command[command.index("-D") + 1]) / "postmaster.pid"
        _, rest = lock_file.read_text().split("\n", maxsplit=1)
        owner.close()
    somebody = start_unguarded(["sleep", "600"], uid)
    lock_file.write_text(f"{somebody.pid}\n{rest}")
    os.chown(lock_file, uid, -1)

    try:
        with owner_of(person, home) as owner:
            assert stored(owner) == {"before the end"}
        assert somebody.poll() is None
    finally:
        somebody.kill()
        somebody.wait()


def start_unguarded(command: list[str], uid: int) -> "subprocess.Popen[bytes]":
    """A server as a killed guard would leave it on a system without death signals."""
    is_other = uid != os.geteuid()
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=uid if is_other else None,
        group=uid if is_other else None,
        extra_groups=[] if is_other else None,
    )


def test_a_home_that_others_may_write_to_is_refused(person: Person, home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    person.own(home)

    reason = try_to_own(person, home)

    assert "may be written to by others" in str(reason)
    assert list(home.iterdir()) == []


def test_a_database_without_its_passwords_is_refused_and_kept(person: Person, home: Path) -> None:
    with owner_of(person, home) as owner:
        cluster = owner.home.servers_directory() / "pg"
        owner.close()
    if person.uid == 0:
        pytest.skip("root's data are found through the secrets, so new ones mean new data")
    (home / "secrets.json").unlink()

    reason = try_to_own(person, home)

    assert "secrets.json" in str(reason)
    assert (cluster / "PG_VERSION").exists()
