"""A worker and all it needs, with the fake trainer in the trainer's place."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import text, update

from core import artifacts, feed, jobs, models
from core.artifacts import Artifact
from core.attempts import Holder
from core.db import Database
from core.events import FeedItem
from core.feed import MetricPoint
from core.models_catalog import ModelCatalog
from core.rows import Attempt, Checkpoint, Job
from core.states import FINAL, JobStatus
from core.storage import ArtifactStore
from migrations import commands
from migrations.roles import WORKER_ROLE
from tests.conftest import as_role
from tests.factories import MODEL, Tenant, make_file, make_job, make_tenant, prompt_lines
from tests.fakes.run_folder import fake_trainer_command, write_plan
from tests.fakes.trainer import reward_of, state_after
from tests.fakes.waiting import wait_until
from trimtab.embedded import EmbeddedServers
from worker import supervisor
from worker.settings import WorkerSettings
from worker.stream import FeedStream

ROOT = str(Path(__file__).parents[2])
"""Where the packages are, this one among them."""

SEED = 7
"""What `make_job` resolves a job without a seed to."""

ROWS = 8

FAST = {
    "tick_seconds": 0.05,
    "heartbeat_seconds": 0.3,
    "lease_seconds": 2.0,
    "pause_seconds": 5.0,
    "cancel_seconds": 1.0,
    "offline_seconds": 30.0,
}

FAST_DISPATCHER = {"redispatch_seconds": 1.0, "reap_seconds": 0.3}


@dataclass(kw_only=True)
class Bench:
    """Folders, databases and a plan for the fake trainer."""

    home: Path
    database: Database
    tenant: Tenant
    worker_url: str
    redis_url: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def plan_file(self) -> Path:
        return self.home / "plan.json"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.home / "artifacts")

    @property
    def scratch(self) -> Path:
        return self.home / "scratch"

    def plan(self, **plan: Any) -> None:
        """What fake trainers do from now on."""
        write_plan(self.plan_file, **plan)

    def settings(self, **over: Any) -> WorkerSettings:
        fields: dict[str, Any] = {
            "home": self.home,
            "database_url": SecretStr(self.worker_url),
            "redis_url": SecretStr(self.redis_url),
            "trainer_command": tuple(fake_trainer_command(self.plan_file)),
            "label": "bench",
            **FAST,
        }
        return WorkerSettings(**(fields | over))

    @contextmanager
    def parts(self, **over: Any) -> Iterator[supervisor.Parts]:
        """What a worker process has, in this process."""
        settings = self.settings(**over)
        database = Database(self.worker_url, pool_size=4)
        stream = FeedStream(self.redis_url)
        try:
            yield supervisor.Parts(
                settings=settings,
                database=database,
                stream=stream,
                store=self.store,
                catalog=ModelCatalog(settings.models),
            )
        finally:
            stream.close()
            database.dispose()

    def run_job(
        self,
        job: Job,
        *,
        is_told_to_go: Callable[[], bool] = lambda: False,
        **over: Any,
    ) -> Job:
        """The job after one attempt in this process."""
        with self.parts(**over) as parts:
            supervisor.run_job(parts, job.id, task_id="task", is_told_to_go=is_told_to_go)
        return self.job(job.id)

    def make_job(
        self,
        *,
        steps: int,
        checkpoint_interval: int = 2,
        hyperparameters: Mapping[str, Any] | None = None,
        **over: Any,
    ) -> Job:
        with self.database.begin() as tx:
            return make_job(
                tx,
                self.tenant,
                hyperparameters={
                    "max_steps": steps,
                    "checkpoint_interval": checkpoint_interval,
                    "batch_size": 8,
                    **(hyperparameters or {}),
                },
                file=make_file(tx, self.tenant, store=self.store, rows=ROWS),
                **over,
            )

    def job(self, job_id: UUID) -> Job:
        with self.database.begin() as tx:
            return jobs.get(tx, job_id, tenant_id=self.tenant.tenant_id)

    def forget_backoff(self) -> None:
        """Let queued jobs start again at once."""
        with self.database.begin() as tx:
            tx.execute(update(models.job).values(not_before=None))

    def all_jobs(self) -> list[Job]:
        """Every job of the tenant, newest first."""
        with self.database.begin() as tx:
            return jobs.page(tx, tenant_id=self.tenant.tenant_id, limit=1000).jobs

    @contextmanager
    def locked(self, table: str) -> Iterator[None]:
        """Nobody else can write to the table; held for as long as it takes."""
        url = self.database.engine.url.render_as_string(hide_password=False)
        patient = Database(url, pool_size=1, statement_timeout_seconds=120)
        with patient.begin() as tx:
            tx.execute(text(f"lock table {table} in exclusive mode"))
            yield
        patient.dispose()

    def cancel(self, job_id: UUID) -> Job:
        with self.database.begin() as tx:
            return jobs.cancel(tx, job_id, tenant_id=self.tenant.tenant_id)

    def feed(self, job_id: UUID) -> list[FeedItem]:
        with self.database.begin() as tx:
            return feed.after(tx, job_id, 0, limit=10_000)

    def codes(self, job_id: UUID) -> list[str]:
        """The codes of the job's events, in order."""
        return [item.code for item in self.feed(job_id) if item.kind == "event"]

    def curves(self, job_id: UUID) -> list[MetricPoint]:
        with self.database.begin() as tx:
            return feed.metrics(tx, job_id)

    def checkpoints(self, job_id: UUID) -> list[Checkpoint]:
        with self.database.begin() as tx:
            return jobs.checkpoints(tx, job_id)

    def attempts(self, job_id: UUID) -> list[Attempt]:
        with self.database.begin() as tx:
            return jobs.attempts(tx, job_id)

    def artifacts(self, job_id: UUID) -> dict[str, Artifact]:
        with self.database.begin() as tx:
            return {one.path: one for one in artifacts.of_job(tx, job_id)}

    def told_step(self, job_id: UUID, *, attempt: int) -> int:
        """The last step in the journal of an attempt's trainer, stored or not."""
        journal = self.scratch / str(job_id) / f"attempt-{attempt}" / "metrics.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        return max((one["step"] for one in lines if one["kind"] == "metrics"), default=0)

    def final_state(self, job_id: UUID) -> str:
        """The state in the published adapter."""
        artifact = self.artifacts(job_id)["adapter/adapter_model.safetensors"]
        return b"".join(self.store.read(artifact.uri)).decode()

    def environment(self, **over: Any) -> dict[str, str]:
        """The variables of a worker or dispatcher process."""
        fields = FAST | FAST_DISPATCHER | over
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(filter(None, (str(fields.pop("pythonpath", "")), ROOT))),
            "TRIMTAB_HOME": str(self.home),
            "TRIMTAB_LOG": "console",
            "DATABASE_URL": self.worker_url,
            "REDIS_URL": self.redis_url,
            "TRIMTAB_TRAINER_COMMAND": json.dumps(fake_trainer_command(self.plan_file)),
            **{f"TRIMTAB_{name.upper()}": str(value) for name, value in fields.items()},
        }

    def start(self, module: str, **over: Any) -> subprocess.Popen[bytes]:
        """`python -m <module>` as its own process, killed at the end of the test."""
        with (self.home / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=self.environment(**over),
                cwd=self.home,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def start_worker(self, **over: Any) -> subprocess.Popen[bytes]:
        return self.start("worker", **over)

    def start_dispatcher(self, **over: Any) -> subprocess.Popen[bytes]:
        return self.start("worker.dispatcher", **over)

    def wait_for_status(self, job_id: UUID, *wanted: JobStatus, seconds: float = 20) -> Job:
        """The job once it has one of these states."""

        def reached() -> Job | None:
            job = self.job(job_id)
            if job.status in FINAL and job.status not in wanted:
                raise AssertionError(f"{job.status}: {job.error_message}\n{self.logs()}")
            return job if job.status in wanted else None

        try:
            return wait_until(reached, seconds=seconds)
        except AssertionError as fault:
            raise AssertionError(f"{fault}\n{self.job(job_id)}\n{self.logs()}") from None

    def wait_for_step(self, job_id: UUID, step: int) -> None:
        wait_until(lambda: self.job(job_id).step >= step)

    def trainers(self) -> list[psutil.Process]:
        """The fake trainers of this bench that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.plan_file) in process.cmdline() and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-4000:]}" for path in self.home.glob("*.log")
        )

    def close(self) -> None:
        """End all processes of this bench."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        wait_until(lambda: not self.trainers(), seconds=5)


@contextmanager
def open_bench(
    home: Path, *, database: Database, tenant: Tenant, worker_url: str, redis_url: str
) -> Iterator[Bench]:
    """A bench with one base model; its processes end with it."""
    (home / "models" / "fake").mkdir(parents=True)
    card = {"id": MODEL, "sha256": "0" * 64, "context_length": 2048}
    (home / "models" / "fake" / "model.json").write_text(json.dumps(card))
    bench = Bench(
        home=home,
        database=database,
        tenant=tenant,
        worker_url=worker_url,
        redis_url=redis_url,
    )
    bench.plan()
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def bench(
    tmp_path: Path, owner_database: Database, tenant: Tenant, worker_url: str, redis_url: str
) -> Iterator[Bench]:
    """On the servers of the run."""
    with open_bench(
        tmp_path / "home",
        database=owner_database,
        tenant=tenant,
        worker_url=worker_url,
        redis_url=redis_url,
    ) as opened:
        yield opened


@contextmanager
def migrated_servers(home: Path) -> Iterator[EmbeddedServers]:
    """Servers of a test's own, which keep what they are told (fsync), with all tables."""
    servers = EmbeddedServers(home)
    try:
        with servers:
            points = servers.endpoints
            commands.upgrade(
                points.owner_url,
                api_password=SecretStr(points.api_password),
                worker_password=SecretStr(points.worker_password),
            )
            yield servers
    finally:
        servers.home.remove()


@contextmanager
def bench_on(servers: EmbeddedServers, home: Path) -> Iterator[Bench]:
    """A bench with a tenant of its own."""
    points = servers.endpoints
    database = Database(points.owner_url, pool_size=4)
    try:
        with open_bench(
            home,
            database=database,
            tenant=make_tenant(database),
            worker_url=as_role(points.owner_url, WORKER_ROLE, points.worker_password),
            redis_url=points.redis_url,
        ) as opened:
            yield opened
    finally:
        database.dispose()


def expected_state(steps: int) -> str:
    """The adapter of an uninterrupted run of a bench's job."""
    return state_after(steps, seed=SEED, training_file=prompt_lines(ROWS))


def expected_rewards(steps: int) -> list[float]:
    """The reward curve of an uninterrupted run of a bench's job."""
    return [reward_of(expected_state(step)) for step in range(1, steps + 1)]


def rewards(points: list[MetricPoint]) -> list[float | None]:
    """The reward curve that readers see."""
    return [point.values["reward_mean"] for point in points]


def assert_no_holes(items: list[FeedItem], job: Job) -> None:
    """The feed is numbered 1, 2, 3 ... up to what the job says."""
    assert [item.seq for item in items] == list(range(1, job.last_seq + 1))


def assert_as_if_uninterrupted(bench: Bench, done: Job, *, steps: int) -> None:
    """No step was lost or done twice, one adapter was published, the feed has no hole."""
    assert bench.final_state(done.id) == expected_state(steps)
    assert rewards(bench.curves(done.id)) == expected_rewards(steps)
    assert bench.codes(done.id).count("job.succeeded") == 1
    assert {one.attempt for one in bench.artifacts(done.id).values() if "adapter" in one.path} == {
        done.attempt
    }
    assert_no_holes(bench.feed(done.id), done)


def holder(job: Job) -> Holder:
    """The fence of the attempt that holds the job now."""
    return Holder(job_id=job.id, attempt=job.attempt)


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    """kill -9."""
    process.send_signal(signal.SIGKILL)


def pool_child(worker: subprocess.Popen[bytes]) -> psutil.Process:
    """The worker's process that runs tasks."""
    return one(psutil.Process(worker.pid).children())


def one(processes: list[psutil.Process]) -> psutil.Process:
    assert len(processes) == 1, processes
    return processes[0]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
