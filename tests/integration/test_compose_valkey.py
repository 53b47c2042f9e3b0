"""A real Valkey with the configuration that the compose file gives it."""

import subprocess
import time
from contextlib import closing

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.retry import Retry

from core.dispatch import feed_key
from tests.unit.deploy import deployment
from trimtab.binaries import VALKEY, program
from trimtab.servers import VALKEY_USER, free_port

PASSWORD = "7" * 64
DEADLINE_SECONDS = 20


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a Valkey that runs while the tests of this module do."""
    folder = tmp_path_factory.mktemp("valkey")
    configs = deployment.interpolated(
        deployment.compose()["configs"], {"VALKEY_PASSWORD": PASSWORD}
    )
    content = configs["valkey"]["content"].replace("dir /data", f'dir "{folder}"')
    file = folder / "valkey.conf"
    file.write_text(content, encoding="utf-8")
    chosen = free_port()
    server = program(VALKEY, "valkey-server", root=VALKEY.root())
    command = [str(server), str(file), "--port", str(chosen), "--logfile", str(folder / "log")]
    with subprocess.Popen(command) as process:
        try:
            _wait_until_ready(chosen)
            yield chosen
        finally:
            process.terminate()


@pytest.fixture
def client(port):
    with closing(_client(port)) as connected:
        yield connected


def test_what_the_service_needs_is_allowed(client):
    client.xadd(feed_key("one"), {"item": "{}"})
    client.lpush("cpu", "message")

    assert client.xlen(feed_key("one")) == 1
    assert client.brpop(["cpu"], timeout=1) == (b"cpu", b"message")
    assert client.info("persistence")["aof_enabled"] == 1
    assert client.info("memory")["maxmemory_policy"] == "noeviction"


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "CONFIG GET *",
        "KEYS *",
        "SHUTDOWN NOSAVE",
        "ACL LIST",
        "MODULE LIST",
        "REPLICAOF NO ONE",
    ],
)
def test_what_endangers_the_server_is_refused(client, command):
    with pytest.raises(NoPermissionError):
        client.execute_command(*command.split())


def test_nobody_is_served_without_a_password(port):
    with (
        closing(_client(port, username=None, password=None)) as nobody,
        pytest.raises(AuthenticationError, match="authenticated"),
    ):
        nobody.ping()


def test_nobody_is_served_with_another_password(port):
    with (
        closing(_client(port, password="8" * 64)) as nobody,
        pytest.raises(AuthenticationError, match="invalid username-password"),
    ):
        nobody.ping()


def _client(port: int, **login: str | None) -> redis.Redis:
    known = {"username": VALKEY_USER, "password": PASSWORD}
    return redis.Redis(port=port, retry=Retry(NoBackoff(), 0), **{**known, **login})


def _wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            with closing(_client(port)) as client:
                client.ping()
        except redis.ConnectionError:
            assert time.monotonic() < deadline, "Valkey does not answer"
        else:
            return
