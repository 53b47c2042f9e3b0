"""The unmodified `openai` client against a live server: only `base_url` and `api_key` differ."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from core import attempts, jobs
from core.attempts import Holder, NewArtifact
from core.db import Database
from core.events import NewMetric, Report
from core.ids import job_id_of
from core.states import Phase
from tests.conftest import Servers
from tests.factories import (
    MODEL,
    TTL,
    Tenant,
    claim_job,
    make_tenant,
    metric,
    prompt_lines,
    stored_checkpoint,
)
from tests.live_api import LiveApi, live_api, put_artifact, wait_until

METHOD: Any = {
    "type": "ppo",
    "ppo": {"reward": {"type": "sentiment"}, "hyperparameters": {"clip_range": 0.2}},
}
TAR = bytes(range(256)) * 50


@pytest.fixture(scope="module")
def api(
    servers: Servers, api_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    folder = tmp_path_factory.mktemp("api")
    with live_api(api_url, servers.redis_url, folder, heartbeat_seconds=0.2) as running:
        yield running


@pytest.fixture
def sent() -> list[httpx2.Request]:
    """Every request the client has sent."""
    return []


@pytest.fixture
def client(api: LiveApi, tenant: Tenant, sent: list[httpx2.Request]) -> Iterator[openai.OpenAI]:
    hooks = {"request": [sent.append]}
    with (
        httpx2.Client(event_hooks=hooks) as http,
        openai.OpenAI(base_url=api.base_url, api_key=tenant.secret, http_client=http) as made,
    ):
        yield made


def create(client: openai.OpenAI, **fields: Any) -> Any:
    file = client.files.create(file=("prompts.jsonl", prompt_lines()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, method=METHOD, **fields
    )


def claimed(database: Database, job: Any, tenant: Tenant) -> Holder:
    with database.begin() as tx:
        row = jobs.get(tx, job_id_of(job.id), tenant_id=tenant.tenant_id)
        holder = claim_job(tx, row).holder
        attempts.record_resume(tx, holder, step=0)
    return holder


def tell(database: Database, holder: Holder, *items: NewMetric) -> None:
    with database.begin() as tx:
        attempts.heartbeat(tx, holder, ttl=TTL, phase=Phase.TRAINING, report=Report(items=items))


def finish(database: Database, holder: Holder, *left: NewArtifact) -> None:
    with database.begin() as tx:
        attempts.finish(tx, holder, artifacts=left, fine_tuned_model=f"ft:{MODEL}:t::x")


def test_a_file_goes_up_is_listed_read_and_deleted(client: openai.OpenAI) -> None:
    file = client.files.create(file=prompt_lines(), purpose="fine-tune")

    assert (file.object, file.status, file.purpose) == ("file", "processed", "fine-tune")
    assert file.filename == "upload"
    assert client.files.retrieve(file.id).id == file.id
    assert [each.id for each in client.files.list(purpose="fine-tune")] == [file.id]
    assert client.files.content(file.id).read() == prompt_lines()
    assert client.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_job_is_created_found_listed_and_cancelled(client: openai.OpenAI) -> None:
    job = create(client, suffix="mine", metadata={"a": "b"}, seed=7)

    assert (job.object, job.status, job.seed) == ("fine_tuning.job", "queued", 7)
    assert job.hyperparameters is not None
    assert job.result_files == []
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == {"a": "b"}
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"a": "b"})] == [job.id]
    assert list(client.fine_tuning.jobs.list(metadata={"a": "c"})) == []
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_job_is_paused_and_resumed(client: openai.OpenAI, sent: list[httpx2.Request]) -> None:
    job = create(client)

    paused = client.fine_tuning.jobs.pause(job.id)
    resumed = client.fine_tuning.jobs.resume(job.id)

    assert (paused.status, resumed.status) == ("paused", "queued")
    assert [request.read() for request in sent[-2:]] == [b"", b""]


def test_a_job_goes_on_from_a_checkpoint_of_another(
    client: openai.OpenAI, worker_database: Database, tenant: Tenant
) -> None:
    source = create(client)
    holder = claimed(worker_database, source, tenant)
    with worker_database.begin() as tx:
        attempts.checkpoint(tx, holder, stored_checkpoint(3), ttl=TTL)
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(source.id)
    file = client.files.create(file=prompt_lines(), purpose="fine-tune")

    job: Any = client.fine_tuning.jobs.create(
        model=checkpoint.id, training_file=file.id, method=METHOD
    )

    assert (job.model, job.start_checkpoint) == (MODEL, checkpoint.id)


def test_null_is_absent_on_optional_fields(client: openai.OpenAI) -> None:
    job = create(client, suffix=None, metadata=None, validation_file=None, integrations=None)

    assert job.validation_file is None


def test_lists_page_by_themselves(client: openai.OpenAI) -> None:
    made = [create(client).id for _ in range(5)]

    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]


def test_events_page_by_themselves(
    client: openai.OpenAI, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    holder = claimed(worker_database, job, tenant)
    tell(worker_database, holder, *(metric(n, n) for n in range(1, 6)))

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))

    assert len(events) == 7
    assert len({event.id for event in events}) == 7
    assert {event.type for event in events} == {"message", "metrics"}
    assert {event.object for event in events} == {"fine_tuning.job.event"}


def test_checkpoints_page_by_themselves(
    client: openai.OpenAI, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    holder = claimed(worker_database, job, tenant)
    for step in (1, 2, 3):
        with worker_database.begin() as tx:
            attempts.checkpoint(tx, holder, stored_checkpoint(step), ttl=TTL)

    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))

    assert [each.step_number for each in found] == [3, 2, 1]
    assert found[0].fine_tuning_job_id == job.id


def test_models_are_found_with_a_slash_in_their_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_results_are_files(
    client: openai.OpenAI, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    holder = claimed(worker_database, job, tenant)
    finish(
        worker_database,
        holder,
        put_artifact(api.store, "adapter.tar", TAR, role="adapter"),
        put_artifact(api.store, "metrics.csv", b"step\n", role="export"),
    )

    done = client.fine_tuning.jobs.retrieve(job.id)

    assert done.status == "succeeded"
    assert client.files.content(done.result_files[0]).read() == b"step\n"
    assert client.files.content(done.result_files[1]).read() == TAR


def test_a_cut_download_goes_on(
    client: openai.OpenAI, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    holder = claimed(worker_database, job, tenant)
    finish(worker_database, holder, put_artifact(api.store, "adapter.tar", TAR, role="adapter"))
    manifest: Any = client.get(f"/fine_tuning/jobs/{job.id}/artifacts", cast_to=object)
    file = client.fine_tuning.jobs.retrieve(job.id).result_files[-1]
    headers = {"Range": "bytes=5000-", "If-Range": f'"sha256-{manifest["adapter"]["sha256"]}"'}

    with client.files.with_streaming_response.content(file, extra_headers=headers) as response:
        rest = b"".join(response.iter_bytes())

    assert response.status_code == 206
    assert TAR[:5000] + rest == TAR


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-7"}, openai.BadRequestError, "model_not_found"),
        ({"training_file": "file-x"}, openai.BadRequestError, "file_not_found"),
        ({"method": {"type": "dpo"}}, openai.BadRequestError, "method_not_supported"),
        ({"suffix": "?"}, openai.BadRequestError, "invalid_value"),
    ],
)
def test_a_refusal_is_the_clients_own_error(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    file = client.files.create(file=prompt_lines(), purpose="fine-tune")
    request = {"model": MODEL, "training_file": file.id, "method": METHOD} | fields

    with pytest.raises(error) as caught:
        client.fine_tuning.jobs.create(**request)

    assert caught.value.code == code
    assert caught.value.request_id is not None
    assert caught.value.body is not None


def test_a_wrong_key_is_an_authentication_error(api: LiveApi) -> None:
    with (
        openai.OpenAI(base_url=api.base_url, api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        stranger.models.list()

    assert caught.value.code == "invalid_api_key"


def test_a_key_without_the_right_is_a_permission_error(
    api: LiveApi, owner_database: Database
) -> None:
    reader = make_tenant(owner_database, scopes=["jobs:read"])
    with (
        openai.OpenAI(base_url=api.base_url, api_key=reader.secret) as client,
        pytest.raises(openai.PermissionDeniedError),
    ):
        client.models.list()


def test_an_illegal_cancel_is_asked_once(
    client: openai.OpenAI,
    sent: list[httpx2.Request],
    worker_database: Database,
    tenant: Tenant,
) -> None:
    """Without `x-should-retry: false` the client would ask three times."""
    job = create(client)
    finish(worker_database, claimed(worker_database, job, tenant))
    before = len(sent)

    with pytest.raises(openai.ConflictError) as caught:
        client.fine_tuning.jobs.cancel(job.id)

    assert caught.value.code == "job_already_finished"
    assert len(sent) - before == 1


def test_cancel_sends_no_body(client: openai.OpenAI, sent: list[httpx2.Request]) -> None:
    job = create(client)

    client.fine_tuning.jobs.cancel(job.id)

    assert sent[-1].headers["content-type"] == "application/json"
    assert sent[-1].read() == b""


class LosesFirstAnswer(httpx2.BaseTransport):
    """A network that delivers each first POST and loses its answer."""

    def __init__(self) -> None:
        self._inner = httpx2.HTTPTransport()
        self.lost = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = self._inner.handle_request(request)
        if request.method != "POST" or request.headers["x-stainless-retry-count"] != "0":
            return answer
        answer.read()
        answer.close()
        self.lost += 1
        raise httpx2.ReadTimeout("lost", request=request)

    def close(self) -> None:
        self._inner.close()


def test_a_create_whose_answer_was_lost_makes_one_job(api: LiveApi, tenant: Tenant) -> None:
    """The client repeats by itself and sends no idempotency key."""
    network = LosesFirstAnswer()
    with (
        httpx2.Client(transport=network) as http,
        openai.OpenAI(base_url=api.base_url, api_key=tenant.secret, http_client=http) as client,
    ):
        job = create(client)

        assert network.lost == 2
        assert [each.id for each in client.fine_tuning.jobs.list()] == [job.id]
        assert len(list(client.files.list())) == 1


def stream(client: openai.OpenAI, job_id: str, **headers: str) -> Iterator[dict[str, Any]]:
    frames: Any = client.get(
        f"/fine_tuning/jobs/{job_id}/stream",
        cast_to=object,
        stream=True,
        stream_cls=openai.Stream[object],
        options={"headers": headers},
    )
    yield from frames


def see_heartbeats(api: LiveApi, tenant: Tenant, job_id: str, *, count: int) -> None:
    """Read the same stream raw until so many heartbeats have passed."""
    url = f"/v1/fine_tuning/jobs/{job_id}/stream"
    with api.client(tenant) as raw, raw.stream("GET", url) as response:
        for line in response.iter_lines():
            count -= line == ": hb"
            if count == 0:
                return


def test_the_client_reads_the_stream_heartbeats_and_all(
    client: openai.OpenAI, api: LiveApi, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    holder = claimed(worker_database, job, tenant)
    frames: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: frames.extend(stream(client, job.id)))
    reader.start()
    tell(worker_database, holder, metric(1, 1, reward_mean=0.5))
    wait_until(lambda: "metrics" in [frame["type"] for frame in frames])
    see_heartbeats(api, tenant, job.id, count=2)
    finish(worker_database, holder)
    reader.join(20)

    assert [frame["type"] for frame in frames] == [
        "status",
        "event",
        "event",
        "metrics",
        "event",
        "end",
    ]
    assert frames[3]["values"] == {"reward_mean": 0.5}
    assert [frame["id"] for frame in frames] == [None, "0-1", "1-2", "1-3", "1-4", "1-4"]


def test_the_client_goes_on_at_the_last_id(
    client: openai.OpenAI, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    holder = claimed(worker_database, job, tenant)
    tell(worker_database, holder, *(metric(n, n) for n in range(1, 4)))
    finish(worker_database, holder)

    frames = list(stream(client, job.id, **{"Last-Event-ID": "1-4"}))

    assert [frame["id"] for frame in frames] == [None, "1-5", "1-6", "1-6"]


def test_our_routes_are_reached_through_the_same_client(
    client: openai.OpenAI, worker_database: Database, tenant: Tenant
) -> None:
    job = create(client)
    tell(worker_database, claimed(worker_database, job, tenant), metric(1, 1, reward_mean=0.5))

    metrics: Any = client.get(f"/fine_tuning/jobs/{job.id}/metrics", cast_to=object)

    assert metrics["series"] == {"reward_mean": [0.5]}
    assert json.dumps(metrics)
