"""The worker with the real engine on a model of a hundred thousand parameters."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from core import models
from core.ids import public_job_id
from core.rows import Checkpoint, Job
from core.states import JobStatus
from tests.factories import Tenant, make_file, make_job
from tests.fakes.bench import Bench, assert_no_holes
from tests.live_api import live_api
from tests.tiny_model import TINY_MODEL_ID, make_tiny_model

SETTINGS = {
    "max_steps": 3,
    "checkpoint_interval": 2,
    "batch_size": 4,
    "minibatches": 2,
    "max_prompt_tokens": 64,
    "max_response_tokens": 6,
    "lora": {"rank": 2, "alpha": 4},
    "stored_samples": 2,
}


REWARD = {
    "type": "length",
    "input": "{{sample.output_text}}",
    "unit": "chars",
    "target": 30.0,
    "tolerance": 60.0,
}
LEARNS = {"learning_rate": 1e-2, "reward_scaling": "none"}
"""Scaled by so small a deviation, these rewards would all be cut to the same."""


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """With a model that the real engine trains."""
    make_tiny_model(bench.home / "models" / "tiny")
    return bench


@pytest.fixture
def client(tmp_path: Path, api_url: str, redis_url: str, tenant: Tenant) -> Iterator[httpx2.Client]:
    """The owner of the bench's jobs, at an API over the same database."""
    with live_api(api_url, redis_url, tmp_path / "api") as api, api.client(tenant) as opened:
        yield opened


ENGINE = (sys.executable, "-m", "ppo_engine")
HELD_ENGINE = (sys.executable, str(Path(__file__).parents[1] / "fakes" / "held_engine.py"))
"""Goes no further than its first step; it stops there when it is asked to."""


def make_engine_job(bench: Bench, *, start: Checkpoint | None = None, **over: Any) -> Job:
    with bench.database.begin() as tx:
        file = make_file(tx, bench.tenant, store=bench.store)
        held_out = make_file(tx, bench.tenant, store=bench.store)
        job = make_job(
            tx,
            bench.tenant,
            hyperparameters=SETTINGS | LEARNS | over,
            file=file,
            model=TINY_MODEL_ID,
            validation_file_id=held_out.id,
            start=start,
        )
        # A random model's answers have no sentiment to learn from.
        resolved = {**job.resolved, "reward": REWARD}
        tx.execute(update(models.job).where(models.job.c.id == job.id).values(resolved=resolved))
    return bench.job(job.id)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_job_that_was_paused_and_resumed_ends_as_one_that_was_not(
    bench: Bench, client: httpx2.Client, precision: str
) -> None:
    """Weights and values, bit for bit; paused and resumed over HTTP."""
    settings = {
        "max_steps": 4,
        "checkpoint_interval": 100,
        "eval_interval": 2,
        "lr_schedule": "cosine",
        "kl_controller": "adaptive",
        "kl_horizon": 50,
        "precision": precision,
    }
    whole, paused = make_engine_job(bench, **settings), make_engine_job(bench, **settings)
    bench.run_job(whole, trainer_command=ENGINE)
    url = f"/v1/fine_tuning/jobs/{public_job_id(paused.id)}"
    answers: list[httpx2.Response] = []

    def pause_after_the_first_step() -> bool:
        if not answers and bench.job(paused.id).step >= 1:
            answers.append(client.post(f"{url}/pause"))
        return False

    rests = bench.run_job(
        paused,
        trainer_command=HELD_ENGINE,
        is_told_to_go=pause_after_the_first_step,
        pause_seconds=60.0,
    )
    answers.append(client.post(f"{url}/resume"))
    done = bench.run_job(paused, trainer_command=ENGINE)

    assert [answer.json()["status"] for answer in answers] == ["running", "queued"]
    assert (rests.status, done.status) == (JobStatus.PAUSED, JobStatus.SUCCEEDED)
    assert bench.attempts(paused.id)[1].resumed_from_step == rests.saved_step == 1
    adapters = [
        bench.artifacts(job.id)["adapter/adapter_model.safetensors"].sha256
        for job in (whole, paused)
    ]
    assert adapters[0] == adapters[1]
    assert values_of(bench, paused) == values_of(bench, whole)
    assert bench.curves(whole.id)[-1].values["kl_reference_per_sequence"] != 0  # it has learned
    assert "resume.not_identical" not in bench.codes(paused.id)


