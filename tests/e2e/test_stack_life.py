"""What outlives the stack, and what must not."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.running_stack import (
    JOB_SECONDS,
    RunningStack,
    removed_afterwards,
    uppercase_job,
    write_prompts,
)
from tests.fakes.waiting import wait_until
from tests.tiny_model import TINY_MODEL_ID
from trimtab.client import Client
from trimtab.state import StateHome

GONE_SECONDS = 20


@pytest.fixture
def own_home(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "home") as home:
        yield home


def start_long_job(client: Client, prompts: Path, *, until_step: int = 3) -> str:
    """A job that trains now and has a checkpoint."""
    spec = uppercase_job(TINY_MODEL_ID, max_steps=100_000)
    job_id: str = client.create_job({**spec, "training_file": client.upload(prompts)["id"]})["id"]
    wait_until(lambda: client.job(job_id)["progress"]["step"] >= until_step, seconds=JOB_SECONDS)
    return job_id


def listening_ports(family: list[psutil.Process]) -> set[int]:
    found = set()
    for process in family:
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.port)
    return found


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_lock_or_server_survives(
    number: signal.Signals, own_home: Path, tiny_models: Path, prompts: Path
) -> None:
    with RunningStack(own_home, tiny_models) as stack, stack.client() as client:
        job_id = start_long_job(client, prompts)
        family = stack.family()
        ports = listening_ports(family)
        names = {" ".join(process.cmdline()) for process in family}

        code = stack.end(number)

    assert any("ppo_engine" in name for name in names), "a trainer was running"
    assert len(ports) >= 3, "API, Postgres and Valkey were listening"
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    wait_until(lambda: all(map(is_gone, family)), seconds=GONE_SECONDS)
    assert not any(map(accepts, ports))
    assert not StateHome(own_home).is_held()
    with RunningStack(own_home, tiny_models) as stack, stack.client() as client:
        wait_until(lambda: client.job(job_id)["attempt"] >= 2, seconds=JOB_SECONDS)
        wait_until(lambda: client.job(job_id)["phase"] == "training", seconds=JOB_SECONDS)
        resumed_from = client.job(job_id)["resumed_from_step"]
        client.cancel(job_id)
        wait_until(lambda: client.job(job_id)["status"] == "cancelled", seconds=JOB_SECONDS)

    assert resumed_from >= 2, "the last checkpoint was taken up"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_stack_ends_with_an_explanation_when_its_servers_do(
    number: signal.Signals, own_home: Path, tiny_models: Path
) -> None:
    with RunningStack(own_home, tiny_models) as stack:
        family = stack.family()
        guard = next(one for one in family if "trimtab.guard" in one.cmdline())

        guard.send_signal(number)

        assert stack.wait() == 1
    assert "their guard is gone" in (own_home / "up.log").read_text()
    wait_until(lambda: all(map(is_gone, family)), seconds=GONE_SECONDS)


def test_history_survives_a_restart_of_every_process(
    own_home: Path, tiny_models: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 8)
    with RunningStack(own_home, tiny_models) as stack, stack.client() as client:
        spec = uppercase_job(TINY_MODEL_ID)
        job_id = client.create_job({**spec, "training_file": client.upload(prompts)["id"]})["id"]
        items = list(client.stream(job_id))
        before = (client.job(job_id), client.metrics(job_id), client.events(job_id))

    with RunningStack(own_home, tiny_models) as stack, stack.client() as client:
        after = (client.job(job_id), client.metrics(job_id), client.events(job_id))
        numbered = [item for item in items if item["id"]]
        again = [item for item in client.stream(job_id) if item["id"]]
        client.download(job_id, tmp_path / "out")

    assert before[0]["status"] == "succeeded", before[0]["error"]
    assert after == before
    assert again == numbered
