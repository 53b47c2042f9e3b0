"""One seeded run: jobs under real workers, dispatchers and servers, and faults until all are done.

Everything that dies is started again, as a supervisor of services would: workers and dispatchers
here, Postgres and Redis by their guard.  The seed draws the order of the faults, their victims and
the work done between two of them; what the operating system does in between stays its own.
"""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psutil

from core.states import FINAL
from tests.chaos.checker import Findings, check_jobs, check_processes
from tests.chaos.faults import PATIENCE_SECONDS, Fault, Injector, Worker, when_answered
from tests.chaos.report import Report
from tests.fakes.bench import Bench, bench_on, migrated_servers
from tests.fakes.waiting import wait_until
from trimtab.embedded import EmbeddedServers

NUM_WORKERS = 3
NUM_DISPATCHERS = 2
UNFINISHED = 5
"""So many jobs are kept waiting or running until the last fault is done."""
STEPS = (40, 100)
ROWS_BETWEEN = (4, 16)
"""Rows that jobs write between two faults."""
STEP_SECONDS = 0.05
QUIET_SECONDS = 180
"""Longest time that all jobs may take to end after the last fault."""


@dataclass(kw_only=True)
class Crew:
    """Workers and dispatchers, started again when they die."""

    bench: Bench
    workers: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)
    dispatchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _hired: int = 0

    def tend(self) -> None:
        """Replace whoever has ended."""
        self.workers = [one for one in self.workers if one[1].poll() is None]
        self.dispatchers = [one for one in self.dispatchers if one.poll() is None]
        while len(self.workers) < NUM_WORKERS:
            self._hired += 1
            label = f"worker-{self._hired}"
            self.workers.append((label, self.bench.start_worker(worker_label=label)))
        while len(self.dispatchers) < NUM_DISPATCHERS:
            self.dispatchers.append(self.bench.start_dispatcher(slots=NUM_WORKERS))

    def live_workers(self) -> list[Worker]:
        """Those that run now, after replacing who does not."""
        self.tend()
        return [
            Worker(label=label, process=psutil.Process(process.pid))
            for label, process in self.workers
            if process.poll() is None
        ]

    def live_dispatchers(self) -> list[psutil.Process]:
        """Those that run now, after replacing who does not."""
        self.tend()
        return [psutil.Process(one.pid) for one in self.dispatchers if one.poll() is None]

    def processes(self) -> list[psutil.Process]:
        """All of them."""
        return [*(one.process for one in self.live_workers()), *self.live_dispatchers()]

    def dismiss(self) -> Findings:
        """SIGTERM to all; who does not end is an orphan."""
        everyone = [*(process for _, process in self.workers), *self.dispatchers]
        for process in everyone:
            process.terminate()
        found = Findings()
        for process in everyone:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                found.orphans.append(f"{process.pid} {process.args} outlives SIGTERM")
        return found


def run_seed(home: Path, seed: int, *, rounds: int) -> Report:
    """Each fault so many times, in the seed's order, on running jobs; then the reckoning."""
    drawn = random.Random(seed)
    order = [fault for fault in Fault for _ in range(rounds)]
    drawn.shuffle(order)
    started = time.monotonic()
    with _own_bench(home) as (bench, servers):
        bench.plan(step_seconds=STEP_SECONDS)
        crew = Crew(bench=bench)
        injector = Injector(
            bench=bench,
            servers=servers,
            workers=crew.live_workers,
            dispatchers=crew.live_dispatchers,
            drawn=drawn,
        )
        steps_of: dict[UUID, int] = {}
        for fault in order:
            _post_jobs(bench, steps_of, drawn)
            injector.inject(fault)
            _let_work_go_on(injector, crew, drawn.randint(*ROWS_BETWEEN))
        findings = _settle(injector, crew, steps_of)
        attempts = [one for job_id in steps_of for one in bench.attempts(job_id)]
        return Report(
            seed=seed,
            seconds=time.monotonic() - started,
            landed=tuple(injector.landed),
            jobs=len(steps_of),
            attempts=len(attempts),
            ends=Counter(one.end_reason or "none" for one in attempts),
            findings=findings,
        )


@contextmanager
def _own_bench(home: Path) -> Iterator[tuple[Bench, EmbeddedServers]]:
    """A bench on servers of its own, which keep what they are told (fsync)."""
    with migrated_servers(home / "servers") as servers, bench_on(servers, home / "bench") as bench:
        yield bench, servers


def _post_jobs(bench: Bench, steps_of: dict[UUID, int], drawn: random.Random) -> None:
    """New jobs until enough are unfinished; what is posted is accepted from here on."""

    @when_answered
    def is_enough() -> bool:
        unfinished = [job for job in bench.all_jobs() if job.status not in FINAL]
        for _ in range(UNFINISHED - len(unfinished)):
            steps = drawn.randint(*STEPS)
            steps_of[bench.make_job(steps=steps).id] = steps
        return True

    wait_until(is_enough, seconds=PATIENCE_SECONDS)


def _let_work_go_on(injector: Injector, crew: Crew, rows: int) -> None:
    """Return once the servers answer and jobs have written so many more rows."""

    @when_answered
    def written() -> int:
        crew.tend()
        injector.ping()
        injector.wake_late_supervisors()
        return sum(job.last_seq for job in injector.bench.all_jobs())

    before = wait_until(written, seconds=PATIENCE_SECONDS)
    wait_until(lambda: (written() or 0) >= before + rows, seconds=PATIENCE_SECONDS)


def _settle(injector: Injector, crew: Crew, steps_of: Mapping[UUID, int]) -> Findings:
    """What is found once every job has ended, or has had time enough to."""
    bench = injector.bench

    @when_answered
    def all_ended() -> bool:
        crew.tend()
        injector.ping()
        injector.wake_late_supervisors()
        return not injector.stopped and all(job.status in FINAL for job in bench.all_jobs())

    try:
        wait_until(all_ended, seconds=QUIET_SECONDS)
        wait_until(lambda: not bench.trainers(), seconds=5)
    except AssertionError:
        pass  # the checks below say what has not ended
    findings = check_jobs(bench, steps_of)
    findings.add(check_processes(bench.home, crew.processes()))
    findings.add(crew.dismiss())
    findings.add(check_processes(bench.home, []))
    return findings
