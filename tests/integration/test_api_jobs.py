"""Jobs over HTTP: create, look up, list, cancel, and everything that is refused."""

import time
from typing import Any

import httpx2
import pytest

from core import attempts
from core.attempts import Holder, claim
from core.db import Database
from core.ids import job_id_of
from core.states import Phase
from tests.factories import MODEL, TTL, make_tenant, metric, spec_dict
from tests.live_api import ALIAS, LiveApi, create_job, job_body, upload

JOBS = "/v1/fine_tuning/jobs"
UNKNOWN_JOB = "ftjob-" + "0" * 32
UNKNOWN_FILE = "file-" + "0" * 32


def run(worker_database: Database, job: dict[str, Any]) -> Holder:
    """Make the job run, as a worker would."""
    with worker_database.begin() as tx:
        held = claim(tx, job_id_of(job["id"]), task_id=job["id"], worker_label="tester", ttl=TTL)
        assert held is not None
        attempts.record_resume(tx, held.holder, step=0)
    return held.holder


def test_a_new_job_is_queued_and_echoes_the_request(client: httpx2.Client) -> None:
    body = job_body(client, clip_range=0.3) | {"suffix": "mine", "metadata": {"team": "a"}}

    answer = client.post(JOBS, json=body)

    job = answer.json()
    assert answer.status_code == 200
    assert answer.headers["Location"] == f"{JOBS}/{job['id']}"
    assert job["object"] == "fine_tuning.job"
    assert job["status"] == "queued"
    assert job["model"] == MODEL
    assert job["method"] == body["method"]
    assert job["training_file"] == body["training_file"]
    assert job["metadata"] == {"team": "a"}
    assert job["resolved"]["clip_range"] == 0.3
    assert job["resolved"]["epochs"] == 2
    assert job["queue"] == {"position": 1}
    assert job["phase"] == "waiting"
    assert job["result_files"] == []
    assert job["error"] is None
    assert client.get(answer.headers["Location"]).json()["id"] == job["id"]


def test_an_alias_names_the_same_model(client: httpx2.Client) -> None:
    body = job_body(client) | {"model": ALIAS}

    assert client.post(JOBS, json=body).json()["model"] == MODEL


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt-7"}, 400, "model_not_found", "model"),
        ({"training_file": UNKNOWN_FILE}, 400, "file_not_found", "training_file"),
        ({"training_file": "nonsense"}, 400, "file_not_found", "training_file"),
        ({"validation_file": UNKNOWN_FILE}, 400, "file_not_found", "validation_file"),
        ({"status": "succeeded"}, 400, "unknown_parameter", "status"),
        ({"seed": "7"}, 400, "invalid_type", "seed"),
        ({"seed": -1}, 400, "integer_below_min_value", "seed"),
        ({"suffix": "a b"}, 400, "invalid_value", "suffix"),
        ({"method": {"type": "dpo", "dpo": {}}}, 400, "method_not_supported", "method.type"),
        ({"metadata": {"a": "\u0000"}}, 400, "invalid_value", None),
    ],
)
def test_a_faulty_field_is_named(
    client: httpx2.Client, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = client.post(JOBS, json=job_body(client) | change)

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["param"] == param
    assert client.get(JOBS).json()["data"] == []


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "decimal_below_min_value"),
        (-0.1, "decimal_below_min_value"),
        (1, "decimal_above_max_value"),
        (1.5, "decimal_above_max_value"),
        ("wide", "invalid_type"),
    ],
)
def test_a_clip_range_outside_0_and_1_is_refused(
    client: httpx2.Client, value: object, code: str
) -> None:
    answer = client.post(JOBS, json=job_body(client, clip_range=value))

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == "method.ppo.hyperparameters.clip_range"
    assert error["code"].partition("_")[2] == code.partition("_")[2]


@pytest.mark.parametrize(
    ("reward", "code", "param"),
    [
        ({"type": "praise"}, "invalid_value", "method.ppo.reward.type"),
        ({}, "missing_required_parameter", "method.ppo.reward.type"),
        ({"type": "python", "source": "1"}, "grader_not_supported", "method.ppo.reward.type"),
        ({"type": "regex", "pattern": "("}, "invalid_grader", "method.ppo.reward.pattern"),
        (
            {"type": "sentiment", "input": "{{sample.nonsense}}"},
            "invalid_grader",
            "method.ppo.reward.input",
        ),
    ],
)
def test_an_unknown_or_broken_reward_is_refused(
    client: httpx2.Client, reward: dict[str, Any], code: str, param: str
) -> None:
    body = job_body(client)
    body["method"]["ppo"]["reward"] = reward

    answer = client.post(JOBS, json=body)

    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_all_faults_are_told_at_once(client: httpx2.Client) -> None:
    body = job_body(client, clip_range=2, gamma=0) | {"colour": "red"}

    answer = client.post(JOBS, json=body).json()

    pointers = {fault["pointer"] for fault in answer["errors"]}
    assert pointers == {
        "/method/ppo/hyperparameters/clip_range",
        "/method/ppo/hyperparameters/gamma",
        "/colour",
    }


