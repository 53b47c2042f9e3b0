"""The live stream: every item once and in order, whatever Redis lacks."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import redis

from api.feed_hub import QUEUED_FRAMES, SLOW, FeedHub
from core import attempts, jobs, keys
from core.attempts import Holder
from core.db import Database
from core.dispatch import feed_key
from core.events import FeedItem, Report, feed_payload
from core.ids import job_id_of
from core.states import Phase
from tests.conftest import Servers
from tests.factories import TTL, Tenant, claim_job, make_tenant, metric
from tests.live_api import LiveApi, create_job, live_api, wait_until

JOBS = "/v1/fine_tuning/jobs"
SETTINGS = {"heartbeat_seconds": 0.3, "key_check_seconds": 0.3, "streams_per_tenant": 3}


@pytest.fixture(scope="module")
def api(
    servers: Servers, api_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    folder = tmp_path_factory.mktemp("api")
    with live_api(api_url, servers.redis_url, folder, **SETTINGS) as running:
        yield running


class Worker:
    """What a worker does to one job: rows to Postgres, then entries to Redis."""

    def __init__(self, client: httpx2.Client, database: Database, tenant: Tenant) -> None:
        self._database = database
        self.job_id = create_job(client)["id"]
        with database.begin() as tx:
            job = jobs.get(tx, job_id_of(self.job_id), tenant_id=tenant.tenant_id)
            self.claimed = claim_job(tx, job)
            attempts.record_resume(tx, self.holder, step=0)
        self._line = 0

    @property
    def holder(self) -> Holder:
        return self.claimed.holder

    @property
    def url(self) -> str:
        return f"{JOBS}/{self.job_id}/stream"

    def store(self, count: int = 1, *, noise: str = "") -> list[FeedItem]:
        """Metrics in Postgres only; noise makes them large."""
        items = []
        for _ in range(count):
            self._line += 1
            items.append(metric(self._line, self._line, **{f"reward_mean{noise}": 1.0}))
        with self._database.begin() as tx:
            beat = attempts.heartbeat(
                tx, self.holder, ttl=TTL, phase=Phase.TRAINING, report=Report(items=tuple(items))
            )
        return beat.items

    def finish(self) -> list[FeedItem]:
        with self._database.begin() as tx:
            return attempts.finish(tx, self.holder, artifacts=(), fine_tuned_model="ft:x").items


def push(redis_url: str, items: list[FeedItem]) -> None:
    """Entries as the supervisor writes them."""
    with redis.Redis.from_url(redis_url) as connection:
        for item in items:
            text = json.dumps(feed_payload(item))
            connection.xadd(feed_key(item.job_id), {"item": text}, id=item.id)


@pytest.fixture
def worker(client: httpx2.Client, worker_database: Database, tenant: Tenant) -> Worker:
    return Worker(client, worker_database, tenant)


class Reader:
    """A client that reads a stream in the background."""

    def __init__(self, client: httpx2.Client, url: str, **headers: str) -> None:
        self.lines: list[str] = []
        self.status = 0
        self._thread = threading.Thread(target=self._read, args=(client, url, headers))
        self._thread.start()

    def _read(self, client: httpx2.Client, url: str, headers: dict[str, str]) -> None:
        with client.stream("GET", url, headers=headers) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                self.lines.append(line)

    @property
    def items(self) -> list[dict[str, Any]]:
        texts = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        return [json.loads(text) for text in texts if text != "[DONE]"]

    @property
    def seqs(self) -> list[int]:
        return [item["seq"] for item in self.items if "seq" in item]

    def wait_for(self, seq: int) -> None:
        wait_until(lambda: seq in self.seqs)

    def wait_for_id(self, frame_id: str) -> None:
        """The same for long streams: looks at the last lines only."""
        wait_until(lambda: f"id: {frame_id}" in self.lines[-4:])

    def join(self) -> "Reader":
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self


def test_a_finished_job_is_told_from_the_start(client: httpx2.Client, worker: Worker) -> None:
    worker.store(3)
    worker.finish()

    reader = Reader(client, worker.url).join()

    types = [item["type"] for item in reader.items]
    assert types == ["status", "event", "event", "metrics", "metrics", "metrics", "event", "end"]
    assert reader.seqs == [1, 2, 3, 4, 5, 6]
    assert reader.items[-1]["job"]["status"] == "succeeded"
    assert reader.items[-1]["id"] == reader.items[-2]["id"] == "1-6"
    assert reader.lines[-2:] == ["data: [DONE]", ""]


def test_news_come_through_redis(client: httpx2.Client, worker: Worker, redis_url: str) -> None:
    reader = Reader(client, worker.url)
    reader.wait_for(2)

    for _ in range(5):
        push(redis_url, worker.store())
    push(redis_url, worker.finish())

    assert reader.join().seqs == list(range(1, 9))


def test_what_redis_lacks_comes_from_postgres(
    client: httpx2.Client, worker: Worker, redis_url: str
) -> None:
    """Entries lost, and the stream wiped in between: each item still comes once, in order."""
    reader = Reader(client, worker.url)
    reader.wait_for(2)

    items = worker.store(10)
    push(redis_url, [item for item in items if item.seq not in (4, 5, 9)])
    reader.wait_for(items[-1].seq)
    with redis.Redis.from_url(redis_url) as connection:
        connection.delete(feed_key(job_id_of(worker.job_id)))
    worker.store(5)
    worker.finish()

    assert reader.join().seqs == list(range(1, 19))


def test_what_redis_has_trimmed_comes_from_postgres(
    client: httpx2.Client, worker: Worker, redis_url: str
) -> None:
    """XREAD from a trimmed id goes on at the next entry and says nothing of those between."""
    reader = Reader(client, worker.url)
    reader.wait_for(2)

    items = worker.store(10)
    with redis.Redis.from_url(redis_url) as connection, connection.pipeline() as at_once:
        for item in items:
            text = json.dumps(feed_payload(item))
            at_once.xadd(feed_key(item.job_id), {"item": text}, id=item.id)
        at_once.xtrim(feed_key(items[0].job_id), maxlen=2, approximate=False)
        at_once.execute()
    worker.finish()

    assert reader.join().seqs == list(range(1, 14))


def test_a_burst_of_more_than_a_queue_reaches_a_client_that_reads(
    api: LiveApi, client: httpx2.Client, worker: Worker
) -> None:
    reader = Reader(client, worker.url)
    reader.wait_for(2)

    worker.store(5 * QUEUED_FRAMES)
    worker.finish()

    assert reader.join().seqs == list(range(1, 5 * QUEUED_FRAMES + 4))
    assert hub_of(api).closed[SLOW] == 0


def test_all_streams_share_one_reader_of_redis(
    api: LiveApi, tenant: Tenant, worker: Worker, servers: Servers
) -> None:
    clients = [api.client(tenant) for _ in range(3)]
    with redis.Redis.from_url(servers.redis_admin_url) as admin:
        readers = [Reader(each, worker.url) for each in clients]
        for reader in readers:
            reader.wait_for(2)
        wait_until(lambda: hub_of(api).num_streams == 3)
        blocked = [one for one in admin.client_list() if one["cmd"] == "xread"]
    worker.finish()
    for reader, each in zip(readers, clients, strict=True):
        reader.join()
        each.close()

    assert len(blocked) == 1


def test_a_client_that_does_not_read_is_closed_and_goes_on_at_its_last_id(
    api: LiveApi, client: httpx2.Client, worker: Worker, tenant: Tenant, redis_url: str
) -> None:
    """Nothing is kept for it meanwhile, and who reads beside it loses nothing."""
    fast = Reader(client, worker.url)
    fast.wait_for(2)
    host, _, port = api.origin.removeprefix("http://").partition(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        request = (
            f"GET {worker.url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tenant.secret}\r\n"
        )
        slow.sendall(f"{request}\r\n".encode())
        wait_until(lambda: hub_of(api).num_streams == 2)

        told = 2
        while not hub_of(api).closed[SLOW]:
            items = worker.store(20, noise="x" * 60_000)
            push(redis_url, items)
            told = items[-1].seq
            assert told < 1000, "60 MB wait for a client that does not read"
            fast.wait_for_id(f"1-{told}")
        assert hub_of(api).num_streams == 1
        seen = last_id(received(slow))
    worker.finish()

    again = Reader(client, worker.url, **{"Last-Event-ID": seen}).join()
    everything = list(range(1, told + 2))
    assert fast.join().seqs == everything
    assert again.seqs == everything[int(seen.split("-")[1]) :]


def hub_of(api: LiveApi) -> FeedHub:
    """The hub of a running server."""
    hub: FeedHub = api.app.state.feed_hub
    return hub


def received(connection: socket.socket) -> bytes:
    """All that the server had sent before it let go."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def last_id(text: bytes) -> str:
    """The id of the last whole frame in a cut answer, without the marks of its chunks."""
    return re.findall(rb"id: (\d+-\d+)\ndata: .*?\n\n", text, re.DOTALL)[-1].decode()


