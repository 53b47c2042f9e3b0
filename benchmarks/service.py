"""Load figures of the service: submit and poll rates, stream delivery, memory, start-up.

    python benchmarks/service.py [--seconds 10] [--clients 1 500 2000] [--soak-minutes 60]

Starts a Postgres and a Valkey of its own and one API process on this machine; the load generator
runs on the same cores.  Latency of a stream is from before the worker's commit to the client's
socket.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from pydantic import SecretStr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from core import attempts, files, keys  # noqa: E402 - the packages of this repository
from core.attempts import Claim  # noqa: E402
from core.db import Database  # noqa: E402
from core.events import NewMetric, Report  # noqa: E402
from core.ids import job_id_of, public_file_id  # noqa: E402
from core.states import Phase  # noqa: E402
from core.storage import ArtifactStore  # noqa: E402
from migrations import commands  # noqa: E402
from trimtab.embedded import EmbeddedServers, Endpoints  # noqa: E402
from worker.stream import FeedStream  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONNECTIONS = 16
ROWS = 64
RESTING_PERCENT = 10
"""Of a core; less is no work on clients that come."""
GRACE_SECONDS = 30
"""How long the last metrics may take to come."""
TTL = timedelta(hours=6)
STREAMS = {1: (1, 10.0), 500: (50, 2.0), 2000: (200, 1.0)}
"""Clients: over how many jobs, and metrics per job and second."""
STARTS = 5


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Requests of one kind on a number of connections."""

    per_second: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What a number of stream clients got."""

    clients: int
    jobs: int
    per_job_and_second: float
    deliveries: int
    missing: int
    p50_ms: float
    p99_ms: float
    api_cpu_percent: float
    api_rss_mb: float


@dataclass(kw_only=True)
class Figures:
    """Everything measured."""

    cores: int = field(default_factory=lambda: os.cpu_count() or 0)
    api_start_seconds: float = 0.0
    help_seconds: float = 0.0
    health: Rate | None = None
    """Of an address that asks nothing of anybody: what the framework alone takes here."""
    submit: Rate | None = None
    poll: Rate | None = None
    poll_unchanged: Rate | None = None
    streams: list[Delivery] = field(default_factory=list)
    rss_mb: list[tuple[float, float]] = field(default_factory=list)
    """Minutes of load and the API's memory then."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A running service, and who may use it."""

    home: Path
    points: Endpoints
    port: int
    api: psutil.Process
    secret: str
    file_id: str

    @property
    def headers(self) -> str:
        """Of every request."""
        return f"Host: 127.0.0.1\r\nAuthorization: Bearer {self.secret}\r\n"


@contextlib.contextmanager
def running_service() -> Iterator[tuple[Place, float]]:
    """The service without workers, and the seconds that the API took to start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    with tempfile.TemporaryDirectory(prefix="trimtab-load-") as folder:
        home = Path(folder)
        servers = EmbeddedServers(home / "servers")
        try:
            with servers:
                points = servers.endpoints
                commands.upgrade(
                    points.owner_url,
                    api_password=SecretStr(points.api_password),
                    worker_password=SecretStr(points.worker_password),
                )
                secret, file_id = _fill(home, points)
                with _api(home, points) as (process, port, seconds):
                    place = Place(
                        home=home,
                        points=points,
                        port=port,
                        api=psutil.Process(process.pid),
                        secret=secret,
                        file_id=file_id,
                    )
                    yield place, seconds
        finally:
            servers.home.remove()


def _fill(home: Path, points: Endpoints) -> tuple[str, str]:
    """A key, a model's card and a file of prompts."""
    (home / "models" / "m").mkdir(parents=True)
    card = {"id": MODEL, "sha256": "0" * 64, "context_length": 2048}
    (home / "models" / "m" / "model.json").write_text(json.dumps(card))
    rows = b"".join(b'{"prompt": "Tell me about thing %d."}\n' % number for number in range(ROWS))
    stored = ArtifactStore(home / "artifacts").put("files/load", [rows])
    database = Database(points.owner_url, pool_size=1)
    with database.begin() as tx:
        made = keys.create(tx, tenant="load", name="load")
        file = files.add(
            tx,
            files.NewFile(
                tenant_id=made.key.tenant_id,
                created_by=made.key.id,
                purpose=files.TRAINING_PURPOSE,
                filename="prompts.jsonl",
                bytes=stored.bytes,
                sha256=stored.sha256,
                uri=stored.key,
                status="processed",
                rows=ROWS,
                report={
                    "valid": True,
                    "rows": ROWS,
                    "error_count": 0,
                    "errors": [],
                    "warnings": [],
                },
            ),
        )
    database.dispose()
    return made.secret.get_secret_value(), public_file_id(file.id)