def test_a_missing_field_is_told(client: httpx2.Client) -> None:
    body = job_body(client)
    del body["training_file"]

    answer = client.post(JOBS, json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "missing_required_parameter"
    assert answer.json()["error"]["param"] == "training_file"


def test_another_tenants_file_is_as_absent(
    api: LiveApi, client: httpx2.Client, owner_database: Database
) -> None:
    with api.client(make_tenant(owner_database)) as other:
        foreign = upload(other)["id"]

    answer = client.post(JOBS, json=spec_dict() | {"training_file": foreign})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_not_found")


def test_a_file_with_bad_lines_lists_them_all(client: httpx2.Client) -> None:
    file = upload(client, b'{"prompt": "fine"}\n{broken\n{"prompt": ""}\n[1]\n')

    answer = client.post(JOBS, json=spec_dict() | {"training_file": file["id"]})

    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (400, "invalid_training_file")
    assert body["error"]["param"] == "training_file"
    assert [fault["line"] for fault in body["errors"]] == [2, 3, 4]
    assert "empty_prompt" in body["errors"][1]["detail"]


def test_a_bad_validation_file_has_its_own_code(client: httpx2.Client) -> None:
    bad = upload(client, b"[]\n")

    answer = client.post(JOBS, json=job_body(client) | {"validation_file": bad["id"]})

    assert answer.json()["error"]["code"] == "invalid_validation_file"


def test_a_file_of_another_purpose_is_refused(client: httpx2.Client) -> None:
    other = upload(client, b"anything", purpose="user_data")

    answer = client.post(JOBS, json=spec_dict() | {"training_file": other["id"]})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file_purpose")


def test_prompt_and_response_must_fit_the_models_context(client: httpx2.Client) -> None:
    answer = client.post(JOBS, json=job_body(client, max_response_tokens=2048))

    assert answer.json()["error"]["code"] == "invalid_combination"
    assert len(answer.json()["errors"]) == 2


def test_unusual_settings_come_back_as_warnings(client: httpx2.Client) -> None:
    job = create_job(client, epochs=1, minibatches=1, lora={"rank": 32})

    assert {each["code"] for each in job["warnings"]} == {
        "clip_inactive",
        "rank_above_serving_default",
    }


def test_pages_walk_over_all_jobs_once(client: httpx2.Client) -> None:
    made = [create_job(client)["id"] for _ in range(5)]

    seen: list[str] = []
    page = client.get(JOBS, params={"limit": 2}).json()
    while True:
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        page = client.get(JOBS, params={"limit": 2, "after": page["last_id"]}).json()

    assert seen == made[::-1]


def test_the_next_page_is_linked(client: httpx2.Client) -> None:
    made = [create_job(client)["id"] for _ in range(3)]

    first = client.get(JOBS, params={"limit": 2, "order": "asc"})
    following = client.get(first.links["next"]["url"])

    assert [job["id"] for job in following.json()["data"]] == made[2:]
    assert "next" not in following.links


def test_filters_choose_jobs(client: httpx2.Client) -> None:
    file = upload(client)["id"]
    plain, red, _ = (
        client.post(JOBS, json=spec_dict() | {"training_file": file, "metadata": labels}).json()
        for labels in (None, {"colour": "red"}, {"colour": "blue"})
    )
    client.post(f"{JOBS}/{red['id']}/cancel")

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"{JOBS}?{query}").json()["data"]]

    assert found("metadata[colour]=red") == [red["id"]]
    assert found("metadata=null") == [plain["id"]]
    assert found("status[]=cancelled&status[]=failed") == [red["id"]]
    assert found("status=cancelled") == [red["id"]]
    assert len(found("status=cancelled&status=queued")) == 3
    assert found("model=other") == []
    assert found(f"created_before={plain['created_at']}") == []


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=101", "integer_above_max_value", "limit"),
        ("limit=-1", "integer_below_min_value", "limit"),
        ("limit=ten", "invalid_type", "limit"),
        ("order=up", "invalid_value", "order"),
        ("status=done", "invalid_value", "status.0"),
        ("limt=3", "unknown_parameter", "limt"),
        ("limit=1&limit=2", "conflicting_parameters", "limit"),
        (f"after={UNKNOWN_JOB}", "invalid_cursor", "after"),
        ("after=nonsense", "invalid_cursor", "after"),
        ("model=%00", "invalid_value", None),
    ],
)
def test_a_faulty_query_is_named(
    client: httpx2.Client, query: str, code: str, param: str | None
) -> None:
    answer = client.get(f"{JOBS}?{query}")

    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_a_misspelt_parameter_gets_the_nearest_name(client: httpx2.Client) -> None:
    assert "'limit'" in client.get(f"{JOBS}?limt=3").json()["detail"]