def test_without_redis_the_stream_goes_on(
    api_url: str,
    worker_database: Database,
    tenant: Tenant,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("no-redis")
    with (
        live_api(api_url, "redis://127.0.0.1:1/0", folder) as running,
        running.client(tenant) as client,
    ):
        worker = Worker(client, worker_database, tenant)
        reader = Reader(client, worker.url)
        reader.wait_for(2)
        worker.store(3)
        worker.finish()

        assert reader.join().seqs == [1, 2, 3, 4, 5, 6]


def test_a_stream_goes_on_behind_the_last_id(client: httpx2.Client, worker: Worker) -> None:
    worker.store(5)
    worker.finish()

    by_header = Reader(client, worker.url, **{"Last-Event-ID": "1-4"}).join()
    by_query = Reader(client, f"{worker.url}?after=1-4").join()

    assert by_header.seqs == by_query.seqs == [5, 6, 7, 8]


def test_latest_tells_only_what_is_new(client: httpx2.Client, worker: Worker) -> None:
    worker.store(5)

    reader = Reader(client, f"{worker.url}?after=latest")
    wait_until(lambda: reader.items)
    worker.finish()

    assert reader.join().seqs == [8]


def test_after_the_end_there_is_nothing(client: httpx2.Client, worker: Worker) -> None:
    """204 stops an EventSource; so the end carries the id of the last item."""
    worker.finish()
    end = Reader(client, worker.url).join().items[-1]["id"]

    answer = client.get(worker.url, headers={"Last-Event-ID": end})

    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("cursor", ["nonsense", "1-99", "1", "1-2-3", "-1", "1-١"])
def test_an_id_that_never_was_is_refused(
    client: httpx2.Client, worker: Worker, cursor: str
) -> None:
    answer = client.get(worker.url, params={"after": cursor})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_cursor")


def test_types_choose_frames(client: httpx2.Client, worker: Worker) -> None:
    worker.store(2)
    worker.finish()

    reader = Reader(client, f"{worker.url}?types=metrics").join()

    assert [item["type"] for item in reader.items] == ["metrics", "metrics", "end"]


def test_frames_have_the_form_that_clients_survive(client: httpx2.Client, worker: Worker) -> None:
    """No `event:` line, `retry:` inside the first frame, a heartbeat without a blank line."""
    reader = Reader(client, worker.url)
    wait_until(lambda: reader.lines.count(": hb") >= 2)
    worker.finish()
    lines = reader.join().lines

    assert lines[0] == "retry: 2000"
    assert lines[1].startswith("data: ")
    assert not [line for line in lines if line.startswith("event:")]
    for place, line in enumerate(lines):
        if line == "":
            assert lines[place - 1].startswith("data: ")
        if line == ": hb":
            assert lines[place + 1] != ""


def test_the_stream_is_neither_kept_nor_buffered(client: httpx2.Client, worker: Worker) -> None:
    worker.finish()

    headers = client.get(worker.url).headers

    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "no"
    assert "Content-Encoding" not in headers


def test_the_status_comes_without_an_id(client: httpx2.Client, worker: Worker) -> None:
    worker.finish()

    status = Reader(client, worker.url).join().items[0]

    assert (status["type"], status["id"]) == ("status", None)
    assert status["job"]["object"] == "fine_tuning.job"


def test_a_cancel_by_a_user_reaches_the_stream(
    client: httpx2.Client, tenant: Tenant, api: LiveApi
) -> None:
    """The API writes no Redis stream; its rows come from Postgres."""
    job = create_job(client)
    with api.client(tenant) as other:
        reader = Reader(other, f"{JOBS}/{job['id']}/stream")
        reader.wait_for(1)
        client.post(f"{JOBS}/{job['id']}/cancel")
        reader.join()

    assert reader.items[-1]["type"] == "end"
    assert reader.items[-1]["job"]["status"] == "cancelled"


def test_a_revoked_key_ends_its_stream(
    client: httpx2.Client, worker: Worker, tenant: Tenant, owner_database: Database
) -> None:
    reader = Reader(client, worker.url)
    reader.wait_for(2)

    with owner_database.begin() as tx:
        keys.revoke(tx, tenant.public_key_id)

    assert reader.join().items[-1]["type"] != "end"


def test_a_tenant_may_open_so_many_streams(
    api: LiveApi, worker: Worker, tenant: Tenant, client: httpx2.Client
) -> None:
    clients = [api.client(tenant) for _ in range(3)]
    readers = [Reader(each, worker.url) for each in clients]
    for reader in readers:
        reader.wait_for(2)

    answer = client.get(worker.url)
    worker.finish()
    for reader, each in zip(readers, clients, strict=True):
        reader.join()
        each.close()

    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_streams")
    assert answer.headers["x-should-retry"] == "false"
    assert Reader(client, worker.url).join().status == 200


def test_another_tenant_gets_no_frame(
    api: LiveApi, worker: Worker, owner_database: Database
) -> None:
    with api.client(make_tenant(owner_database)) as other:
        answer = other.get(worker.url)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


def test_streams_end_when_the_server_stops(
    servers: Servers,
    api_url: str,
    worker_database: Database,
    tenant: Tenant,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("stopping")
    with live_api(api_url, servers.redis_url, folder) as running:
        client = running.client(tenant)
        worker = Worker(client, worker_database, tenant)
        reader = Reader(client, worker.url)
        reader.wait_for(2)

    assert reader.join().items[-1]["type"] == "event"
    client.close()
