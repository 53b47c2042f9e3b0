"""What must hold once the faults are over: each promise counted by how often it was broken."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psutil

from core.events import FeedItem
from core.rows import Job
from core.states import FINAL, JobStatus
from core.storage import sha256_of
from tests.fakes.bench import Bench, expected_rewards, expected_state, rewards

ADAPTER = "adapter/adapter_model.safetensors"
END_CODES = frozenset(
    {"job.queued", "lease.expired", "worker.stopped", "job.succeeded", "job.failed"}
)
"""Events that end an attempt: no row of it may follow."""


@dataclass(kw_only=True)
class Findings:
    """Broken promises, by kind; each a sentence that names the job."""

    lost: list[str] = field(default_factory=list)
    """Accepted jobs without their right end."""
    duplicated: list[str] = field(default_factory=list)
    """Ends, results or steps that are there twice."""
    wrong_hashes: list[str] = field(default_factory=list)
    """Results that an uninterrupted run would not have made, or that are damaged."""
    feed_holes: list[str] = field(default_factory=list)
    """Numbers missing from what a client sees."""
    late_rows: list[str] = field(default_factory=list)
    """Rows of an attempt after its end."""
    orphans: list[str] = field(default_factory=list)
    """Processes that belong to nobody any more."""

    def counts(self) -> dict[str, int]:
        """How often each promise was broken."""
        return {one.name: len(getattr(self, one.name)) for one in dataclasses.fields(self)}

    def sentences(self) -> list[str]:
        """All of them, for people."""
        return [
            f"{one.name}: {sentence}"
            for one in dataclasses.fields(self)
            for sentence in getattr(self, one.name)
        ]

    def add(self, other: "Findings") -> None:
        """Take in what another look has found."""
        for one in dataclasses.fields(self):
            getattr(self, one.name).extend(getattr(other, one.name))


def check_jobs(bench: Bench, steps_of: Mapping[UUID, int]) -> Findings:
    """What became of these jobs, which nobody cancelled and whose trainers can end well."""
    found = Findings()
    for job_id, steps in steps_of.items():
        _check_job(bench, bench.job(job_id), steps, found)
    return found


def _check_job(bench: Bench, job: Job, steps: int, found: Findings) -> None:
    feed = bench.feed(job.id)
    if [item.seq for item in feed] != list(range(1, job.last_seq + 1)):
        found.feed_holes.append(f"{job.id} has {len(feed)} of {job.last_seq} numbers")
    found.late_rows += _late_rows(job, feed)
    found.duplicated += _double_results(bench, job)
    if job.status is not JobStatus.SUCCEEDED:
        why = job.error_message or ("no end" if job.status not in FINAL else "")
        found.lost.append(f"{job.id} is {job.status}: {why}")
        return
    ends = [item.code for item in feed if item.code in {"job.succeeded", "job.failed"}]
    if ends != ["job.succeeded"]:
        found.duplicated.append(f"{job.id} ended as {ends}")
    _check_result(bench, job, steps, found)


def _late_rows(job: Job, feed: Sequence[FeedItem]) -> list[str]:
    """Rows that an attempt wrote after its end, or after the next one had begun."""
    late: list[str] = []
    newest, ended = 0, set[int]()
    for item in feed:
        is_of_a_worker = item.attempt > 0 and item.code != "job.cancel_requested"
        if is_of_a_worker and (item.attempt < newest or item.attempt in ended):
            late.append(f"{job.id}: number {item.seq} is of attempt {item.attempt}")
        newest = max(newest, item.attempt)
        if item.code in END_CODES:
            ended.add(item.attempt)
    return late


def _double_results(bench: Bench, job: Job) -> list[str]:
    """Steps that readers see twice, and results of another attempt than the one that won."""
    steps = Counter(point.step for point in bench.curves(job.id))
    doubles = [f"{job.id}: step {step} is there twice" for step, n in steps.items() if n > 1]
    makers = {one.attempt for one in bench.artifacts(job.id).values() if "adapter" in one.path}
    if makers - {job.attempt}:
        doubles.append(f"{job.id}: attempts {sorted(makers)} published, {job.attempt} won")
    return doubles


def _check_result(bench: Bench, job: Job, steps: int, found: Findings) -> None:
    artifacts = bench.artifacts(job.id)
    if ADAPTER not in artifacts:
        found.lost.append(f"{job.id} has no adapter")
        return
    for artifact in artifacts.values():
        path = bench.store.root / artifact.uri
        if not path.is_file() or sha256_of(path) != artifact.sha256:
            found.wrong_hashes.append(f"{job.id}: {artifact.path} is not what its row says")
    if bench.final_state(job.id) != expected_state(steps):
        found.wrong_hashes.append(f"{job.id}: its adapter is of another run")
    if rewards(bench.curves(job.id)) != expected_rewards(steps):
        found.wrong_hashes.append(f"{job.id}: its curve is of another run")


def check_processes(home: Path, owned: Sequence[psutil.Process]) -> Findings:
    """Processes that work in this home and are neither ours nor a child of ours."""
    known = {one.pid for parent in owned for one in _with_children(parent)}
    orphans = [one for one in processes_of(home) if one.pid not in known]
    return Findings(orphans=[_described(one) for one in orphans])


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process whose working directory lies in this home: workers, dispatchers, trainers."""
    found = []
    for process in psutil.process_iter():
        try:
            is_here = Path(process.cwd()).is_relative_to(home)
            if is_here and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()[-3:])}"
    except psutil.Error:
        return str(process.pid)
