"""The faults of a chaos run: what each does to real processes, and which jobs it hit.

A fault lands on running work: it is only done while a job is `running` under a live trainer, and
for faults of one worker the job is that worker's.
"""

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar
from uuid import UUID

import psutil
import redis
from sqlalchemy.exc import OperationalError

from core.errors import DatabaseUnavailable
from core.rows import Job
from core.states import JobStatus, Phase
from tests.fakes.bench import Bench
from tests.fakes.waiting import wait_until
from trimtab.embedded import EmbeddedServers

T = TypeVar("T")

PATIENCE_SECONDS = 180
"""Longest wait for running work; a machine that has better things to do is no fault."""


class Fault(StrEnum):
    """Kinds of fault."""

    KILL_TRAINER = "kill -9 trainer"
    KILL_POOL_CHILD = "kill -9 pool child"
    KILL_WORKER = "kill -9 worker"
    TERM_WORKER = "SIGTERM worker"
    STOP_SUPERVISOR = "SIGSTOP supervisor beyond the lease, SIGCONT"
    KILL_DISPATCHER = "kill -9 dispatcher"
    KILL_REDIS = "kill -9 Redis"
    WIPE_REDIS = "Redis wiped"
    KILL_POSTGRES = "kill -9 Postgres"
    RESTART_POSTGRES = "Postgres restarted"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker process and what people see as its name."""

    label: str
    process: psutil.Process

    @property
    def pool_child(self) -> psutil.Process | None:
        """The process that runs its tasks."""
        try:
            children = self.process.children()
        except psutil.NoSuchProcess:
            return None
        return children[0] if children else None


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A running job with the processes that work on it."""

    job: Job
    worker: Worker
    child: psutil.Process
    trainer: psutil.Process


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A fault that was done, and the jobs that were running under it."""

    fault: Fault
    hit: tuple[UUID, ...]


def when_answered(question: Callable[[], T]) -> Callable[[], T | None]:
    """The same question; None while Postgres or Redis are away."""

    def ask() -> T | None:
        try:
            return question()
        except (DatabaseUnavailable, OperationalError, redis.RedisError):
            return None

    return ask


@dataclass(kw_only=True)
class Injector:
    """Does faults to the processes of one bench and its servers."""

    bench: Bench
    servers: EmbeddedServers
    workers: Callable[[], Sequence[Worker]]
    dispatchers: Callable[[], Sequence[psutil.Process]]
    drawn: random.Random
    landed: list[Landed] = field(default_factory=list)
    stopped: list[tuple[psutil.Process, Job]] = field(default_factory=list)
    """Supervisors that are stopped, with the job that each held."""

    def inject(self, fault: Fault) -> None:
        """Do the fault as soon as there is running work for it to hit."""
        victims = wait_until(when_answered(lambda: self._victims(fault)), seconds=PATIENCE_SECONDS)
        victim = self.drawn.choice(victims)
        hit = [victim.job.id]
        match fault:
            case Fault.KILL_TRAINER:
                victim.trainer.kill()
            case Fault.KILL_POOL_CHILD:
                victim.child.kill()
            case Fault.KILL_WORKER:
                victim.worker.process.kill()
            case Fault.TERM_WORKER:
                victim.worker.process.terminate()
            case Fault.STOP_SUPERVISOR:
                victim.child.suspend()
                self.stopped.append((victim.child, victim.job))
            case _:
                hit = [one.job.id for one in victims]
                self._hit_servers(fault)
        self.landed.append(Landed(fault=fault, hit=tuple(hit)))

    def _hit_servers(self, fault: Fault) -> None:
        points = self.servers.endpoints
        match fault:
            case Fault.KILL_DISPATCHER:
                self.drawn.choice(self.dispatchers()).kill()
            case Fault.KILL_REDIS:
                os.kill(points.valkey_pid, signal.SIGKILL)
            case Fault.WIPE_REDIS:
                with redis.Redis.from_url(points.redis_admin_url) as admin:
                    admin.flushall()
            case Fault.KILL_POSTGRES:
                os.kill(points.postgres_pid, signal.SIGKILL)
            case Fault.RESTART_POSTGRES:
                os.kill(points.postgres_pid, signal.SIGINT)
            case _:
                raise AssertionError(fault)

    def wake_late_supervisors(self) -> None:
        """SIGCONT to each stopped supervisor whose job was taken from it meanwhile."""
        for child, job in list(self.stopped):
            now = self.bench.job(job.id)
            if now.attempt != job.attempt or now.status is not JobStatus.RUNNING:
                self.stopped.remove((child, job))
                try:
                    child.resume()
                except psutil.NoSuchProcess:
                    continue

    def ping(self) -> None:
        """Raise unless Redis answers; Postgres is asked by everything else."""
        with redis.Redis.from_url(self.servers.endpoints.redis_admin_url) as admin:
            admin.ping()

    def _victims(self, fault: Fault) -> list[Victim]:
        self.ping()
        self.wake_late_supervisors()
        found = [one for worker in self.workers() if (one := self._victim_of(worker))]
        if fault in _CRASHES:
            # Three crashes without a new checkpoint end a job: that is a promise, not a loss.
            found = [one for one in found if _may_crash(one.job)]
        return found

    def _victim_of(self, worker: Worker) -> Victim | None:
        """The job that this worker holds now, while its trainer is at work."""
        child = worker.pool_child
        held = [one for one in self.bench.all_jobs() if one.worker_label == worker.label]
        running = [
            one for one in held if one.status is JobStatus.RUNNING and one.phase == Phase.TRAINING
        ]
        if child is None or len(running) != 1 or self._is_stopped(child):
            return None
        try:
            trainers = [one for one in child.children() if one.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return None
        if len(trainers) != 1:
            return None
        return Victim(job=running[0], worker=worker, child=child, trainer=trainers[0])

    def _is_stopped(self, child: psutil.Process) -> bool:
        return any(child.pid == stopped.pid for stopped, _ in self.stopped)


_CRASHES = frozenset(
    {Fault.KILL_TRAINER, Fault.KILL_POOL_CHILD, Fault.KILL_WORKER, Fault.STOP_SUPERVISOR}
)


def _may_crash(job: Job) -> bool:
    return job.crashes == 0 or job.saved_step > job.crash_step