def test_limit_0_is_an_empty_page(client: httpx2.Client) -> None:
    create_job(client)

    assert client.get(f"{JOBS}?limit=0").json()["data"] == []


def test_an_unchanged_job_is_304(client: httpx2.Client) -> None:
    job = create_job(client)
    first = client.get(f"{JOBS}/{job['id']}")

    again = client.get(f"{JOBS}/{job['id']}", headers={"If-None-Match": first.headers["ETag"]})

    assert again.status_code == 304
    assert again.content == b""


def test_a_waiting_get_returns_when_the_status_changes(
    client: httpx2.Client, worker_database: Database
) -> None:
    job = create_job(client)
    run(worker_database, job)
    before = client.get(f"{JOBS}/{job['id']}")
    started = time.monotonic()

    client.post(f"{JOBS}/{job['id']}/cancel")
    answer = client.get(
        f"{JOBS}/{job['id']}",
        headers={"Prefer": "wait=20", "If-None-Match": before.headers["ETag"]},
    )

    assert answer.json()["phase"] == "cancelling"
    assert answer.headers["Preference-Applied"] == "wait=20"
    assert time.monotonic() - started < 10


def test_a_waiting_get_gives_up_in_time(client: httpx2.Client) -> None:
    job = create_job(client)
    tag = client.get(f"{JOBS}/{job['id']}").headers["ETag"]

    answer = client.get(f"{JOBS}/{job['id']}", headers={"Prefer": "wait=1", "If-None-Match": tag})

    assert answer.status_code == 304


def test_jobs_say_when_to_ask_again(client: httpx2.Client) -> None:
    job = create_job(client)

    assert client.get(f"{JOBS}/{job['id']}").headers["Retry-After"] == "5"
    client.post(f"{JOBS}/{job['id']}/cancel")
    assert "Retry-After" not in client.get(f"{JOBS}/{job['id']}").headers


def test_a_running_job_shows_its_progress(client: httpx2.Client, worker_database: Database) -> None:
    job = create_job(client, max_steps=10, batch_size=8)
    holder = run(worker_database, job)
    report = attempts.Report(
        items=tuple(
            metric(n, n, reward_mean=n / 10, entropy=None, response_tokens=100.0 * n)
            for n in (1, 2, 3)
        )
    )
    with worker_database.begin() as tx:
        attempts.heartbeat(tx, holder, ttl=TTL, phase=Phase.TRAINING, step=3, report=report)

    shown = client.get(f"{JOBS}/{job['id']}").json()

    assert shown["status"] == "running"
    assert shown["phase"] == "training"
    assert shown["attempt"] == 1
    assert shown["worker"] == "tester"
    assert shown["progress"] == {
        "step": 3,
        "total_steps": 10,
        "fraction": 0.3,
        "generated_tokens": 300,
        "seconds_per_step": 1.0,
    }
    assert shown["latest"]["reward_mean"] == 0.3
    assert shown["latest"]["policy_clip_fraction"] is None
    assert shown["queue"] is None


def test_cancel_ends_a_waiting_job_at_once(client: httpx2.Client) -> None:
    job = create_job(client)

    answer = client.post(f"{JOBS}/{job['id']}/cancel")

    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    assert answer.json()["cancel_requested_at"] is not None
    assert client.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "cancelled"


def test_cancel_asks_a_running_job_to_stop(
    client: httpx2.Client, worker_database: Database
) -> None:
    job = create_job(client)
    run(worker_database, job)

    shown = client.post(f"{JOBS}/{job['id']}/cancel").json()

    assert (shown["status"], shown["phase"]) == ("running", "cancelling")


def test_cancel_of_a_finished_job_is_a_permanent_conflict(
    client: httpx2.Client, worker_database: Database
) -> None:
    job = create_job(client)
    holder = run(worker_database, job)
    with worker_database.begin() as tx:
        attempts.finish(tx, holder, fine_tuned_model="ft:x", artifacts=())

    answer = client.post(f"{JOBS}/{job['id']}/cancel")

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_already_finished")
    assert answer.headers["x-should-retry"] == "false"


def test_cancel_with_an_old_tag_is_refused(
    client: httpx2.Client, worker_database: Database
) -> None:
    job = create_job(client)
    tag = client.get(f"{JOBS}/{job['id']}").headers["ETag"]
    run(worker_database, job)

    answer = client.post(f"{JOBS}/{job['id']}/cancel", headers={"If-Match": tag})

    assert (answer.status_code, answer.json()["error"]["code"]) == (412, "precondition_failed")
    assert client.get(f"{JOBS}/{job['id']}").json()["phase"] != "cancelling"


@pytest.mark.parametrize("job_id", [UNKNOWN_JOB, "nonsense", "ftjob-", "ftjob-%00"])
def test_an_unknown_job_is_404(client: httpx2.Client, job_id: str) -> None:
    answer = client.get(f"{JOBS}/{job_id}")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
