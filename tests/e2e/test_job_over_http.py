"""A real job on the real stack: `trimtab up`, HTTP, the engine, the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running_stack import JOB_SECONDS, RunningStack, uppercase_job
from tests.fakes.waiting import wait_until
from tests.tiny_model import TINY_MODEL_ID
from trimtab import model_cache
from trimtab.client import Client
from trimtab.demo import run_engine, sampling_run
from trimtab.errors import ApiError

FINAL = ("succeeded", "failed", "cancelled")


def post(client: Client, prompts: Path, **hyperparameters: Any) -> dict[str, Any]:
    spec = uppercase_job(TINY_MODEL_ID, **hyperparameters)
    return client.create_job({**spec, "training_file": client.upload(prompts)["id"]})


def ended(client: Client, job_id: str) -> dict[str, Any]:
    def final_job() -> dict[str, Any] | None:
        job = client.job(job_id)
        return job if job["status"] in FINAL else None

    return wait_until(final_job, seconds=JOB_SECONDS) or {}


def test_a_job_trains_streams_and_leaves_an_adapter_that_peft_loads(
    stack: RunningStack, prompts: Path, tiny_models: Path, tmp_path: Path
) -> None:
    with stack.client() as client:
        job = post(client, prompts)
        items = list(client.stream(job["id"]))
        job = client.job(job["id"])
        manifest = client.download(job["id"], tmp_path / "out")

    steps = [item["step"] for item in items if item["type"] == "metrics"]
    assert job["status"] == "succeeded", job["error"]
    assert steps == [1, 2, 3]
    assert [item["seq"] for item in items if "seq" in item] == sorted(
        {item["seq"] for item in items if "seq" in item}
    )
    assert items[-1]["type"] == "end"
    assert job["fine_tuned_model"].startswith(f"ft:{TINY_MODEL_ID}")
    paths = {file["path"] for file in manifest["files"]}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= paths
    answered = answers_of(job, tiny_models, tmp_path)
    assert answered["prompts"] == 8
    assert answered["adapter"] != answered["base"]


def answers_of(job: dict[str, Any], models: Path, folder: Path) -> dict[str, Any]:
    """The summary of a sampling run, which loads the adapter with peft."""
    run = sampling_run(
        job, model_cache.find(TINY_MODEL_ID, models), adapter=folder / "out" / "adapter"
    )
    run["samples_per_prompt"] = 2
    run["data"] = {"validation": str(folder / "prompts.jsonl")}
    (folder / "run.json").write_text(json.dumps(run))
    run_engine(folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_the_first_ratio_is_one_and_the_first_kl_zero(stack: RunningStack, prompts: Path) -> None:
    with stack.client() as client:
        job = ended(client, post(client, prompts, max_steps=1)["id"])
        passes = client._get(f"/v1/fine_tuning/jobs/{job['id']}/clip", {"detail": "passes"})
        metrics = client.metrics(job["id"])

    first = passes["data"][0]["passes"][0][0]
    assert (first["ratio_min"], first["ratio_max"]) == (1.0, 1.0)
    assert metrics["series"]["kl_reference_per_sequence"] == [0.0]


def test_two_jobs_posted_at_once_both_finish(stack: RunningStack, prompts: Path) -> None:
    with stack.client() as client:
        jobs = [post(client, prompts) for _ in range(2)]
        finished = [ended(client, job["id"]) for job in jobs]

    assert [job["status"] for job in finished] == ["succeeded", "succeeded"]
    assert finished[0]["id"] != finished[1]["id"]


def test_a_job_is_cancelled_while_it_trains(stack: RunningStack, prompts: Path) -> None:
    with stack.client() as client:
        job = post(client, prompts, max_steps=100_000)
        wait_until(lambda: client.job(job["id"])["progress"]["step"] >= 1, seconds=JOB_SECONDS)
        client.cancel(job["id"])
        job = ended(client, job["id"])

        assert job["status"] == "cancelled"
        assert client.cancel(job["id"])["status"] == "cancelled", "asked twice"


def test_a_finished_job_cannot_be_cancelled(stack: RunningStack, prompts: Path) -> None:
    with stack.client() as client:
        job = ended(client, post(client, prompts, max_steps=1)["id"])

        with pytest.raises(ApiError, match="job_already_finished"):
            client.cancel(job["id"])


def test_clipping_of_a_real_job_is_told_consistently(stack: RunningStack, prompts: Path) -> None:
    with stack.client() as client:
        job = ended(client, post(client, prompts, stored_samples=32, epochs=3)["id"])
        url = f"/v1/fine_tuning/jobs/{job['id']}"
        steps = {"from_step": "3", "to_step": "3"}
        (update,) = client._get(f"{url}/clip", {**steps, "detail": "buckets"})["data"]
        sweep = client._get(f"{url}/clip/sweep", steps)
        tokens = client._get(f"{url}/clip/tokens", {"step": "3", "limit": "1000"})
        diagnosis = client._get(f"{url}/diagnosis")

    own = next(point for point in sweep["data"] if point["is_own"])
    for name in ("policy_clip_fraction", "policy_clip_fraction_high", "policy_clip_fraction_low"):
        assert own[name] == update["summary"][name]
    assert sum(update["summary"]["counts"].values()) == update["summary"]["tokens"]
    by_position = update["buckets"]["position"]
    assert sum(each["tokens"] for each in by_position.values()) == update["summary"]["tokens"]
    # All responses are kept: their tokens, once per epoch, are the tokens of the step.
    assert 3 * len(tokens["data"]) == update["summary"]["tokens"]
    assert {token["epoch"] for token in tokens["data"]} == {2}
    assert diagnosis["level"] in ("ok", "warn", "critical")
    assert diagnosis["clip_verdict"]["sentence"]
    assert job["health"]["level"] == diagnosis["level"]


def test_a_guard_pauses_a_job_and_its_user_resumes_it(stack: RunningStack, prompts: Path) -> None:
    rule = {"signal": "entropy", "warn": -2.0, "critical": -1.0, "action": "pause", "cooldown": 9}
    with stack.client() as client:
        job = post(client, prompts, guards={"rules": [rule]})
        job = wait_until(
            lambda: (now := client.job(job["id"]))["status"] == "paused" and now,
            seconds=JOB_SECONDS,
        )
        paused_at = job["progress"]["step"]
        client.resume(job["id"])
        job = ended(client, job["id"])
        events = client.events(job["id"], limit=100)

    assert paused_at == 1
    assert job["status"] == "succeeded"
    assert job["resumed_from_step"] == 1
    assert any("A guard paused the job" in event["message"] for event in events)


def test_the_self_check_of_a_job_is_kept_with_it(stack: RunningStack, prompts: Path) -> None:
    with stack.client() as client:
        job = post(client, prompts)
        ended(client, job["id"])
        (event,) = [
            each
            for each in client.events(job["id"], limit=100)
            if each["code"] == "self_check.passed"
        ]

    assert event["data"]["log_ratio_abs_max"] == 0.0
    assert event["data"]["kl_reference_abs_max"] == 0.0