def test_a_job_that_starts_from_a_checkpoint_is_held_to_it(bench: Bench) -> None:
    source = make_engine_job(bench)
    bench.run_job(source, trainer_command=ENGINE)
    start = next(one for one in bench.checkpoints(source.id) if one.step == 2)
    assert start.adapter is not None
    # In its first step only the critic learns, so that the adapter must come out as it went in.
    still = make_engine_job(bench, start=start, max_steps=1, critic_warmup_steps=1)
    whole, paused = (make_engine_job(bench, start=start, checkpoint_interval=1) for _ in range(2))

    done = [bench.run_job(job, trainer_command=ENGINE) for job in (still, whole)]
    left = bench.run_job(
        paused,
        trainer_command=HELD_ENGINE,
        is_told_to_go=lambda: bench.job(paused.id).step >= 1,
        pause_seconds=60.0,
    )
    done.append(bench.run_job(paused, trainer_command=ENGINE))

    assert left.status is JobStatus.QUEUED
    assert [job.status for job in done] == [JobStatus.SUCCEEDED] * 3, done[0].error_message
    weights = [
        bench.artifacts(job.id)["adapter/adapter_model.safetensors"].sha256
        for job in (still, whole, paused)
    ]
    assert weights[0] == start.adapter.files["adapter_model.safetensors"] != weights[1]
    first, last = bench.curves(whole.id)[0], bench.curves(whole.id)[-1]
    assert first.values["kl_reference_per_sequence"] == 0
    assert last.values["kl_reference_per_sequence"] != 0
    assert weights[1] == weights[2]
    assert values_of(bench, paused) == values_of(bench, whole)


def test_what_the_first_attempt_measured_is_kept_by_the_next(
    bench: Bench, client: httpx2.Client
) -> None:
    job = make_engine_job(bench, checkpoint_interval=100)
    asked = job.resolved["hyperparameters"]
    url = f"/v1/fine_tuning/jobs/{public_job_id(job.id)}"
    pauses: list[httpx2.Response] = []

    def pause_after_the_first_step() -> bool:
        if not pauses and bench.job(job.id).step >= 1:
            pauses.append(client.post(f"{url}/pause"))
        return False

    rests = bench.run_job(
        job,
        trainer_command=HELD_ENGINE,
        is_told_to_go=pause_after_the_first_step,
        pause_seconds=60.0,
    )
    settings = rests.resolved["hyperparameters"]
    client.post(f"{url}/resume")
    done = bench.run_job(job, trainer_command=ENGINE)

    assert (asked["precision"], asked["micro_batch_size"]) == ("auto", "auto")
    assert settings["precision"] in ("fp32", "bf16")
    assert settings["micro_batch_size"] == 2  # the whole minibatch of so small a model
    assert settings == asked | {
        "precision": settings["precision"],
        "micro_batch_size": settings["micro_batch_size"],
    }
    assert (rests.status, done.status) == (JobStatus.PAUSED, JobStatus.SUCCEEDED)
    assert done.resolved == rests.resolved
    assert client.get(url).json()["resolved"]["micro_batch_size"] == 2
    assert bench.codes(job.id).count("settings.measured") == 1
    assert "resume.not_identical" not in bench.codes(job.id)


def values_of(bench: Bench, job: Job) -> list[dict[str, float | None]]:
    """The values of each step without those that measure time or memory."""
    timed = ("seconds.", "tokens_per_second", "peak_memory")
    return [
        {name: value for name, value in point.values.items() if not name.startswith(timed)}
        for point in bench.curves(job.id)
    ]


def test_a_job_trains_a_real_adapter(bench: Bench) -> None:
    with bench.database.begin() as tx:
        file = make_file(tx, bench.tenant, store=bench.store)
        job = make_job(tx, bench.tenant, hyperparameters=SETTINGS, file=file, model=TINY_MODEL_ID)

    done = bench.run_job(job, trainer_command=ENGINE)

    assert done.status is JobStatus.SUCCEEDED, done.error_message
    assert [point.step for point in bench.curves(job.id)] == [1, 2, 3]
    assert bench.curves(job.id)[0].values["kl_reference_per_sequence"] == 0
    assert {one.step for one in bench.checkpoints(job.id)} >= {2}
    assert done.usage["response_tokens"] > 0
    assert_no_holes(bench.feed(job.id), done)
    content = b"".join(bench.store.read(bench.artifacts(job.id)["adapter.tar"].uri))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        config = archive.extractfile("adapter_config.json")
        assert config is not None
        assert json.load(config)["peft_type"] == "LORA"
        assert archive.getmember("adapter_model.safetensors").size > 0
        assert {"README.md", "tokenizer.json", "chat_template.jinja"} <= set(archive.getnames())