@contextlib.contextmanager
def _api(home: Path, points: Endpoints) -> Iterator[tuple[subprocess.Popen[bytes], int, float]]:
    """An API process that answers, with its port and the seconds until it did."""
    port = _free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "TRIMTAB_HOME": str(home),
        "TRIMTAB_PORT": str(port),
        "TRIMTAB_STREAMS_PER_TENANT": "100000",
        "DATABASE_URL": points.api_url,
        "REDIS_URL": points.redis_url,
    }
    with (home / "api.log").open("ab") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "api"], env=environment, cwd=ROOT, stdout=log, stderr=log
        )
    try:
        asyncio.run(_answers(port, process))
        yield process, port, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(30)


async def _answers(port: int, process: subprocess.Popen[bytes]) -> None:
    while True:
        if process.poll() is not None:
            raise SystemExit("the API ended")
        try:
            async with _connection(port) as connection:
                if (await connection.ask(b"GET /v1/readyz HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200:
                    return
        except OSError:
            await asyncio.sleep(0.01)


class Connection:
    """A kept-alive connection: cheap, so that the generator takes little of the machine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Status, head and body of the answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return int(head.split(b" ", 2)[1]), head, await self._reader.readexactly(length)


@contextlib.asynccontextmanager
async def _streams(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def _connection(port: int) -> AsyncIterator[Connection]:
    async with _streams(port) as (reader, writer):
        yield Connection(reader, writer)


def _job_body(place: Place) -> bytes:
    body = {
        "model": MODEL,
        "training_file": place.file_id,
        "method": {"type": "ppo", "ppo": {"reward": {"type": "sentiment"}}},
    }
    return json.dumps(body).encode()


def _post(place: Place) -> bytes:
    body = _job_body(place)
    head = (
        f"POST /v1/fine_tuning/jobs HTTP/1.1\r\n{place.headers}Content-Type: application/json\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _get(place: Place, job_id: str, more: str = "") -> bytes:
    return f"GET /v1/fine_tuning/jobs/{job_id} HTTP/1.1\r\n{place.headers}{more}\r\n".encode()


async def _rate(place: Place, requests: Sequence[bytes], status: int, seconds: float) -> Rate:
    """As many of the requests as the connections can make in the time."""
    latencies: list[float] = []
    ends_at = time.perf_counter() + seconds

    async def work(number: int) -> None:
        async with _connection(place.port) as connection:
            while (started := time.perf_counter()) < ends_at:
                number += CONNECTIONS
                got, _, body = await connection.ask(requests[number % len(requests)])
                if got != status:
                    raise SystemExit(f"{got} instead of {status}: {body[:300]!r}")
                latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(work(number) for number in range(CONNECTIONS)))
    return Rate(
        per_second=round(len(latencies) / seconds, 1),
        p50_ms=_milliseconds(latencies, 50),
        p99_ms=_milliseconds(latencies, 99),
    )


def _milliseconds(latencies: Sequence[float], percent: int) -> float:
    return round(1000 * statistics.quantiles(latencies, n=100)[percent - 1], 1)


async def _measure_requests(place: Place, figures: Figures, seconds: float) -> None:
    health = b"GET /v1/healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    figures.health = await _rate(place, [health], 200, seconds)
    figures.submit = await _rate(place, [_post(place)], 200, seconds)
    jobs = await _make_jobs(place, 50)
    figures.poll = await _rate(place, [_get(place, job) for job in jobs], 200, seconds)
    unchanged = []
    async with _connection(place.port) as connection:
        for job in jobs:
            _, head, _ = await connection.ask(_get(place, job))
            tag = next(one for one in head.split(b"\r\n") if one.lower().startswith(b"etag:"))
            if_none = f"If-None-Match: {tag.partition(b':')[2].decode().strip()}\r\n"
            unchanged.append(_get(place, job, if_none))
    figures.poll_unchanged = await _rate(place, unchanged, 304, seconds)


async def _make_jobs(place: Place, count: int) -> list[str]:
    async with _connection(place.port) as connection:
        answers = [await connection.ask(_post(place)) for _ in range(count)]
    return [json.loads(body)["id"] for _, _, body in answers]


def _publish(
    points: Endpoints, jobs: list[UUID], rate: float, seconds: float, held: Event, go: Event
) -> None:
    """What workers do: rows to Postgres, then entries to Redis; each with the time before both.

    `held` is set once all jobs run, so that `go` begins with metrics and nothing else.
    """
    database, stream = Database(points.worker_url, pool_size=1), FeedStream(points.redis_url)
    claims: list[Claim] = []
    for job in jobs:
        with database.begin() as tx:
            claim = attempts.claim(tx, job, task_id=str(job), worker_label="load", ttl=TTL)
            assert claim is not None  # noqa: S101 - nobody else takes jobs here
            claims.append(claim)
            attempts.record_resume(tx, claim.holder, step=0)
            attempts.heartbeat(tx, claim.holder, ttl=TTL, phase=Phase.TRAINING)
    held.set()
    go.wait()
    started, sent = time.monotonic(), 0
    while sent < rate * seconds * len(claims):
        due = started + sent / (rate * len(claims))
        time.sleep(max(0.0, due - time.monotonic()))
        claim, line = claims[sent % len(claims)], sent // len(claims) + 1
        values = {"reward_mean": 0.5, "kl": 0.1, "sent_at": time.time()}
        item = NewMetric(line=line, step=line, at=datetime.now(UTC), values=values)
        with database.begin() as tx:
            beat = attempts.heartbeat(
                tx, claim.holder, ttl=TTL, phase=Phase.TRAINING, report=Report(items=(item,))
            )
        stream.send(beat.items)
        sent += 1
    stream.close()
    database.dispose()


@dataclass(kw_only=True)
class Audience:
    """What a number of stream clients have seen so far."""

    num_open: int = 0
    """Clients whose stream has begun: what comes from now on is theirs."""
    latencies: list[float] = field(default_factory=list)


async def _listen(place: Place, job: str, audience: Audience, expected: int) -> None:
    """One client of a stream, until it has all expected metrics."""
    async with _streams(place.port) as (reader, writer):
        path = f"/v1/fine_tuning/jobs/{job}/stream?after=latest&types=metrics"
        writer.write(f"GET {path} HTTP/1.1\r\n{place.headers}\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        audience.num_open += 1
        got = 0
        while got < expected:
            line = await reader.readuntil(b"\n")
            if line.startswith(b'data: {"type":"metrics"'):
                values = json.loads(line[6:])["values"]
                audience.latencies.append(time.time() - values["sent_at"])
                got += 1


async def _measure_streams(place: Place, clients: int, seconds: float) -> Delivery:
    num_jobs, rate = STREAMS.get(clients, (max(1, clients // 10), 1.0))
    jobs = await _make_jobs(place, num_jobs)
    expected = int(rate * seconds)
    spawned = multiprocessing.get_context("spawn")
    held, go = spawned.Event(), spawned.Event()
    publisher = spawned.Process(
        target=_publish,
        args=(place.points, [job_id_of(job) for job in jobs], rate, seconds, held, go),
    )
    publisher.start()
    await asyncio.to_thread(held.wait)
    audience = Audience()
    listening = [
        asyncio.create_task(_listen(place, jobs[number % num_jobs], audience, expected))
        for number in range(clients)
    ]
    await _until_open(place, audience, listening)
    place.api.cpu_percent()
    go.set()
    _, late = await asyncio.wait(listening, timeout=seconds + GRACE_SECONDS)
    cpu = place.api.cpu_percent()
    for one in late:
        one.cancel()
    publisher.join()
    return Delivery(
        clients=clients,
        jobs=num_jobs,
        per_job_and_second=rate,
        deliveries=len(audience.latencies),
        missing=clients * expected - len(audience.latencies),
        p50_ms=_milliseconds(audience.latencies, 50),
        p99_ms=_milliseconds(audience.latencies, 99),
        api_cpu_percent=round(cpu, 1),
        api_rss_mb=_rss_mb(place),
    )


async def _until_open(
    place: Place, audience: Audience, listening: Sequence[asyncio.Task[None]]
) -> None:
    """Return once each client's stream has begun and the API rests: all history is read."""
    place.api.cpu_percent()
    await asyncio.sleep(1)
    while audience.num_open < len(listening) or place.api.cpu_percent() > RESTING_PERCENT:
        if ended := next((one for one in listening if one.done()), None):
            raise SystemExit(f"a client could not listen: {ended.exception()}")
        await asyncio.sleep(1)


def _rss_mb(place: Place) -> float:
    return round(place.api.memory_info().rss / 2**20, 1)


async def _soak(place: Place, figures: Figures, minutes: float) -> None:
    """Memory under mixed load: submits, polls and streams that come and go."""
    started = time.monotonic()
    while (passed := (time.monotonic() - started) / 60) < minutes:
        figures.rss_mb.append((round(passed, 1), _rss_mb(place)))
        await _rate(place, [_post(place)], 200, 5)
        await _measure_streams(place, 100, 10)
        jobs = await _make_jobs(place, 20)
        await _rate(place, [_get(place, job) for job in jobs], 200, 5)
    figures.rss_mb.append((round(minutes, 1), _rss_mb(place)))


def _help_seconds() -> float:
    """The best of a few runs of `trimtab --help`."""

    def once() -> float:
        started = time.perf_counter()
        command = [sys.executable, "-m", "trimtab.cli.main", "--help"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # noqa: S603 - ours
        return time.perf_counter() - started

    return round(min(once() for _ in range(STARTS)), 3)


def _free_port() -> int:
    import socket  # noqa: PLC0415 - for this alone

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


async def measure(
    place: Place, figures: Figures, *, seconds: float, clients: Sequence[int], soak_minutes: float
) -> None:
    """All figures of a running service."""
    await _measure_requests(place, figures, seconds)
    for count in clients:
        figures.streams.append(await _measure_streams(place, count, seconds))
        show(f"{count} clients: {figures.streams[-1]}")
    if soak_minutes:
        await _soak(place, figures, soak_minutes)


def show(text: Any) -> None:
    """Print at once."""
    print(text, flush=True)


def main() -> int:
    """Measure and print; 1 if any stream lacked an item."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 500, 2000])
    parser.add_argument("--soak-minutes", type=float, default=0, help="memory over time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args()
    figures = Figures(help_seconds=_help_seconds())
    with running_service() as (place, seconds):
        figures.api_start_seconds = round(seconds, 2)
        figures.rss_mb.append((0.0, _rss_mb(place)))
        asyncio.run(
            measure(
                place,
                figures,
                seconds=chosen.seconds,
                clients=chosen.clients,
                soak_minutes=chosen.soak_minutes,
            )
        )
    text = json.dumps(asdict(figures), indent=2)
    show(text)
    if chosen.json:
        chosen.json.write_text(f"{text}\n")
    return int(any(one.missing for one in figures.streams))


if __name__ == "__main__":
    sys.exit(main())
