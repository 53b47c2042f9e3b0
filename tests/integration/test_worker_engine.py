"""The worker with the real engine on a model of a hundred thousand parameters."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.db import Database
from core.states import JobStatus
from tests.factories import Tenant, make_file, make_job
from tests.fakes.bench import Bench, assert_no_holes, open_bench
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


@pytest.fixture
def bench(
    tmp_path: Path, owner_database: Database, tenant: Tenant, worker_url: str, redis_url: str
) -> Iterator[Bench]:
    with open_bench(
        tmp_path / "home",
        database=owner_database,
        tenant=tenant,
        worker_url=worker_url,
        redis_url=redis_url,
    ) as opened:
        make_tiny_model(opened.home / "models" / "tiny")
        yield opened


def test_a_job_trains_a_real_adapter(bench: Bench) -> None:
    with bench.database.begin() as tx:
        file = make_file(tx, bench.tenant, store=bench.store)
        job = make_job(tx, bench.tenant, hyperparameters=SETTINGS, file=file, model=TINY_MODEL_ID)

    done = bench.run_job(job, trainer_command=(sys.executable, "-m", "ppo_engine"))

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
