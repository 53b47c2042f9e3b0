"""What the holder of a job writes: claim, heartbeat, checkpoint, finish, release; reap, dispatch.

Every write of a holder names its attempt (the fence).  Who lost the job changes no row and gets
AttemptLost.  Each function takes the caller's transaction and never commits.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Interval,
    Row,
    and_,
    case,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql

from core import best_checkpoint, journal, limits, models
from core.adapter_tar import StoredAdapter
from core.db import now
from core.errors import AttemptLost
from core.events import EventCode, FeedItem, Level, NewEvent, Report
from core.hyperparameters import MEASURED
from core.jobs import notify
from core.rows import Checkpoint, Job, checkpoint_of, job_of
from core.states import FINAL, HELD, JobStatus, Phase, StopWanted

MAX_CRASHES = 3
"""So many crashes without a new checkpoint in between end a job."""

PAUSED_BY_GUARD = "paused_by_guard"
"""Reason of a release when a guard, not the user, paused the job."""
TOO_MANY_CRASHES = "too_many_crashes"
"""The job's error after them, unless the last one has a better name."""

FIRST_BACKOFF = timedelta(seconds=5)
"""Pause after the first crash; doubled with each further one."""

LONGEST_BACKOFF = timedelta(minutes=5)

NOTHING = Report()

_job = models.job.c
_attempt = models.attempt.c
_checkpoint = models.checkpoint.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The fence: which attempt of which job is writing."""

    job_id: UUID
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job that is now held."""

    holder: Holder
    job: Job
    """The row as the claim left it."""
    items: list[FeedItem]
    """What readers see of the claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The answer to a heartbeat."""

    stop_wanted: StopWanted | None
    finish_wanted: bool
    """A limit says that the job is to end with what there is."""
    items: list[FeedItem]
    """The rows just written, with their numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCheckpoint:
    """A checkpoint whose files are complete in the artifact store."""

    step: int
    uri: str
    manifest_sha256: str
    bytes: int
    adapter: StoredAdapter
    is_good: bool
    """Whether the run was healthy then; only such ones may be the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewArtifact:
    """A result whose bytes are complete in the artifact store."""

    path: str
    role: str
    media_type: str
    uri: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why a job failed, as its owner reads it."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    job_id: UUID
    attempt: int
    status: JobStatus
    """Where the job stands now."""
    items: list[FeedItem]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Release:
    """What an end of an attempt does to the row, before a wanted stop has its say."""

    columns: Mapping[str, Any]
    reason: str
    exit_code: int | None
    event: NewEvent
    """What is told if the job goes back to the queue or fails."""


def claim(
    tx: Connection, job_id: UUID, *, task_id: str, worker_label: str, ttl: timedelta
) -> Claim | None:
    """The job, now running under a new attempt number; None if there is nothing to claim."""
    row = tx.execute(
        update(models.job)
        .where(
            _job.id == job_id,
            _job.status == JobStatus.QUEUED,
            func.coalesce(_job.not_before, _long_ago()) <= now(),
        )
        .values(
            status=JobStatus.RUNNING,
            phase=Phase.STARTING,
            attempt=_job.attempt + 1,
            lease_until=now() + ttl,
            claim_key=task_id,
            worker_label=worker_label,
            started_at=func.coalesce(_job.started_at, now()),
            last_seq=_job.last_seq + 1,
        )
        .returning(models.job)
    ).one_or_none()
    if row is None:
        return None
    job = job_of(row._asdict())
    tx.execute(
        insert(models.attempt).values(
            job_id=job.id,
            attempt=job.attempt,
            tenant_id=job.tenant_id,
            kind="train",
            worker_label=worker_label,
        )
    )
    event = NewEvent(
        code=EventCode.JOB_CLAIMED,
        message=f"Attempt {job.attempt} started on {worker_label}",
        data={"from": JobStatus.QUEUED.value, "to": job.status.value, "worker": worker_label},
    )
    return Claim(
        holder=Holder(job_id=job.id, attempt=job.attempt),
        job=job,
        items=journal.write_items(tx, _place(job, 1), [event]),
    )


def heartbeat(
    tx: Connection,
    holder: Holder,
    *,
    ttl: timedelta,
    phase: Phase,
    step: int = 0,
    report: Report = NOTHING,
    usage: Mapping[str, Any] | None = None,
) -> Beat:
    """Extend the lease and store what the trainer told, all or nothing; AttemptLost if not held.

    Lines stored before are left out, so a heartbeat whose answer was lost can be repeated.
    """
    report = _unseen(tx, holder, report)
    job = _extend(tx, holder, report, ttl=ttl, phase=phase, step=step, usage=usage)
    _keep_measured(tx, holder, report)
    return _beat(tx, job, _write_report(tx, job, report))


def _keep_measured(tx: Connection, holder: Holder, report: Report) -> None:
    """What the trainer found out about its machine becomes the job's own, for later attempts."""
    for item in report.items:
        if isinstance(item, NewEvent) and item.code is EventCode.SETTINGS_MEASURED:
            query = select(_job.resolved).where(_job.id == holder.job_id)
            resolved = tx.execute(query).scalar_one()
            record_resolved(tx, holder, with_measured(resolved, item.data))


def with_measured(resolved: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what was left to the machine."""
    measured = {name: found[name] for name in MEASURED if name in found}
    return {**resolved, "hyperparameters": {**resolved["hyperparameters"], **measured}}


def checkpoint(
    tx: Connection,
    holder: Holder,
    new: NewCheckpoint,
    *,
    ttl: timedelta,
    phase: Phase = Phase.TRAINING,
    report: Report = NOTHING,
    usage: Mapping[str, Any] | None = None,
) -> Beat:
    """Make the checkpoint exist, with every row reported before it; AttemptLost if not held.

    The same checkpoint twice is stored once.
    """
    report = _unseen(tx, holder, report)
    if _is_stored(tx, holder, new.step):
        job = _extend(tx, holder, report, ttl=ttl, phase=phase, step=new.step, usage=usage)
        return _beat(tx, job, _write_report(tx, job, report))
    job = _extend(tx, holder, report, ttl=ttl, phase=phase, step=new.step, usage=usage)
    items = _write_report(tx, job, report)
    score = best_checkpoint.score_at(tx, job, new.step) if new.is_good else None
    tx.execute(
        update(models.job)
        .where(_job.id == job.id)
        .values(saved_step=func.greatest(_job.saved_step, new.step))
    )
    tx.execute(
        insert(models.checkpoint).values(
            job_id=job.id,
            step=new.step,
            attempt=holder.attempt,
            tenant_id=job.tenant_id,
            uri=new.uri,
            manifest_sha256=new.manifest_sha256,
            bytes=new.bytes,
            score=score,
            adapter=new.adapter.to_dict(),
        )
    )
    best_checkpoint.choose(tx, job.id)
    event = NewEvent(
        code=EventCode.CHECKPOINT_SAVED,
        message=f"Checkpoint saved at step {new.step}",
        step=new.step,
        data={"bytes": new.bytes, "manifest_sha256": new.manifest_sha256, "score": score},
    )
    job = _add_numbers(tx, holder, 1)
    return _beat(tx, job, [*items, *journal.write_items(tx, _place(job, 1), [event])])


def record_resume(tx: Connection, holder: Holder, *, step: int) -> list[FeedItem]:
    """Note the step this attempt goes on from; later steps of earlier attempts are hidden.

    Call it once, before the first metric; 0 is a start from the beginning.
    """
    job = _add_numbers(tx, holder, 1 if step else 0)
    tx.execute(
        update(models.attempt)
        .where(_attempt.job_id == holder.job_id, _attempt.attempt == holder.attempt)
        .values(resumed_from_step=step)
    )
    if not step:
        return []
    event = NewEvent(
        code=EventCode.JOB_RESUMED,
        message=f"Resumed from the checkpoint of step {step}",
        step=step,
        data={"resumed_from_step": step},
    )
    return journal.write_items(tx, _place(job, 1), [event])


def record_resolved(tx: Connection, holder: Holder, resolved: Mapping[str, Any]) -> None:
    """Keep settings that were measured at the first attempt for all later ones."""
    row = tx.execute(
        update(models.job)
        .where(*_fence(holder))
        .values(resolved=dict(resolved), total_steps=resolved["total_steps"])
        .returning(_job.id)
    ).one_or_none()
    if row is None:
        raise AttemptLost


def resumable(tx: Connection, job_id: UUID) -> list[Checkpoint]:
    """Checkpoints to resume from, the most promising first."""
    rows = tx.execute(
        select(models.checkpoint)
        .where(_checkpoint.job_id == job_id, _checkpoint.resumable)
        .order_by(_checkpoint.step.desc(), _checkpoint.attempt.desc())
    ).all()
    return [checkpoint_of(row) for row in rows]


def prune_checkpoints(tx: Connection, holder: Holder, *, keep: int = 3) -> list[Checkpoint]:
    """Give up all but the newest checkpoints and the best; those given up, for their files' end.

    Rows first: what is deleted of their files once this is committed can no longer be resumed.
    """
    _lock(tx, holder)
    newest = (
        select(_checkpoint.step, _checkpoint.attempt)
        .where(_checkpoint.job_id == holder.job_id, _checkpoint.resumable)
        .order_by(_checkpoint.step.desc(), _checkpoint.attempt.desc())
        .limit(keep)
    ).subquery()
    is_new = (
        select(literal(1))
        .where(newest.c.step == _checkpoint.step, newest.c.attempt == _checkpoint.attempt)
        .exists()
    )
    rows = tx.execute(
        update(models.checkpoint)
        .where(
            _checkpoint.job_id == holder.job_id,
            _checkpoint.resumable,
            _checkpoint.best.is_(False),
            ~is_new,
        )
        .values(resumable=False)
        .returning(models.checkpoint)
    ).all()
    return [checkpoint_of(row) for row in rows]


def give_up_checkpoint(
    tx: Connection, holder: Holder, bad: Checkpoint, *, reason: str
) -> list[FeedItem]:
    """Never resume from this checkpoint again; the event says why."""
    job = _add_numbers(tx, holder, 1)
    tx.execute(
        update(models.checkpoint)
        .where(
            _checkpoint.job_id == bad.job_id,
            _checkpoint.step == bad.step,
            _checkpoint.attempt == bad.attempt,
        )
        .values(resumable=False)
    )
    best_checkpoint.choose(tx, bad.job_id)
    event = NewEvent(
        code=EventCode.CHECKPOINT_CORRUPT,
        level="warn",
        message=f"The checkpoint of step {bad.step} cannot be used: {reason}",
        step=bad.step,
        data={"attempt": bad.attempt},
    )
    return journal.write_items(tx, _place(job, 1), [event])


def store_artifacts(tx: Connection, holder: Holder, artifacts: Sequence[NewArtifact]) -> None:
    """Make files of a running job fetchable, such as sampled answers; AttemptLost if not held."""
    _upsert_artifacts(tx, _add_numbers(tx, holder, 0), artifacts)


def finish(
    tx: Connection,
    holder: Holder,
    *,
    artifacts: Sequence[NewArtifact],
    fine_tuned_model: str,
    report: Report = NOTHING,
    usage: Mapping[str, Any] | None = None,
) -> Ended:
    """End the job: `succeeded` with its artifacts, or `cancelled` without if that was wanted.

    Repeated after a lost answer it returns what the first call did.  AttemptLost if not held:
    roll back and delete the files.
    """
    if earlier := _own_end(tx, holder, "finished"):
        return earlier
    report = _unseen(tx, holder, report)
    row = tx.execute(
        update(models.job)
        .where(*_fence(holder))
        .values(
            status=case(
                (_is_wanted(StopWanted.CANCEL), JobStatus.CANCELLED), else_=JobStatus.SUCCEEDED
            ),
            fine_tuned_model=case((_is_wanted(StopWanted.CANCEL), None), else_=fine_tuned_model),
            phase=None,
            lease_until=None,
            stop_wanted=None,
            finished_at=now(),
            last_seq=_job.last_seq + len(report.items) + 1,
            **({"usage": dict(usage)} if usage else {}),
        )
        .returning(models.job, literal_column("old.stop_wanted").label("stop_was_wanted"))
    ).one_or_none()
    if row is None:
        raise AttemptLost
    fields = row._asdict()
    was_to_pause = fields.pop("stop_was_wanted") == StopWanted.PAUSE
    job = job_of(fields)
    event = _end_event(job, "finished")
    if was_to_pause:
        event = replace(event, message=f"{event.message}, before it could be paused")
    items = _write_report(tx, job, replace(report, items=(*report.items, event)))
    if job.status == JobStatus.SUCCEEDED:
        _upsert_artifacts(tx, job, artifacts)
    _end_attempt(tx, job, reason="finished", exit_code=0)
    return Ended(job_id=job.id, attempt=job.attempt, status=job.status, items=items)


def release(
    tx: Connection,
    holder: Holder,
    *,
    reason: str = "worker_stopped",
    exit_code: int | None = None,
    report: Report = NOTHING,
    to: JobStatus = JobStatus.QUEUED,
) -> Ended:
    """Hand the job back without blame: `cancelled` or `paused` if that is wanted, else `to`."""
    event = NewEvent(
        code=EventCode.WORKER_STOPPED,
        message="The attempt stopped in good order; the job waits for the next worker",
    )
    way = _Release(
        columns={"status": _wanted_status(to)},
        reason=reason,
        exit_code=exit_code,
        event=event,
    )
    return _end(tx, holder, way, report)


def release_crash(
    tx: Connection,
    holder: Holder,
    *,
    reason: str,
    message: str = "",
    exit_code: int | None = None,
    error_code: str = TOO_MANY_CRASHES,
    report: Report = NOTHING,
    backoff: timedelta = FIRST_BACKOFF,
) -> Ended:
    """Hand the job back after a crash: `queued` with a pause, or `failed` after three in a row.

    In a row: without a checkpoint stored in between.  A wanted cancel or pause comes first.
    `error_code` is the job's error if this was the last crash.
    """
    crashes = case((_job.saved_step > _job.crash_step, 1), else_=_job.crashes + 1)
    is_last = crashes >= MAX_CRASHES
    told = message or reason
    columns = {
        "status": case(
            (_is_wanted(StopWanted.CANCEL), JobStatus.CANCELLED),
            (is_last, JobStatus.FAILED),
            (_is_wanted(StopWanted.PAUSE), JobStatus.PAUSED),
            else_=JobStatus.QUEUED,
        ),
        "crashes": crashes,
        "crash_step": _job.saved_step,
        "not_before": now() + _backoff(crashes, backoff),
        **_error_if(
            and_(is_last, ~_is_wanted(StopWanted.CANCEL)),
            JobError(
                code=error_code,
                message=f"The job crashed {MAX_CRASHES} times without a new checkpoint; "
                f"the last time: {told}",
            ),
        ),
    }
    is_lease = reason == "lease_expired"
    event = NewEvent(
        code=EventCode.LEASE_EXPIRED if is_lease else EventCode.JOB_QUEUED,
        level="warn",
        message=f"The attempt ended early ({told}); the job will be tried again",
    )
    way = _Release(columns=columns, reason=reason, exit_code=exit_code, event=event)
    return _end(tx, holder, way, report)


def fail(
    tx: Connection,
    holder: Holder,
    error: JobError,
    *,
    exit_code: int | None = None,
    report: Report = NOTHING,
) -> Ended:
    """End the job as `failed`, or as `cancelled` if that was wanted; no further try."""
    is_failed = ~_is_wanted(StopWanted.CANCEL)
    columns = {
        "status": case((is_failed, JobStatus.FAILED), else_=JobStatus.CANCELLED),
        **_error_if(is_failed, error),
    }
    event = NewEvent(code=EventCode.JOB_FAILED, level="error", message=error.message)
    way = _Release(columns=columns, reason=error.code, exit_code=exit_code, event=event)
    return _end(tx, holder, way, report)


def release_claim(tx: Connection, task_id: str, *, message: str = "") -> Ended | None:
    """Release, as a crash, whatever the Celery task of this id still holds; None if nothing."""
    row = tx.execute(
        select(_job.id, _job.attempt)
        .where(_job.claim_key == task_id, _job.lease_until.is_not(None))
        .with_for_update()
    ).one_or_none()
    if row is None:
        return None
    holder = Holder(job_id=row.id, attempt=row.attempt)
    return release_crash(tx, holder, reason="worker_lost", message=message)


def reap(tx: Connection, *, ttl: timedelta, limit: int = 100) -> list[Ended]:
    """Release every job whose lease has run out, unless Postgres itself came up too recently."""
    uptime = func.now() - func.pg_postmaster_start_time()
    rows = tx.execute(
        select(_job.id, _job.attempt)
        .where(_job.lease_until < now(), uptime > ttl)
        .with_for_update(skip_locked=True)
        .limit(limit)
    ).all()
    return [
        release_crash(
            tx,
            Holder(job_id=row.id, attempt=row.attempt),
            reason="lease_expired",
            message="the worker has not been heard of",
        )
        for row in rows
    ]


def rung(tx: Connection, *, queue: str) -> int:
    """Waiting jobs whose doorbell was rung; if the Celery list holds fewer, some were lost."""
    return int(
        tx.execute(
            select(func.count()).where(
                _job.status == JobStatus.QUEUED,
                _job.queue == queue,
                _job.dispatched_at.is_not(None),
                func.coalesce(_job.not_before, _long_ago()) <= now(),
            )
        ).scalar_one()
    )


def dispatch(
    tx: Connection, *, queue: str, room: int, is_missing: bool, redispatch: timedelta
) -> list[UUID]:
    """Jobs whose doorbell is to be rung now, best first; they count as rung on commit.

    `is_missing` says that doorbells got lost: then jobs rung longer than `redispatch` ago come too.
    """
    never = _job.dispatched_at.is_(None)
    lost = and_(literal(is_missing), _job.dispatched_at < now() - redispatch)
    ids = list(
        tx.execute(
            select(_job.id)
            .where(
                _job.status == JobStatus.QUEUED,
                _job.queue == queue,
                func.coalesce(_job.not_before, _long_ago()) <= now(),
                or_(never, lost),
            )
            .order_by(_job.priority.desc(), _job.created_at)
            .limit(max(0, room))
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if ids:
        tx.execute(update(models.job).where(_job.id.in_(ids)).values(dispatched_at=now()))
    return ids


# The parts of the statements.


def _beat(tx: Connection, job: Job, items: list[FeedItem]) -> Beat:
    """The answer to a heartbeat, with the usage just stored held against the job's limits."""
    allowed = limits.limits_of(job.spec)
    if allowed is not None and job.limit_reached is None:
        reached = limits.reached(allowed, job.usage, job.budget_from)
        if reached is not None:
            job, told = _note_limit(tx, job, reached, on_limit=allowed.on_limit)
            items = [*items, *told]
    return Beat(
        stop_wanted=job.stop_wanted,
        finish_wanted=limits.wants_finish(job.spec, job.limit_reached),
        items=items,
    )


def _note_limit(
    tx: Connection, job: Job, reached: limits.Reached, *, on_limit: str
) -> tuple[Job, list[FeedItem]]:
    """The job, now to be paused unless it is to finish or is being cancelled; and the event."""
    columns: dict[str, Any] = {}
    if on_limit == "pause":
        columns = {
            "stop_wanted": func.coalesce(_job.stop_wanted, StopWanted.PAUSE),
            "stop_wanted_at": func.coalesce(_job.stop_wanted_at, now()),
        }
    row = tx.execute(
        update(models.job)
        .where(_job.id == job.id)  # the statement before holds the row
        .values(limit_reached=reached.name, last_seq=_job.last_seq + 1, **columns)
        .returning(models.job)
    ).one()
    job = job_of(row._asdict())
    then = "is paused" if on_limit == "pause" else "ends with what there is"
    event = NewEvent(
        code=EventCode.LIMIT_REACHED,
        level="warn",
        message=f"{reached.name} is reached: {reached.used:g} of {reached.limit}; the job {then}",
        step=job.step,
        data={
            "limit": reached.name,
            "value": reached.limit,
            "used": reached.used,
            "on_limit": on_limit,
        },
    )
    return job, journal.write_items(tx, _place(job, 1), [event])


def _fence(holder: Holder) -> tuple[ColumnElement[bool], ...]:
    return (
        _job.id == holder.job_id,
        _job.attempt == holder.attempt,
        _job.lease_until.is_not(None),
        _job.status.in_(HELD),
    )


def _long_ago() -> ColumnElement[datetime]:
    return literal_column("'-infinity'::timestamptz")


def _is_wanted(stop: StopWanted) -> ColumnElement[bool]:
    return func.coalesce(_job.stop_wanted == stop, literal(value=False))


def _wanted_status(otherwise: JobStatus) -> ColumnElement[str]:
    return case(
        (_is_wanted(StopWanted.CANCEL), JobStatus.CANCELLED),
        (_is_wanted(StopWanted.PAUSE), JobStatus.PAUSED),
        else_=otherwise,
    )


def _backoff(crashes: ColumnElement[int], first: timedelta) -> ColumnElement[timedelta]:
    """First pause doubled per crash, at most five minutes, spread by a quarter either way."""
    doubled = first.total_seconds() * func.power(2.0, crashes - 1)
    longest = literal(LONGEST_BACKOFF.total_seconds())
    seconds = func.least(doubled, longest) * (0.75 + func.random() * 0.5)
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds, type_=Interval)


def _error_if(condition: ColumnElement[bool], error: JobError) -> dict[str, ColumnElement[Any]]:
    return {
        "error_code": case((condition, error.code), else_=_job.error_code),
        "error_message": case((condition, error.message), else_=_job.error_message),
        "error_param": case((condition, error.param), else_=_job.error_param),
    }


def _place(job: Job, count: int) -> journal.Place:
    """The last `count` numbers drawn in this transaction."""
    return journal.Place(
        job_id=job.id,
        tenant_id=job.tenant_id,
        attempt=job.attempt,
        first_seq=job.last_seq - count + 1,
    )


def _lock(tx: Connection, holder: Holder) -> None:
    row = tx.execute(select(_job.id).where(*_fence(holder)).with_for_update()).one_or_none()
    if row is None:
        raise AttemptLost


def _unseen(tx: Connection, holder: Holder, report: Report) -> Report:
    """The report without lines stored before; holds the row, so that nothing comes between."""
    if not report.items and not report.passes:
        return report
    _lock(tx, holder)
    last = tx.execute(
        select(_attempt.last_line).where(
            _attempt.job_id == holder.job_id, _attempt.attempt == holder.attempt
        )
    ).scalar_one()
    return Report(
        items=tuple(one for one in report.items if one.line is None or one.line > last),
        passes=tuple(one for one in report.passes if one.line > last),
    )


def _extend(
    tx: Connection,
    holder: Holder,
    report: Report,
    *,
    ttl: timedelta,
    phase: Phase,
    step: int,
    usage: Mapping[str, Any] | None,
) -> Job:
    row = tx.execute(
        update(models.job)
        .where(*_fence(holder))
        .values(
            lease_until=now() + ttl,
            phase=phase,
            step=func.greatest(_job.step, step),
            last_seq=_job.last_seq + len(report.items),
            **({"usage": dict(usage)} if usage else {}),
        )
        .returning(models.job)
    ).one_or_none()
    return _held(row)


def _add_numbers(tx: Connection, holder: Holder, count: int) -> Job:
    row = tx.execute(
        update(models.job)
        .where(*_fence(holder))
        .values(last_seq=_job.last_seq + count)
        .returning(models.job)
    ).one_or_none()
    return _held(row)


def _held(row: Row[Any] | None) -> Job:
    if row is None:
        raise AttemptLost
    return job_of(row._asdict())


def _is_stored(tx: Connection, holder: Holder, step: int) -> bool:
    _lock(tx, holder)
    row = tx.execute(
        select(_checkpoint.step).where(
            _checkpoint.job_id == holder.job_id,
            _checkpoint.attempt == holder.attempt,
            _checkpoint.step == step,
        )
    ).one_or_none()
    return row is not None


def _write_report(tx: Connection, job: Job, report: Report) -> list[FeedItem]:
    place = _place(job, len(report.items))
    items = journal.write_items(tx, place, report.items)
    journal.write_passes(tx, place, report.passes)
    lines = [one.line for one in (*report.items, *report.passes) if one.line is not None]
    if lines:
        tx.execute(
            update(models.attempt)
            .where(_attempt.job_id == job.id, _attempt.attempt == job.attempt)
            .values(last_line=max(lines))
        )
    return items


def _end(tx: Connection, holder: Holder, way: _Release, report: Report) -> Ended:
    if earlier := _own_end(tx, holder, way.reason):
        return earlier
    report = _unseen(tx, holder, report)
    columns = dict(way.columns)
    status = columns.pop("status")
    row = tx.execute(
        update(models.job)
        .where(*_fence(holder))
        .values(
            status=status,
            finished_at=case((status.in_(FINAL), now()), else_=None),
            phase=None,
            lease_until=None,
            stop_wanted=None,
            dispatched_at=None,
            last_seq=_job.last_seq + len(report.items) + 1,
            **columns,
        )
        .returning(models.job)
    ).one_or_none()
    job = _held(row)
    event = _released_event(job, way)
    items = _write_report(tx, job, replace(report, items=(*report.items, event)))
    _end_attempt(tx, job, reason=way.reason, exit_code=way.exit_code)
    if job.status == JobStatus.QUEUED:
        notify(tx, job.id)
    return Ended(job_id=job.id, attempt=job.attempt, status=job.status, items=items)


def _own_end(tx: Connection, holder: Holder, reason: str) -> Ended | None:
    """How this attempt ended, if just this end is stored: the answer was lost on the way."""
    row = tx.execute(
        select(_attempt.end_status).where(
            _attempt.job_id == holder.job_id,
            _attempt.attempt == holder.attempt,
            _attempt.end_reason == reason,
        )
    ).one_or_none()
    if row is None:
        return None
    return Ended(
        job_id=holder.job_id,
        attempt=holder.attempt,
        status=JobStatus(row.end_status),
        items=[],
    )


def _end_attempt(tx: Connection, job: Job, *, reason: str, exit_code: int | None) -> None:
    tx.execute(
        update(models.attempt)
        .where(_attempt.job_id == job.id, _attempt.attempt == job.attempt)
        .values(ended_at=now(), end_reason=reason, end_status=job.status, exit_code=exit_code)
    )


def _released_event(job: Job, way: _Release) -> NewEvent:
    """A job that goes on tells the way of its release; one that ends, or rests, tells the end."""
    if job.status == JobStatus.QUEUED:
        data = {"from": JobStatus.RUNNING.value, "to": job.status.value, "reason": way.reason}
        return replace(way.event, step=job.step, data=data)
    return _end_event(job, way.reason)


_END_CODES: dict[JobStatus, tuple[EventCode, Level, str]] = {
    JobStatus.SUCCEEDED: (EventCode.JOB_SUCCEEDED, "info", "The job has been completed"),
    JobStatus.CANCELLED: (EventCode.JOB_CANCELLED, "info", "The job was cancelled"),
    JobStatus.PAUSED: (EventCode.JOB_PAUSED, "info", "The job is paused"),
    JobStatus.FAILED: (EventCode.JOB_FAILED, "error", "The job failed"),
}


def _end_event(job: Job, reason: str) -> NewEvent:
    code, level, message = _END_CODES[job.status]
    if job.status == JobStatus.FAILED and job.error_message:
        message = f"{message}: {job.error_message}"
    if job.status == JobStatus.PAUSED and reason == PAUSED_BY_GUARD:
        level, message = "warn", "A guard paused the job; its diagnosis says why"
    elif job.status == JobStatus.PAUSED and job.limit_reached:
        reason = "limit_reached"
        message = f"The job is paused at its {job.limit_reached}; a resume grants that once more"
    elif job.status == JobStatus.SUCCEEDED and _is_cut_short(job):
        reason = "limit_reached"
        message = f"The job was completed at its {job.limit_reached}, with what there was"
    data = {"from": JobStatus.RUNNING.value, "to": job.status.value, "reason": reason}
    if job.error_code:
        data["error_code"] = job.error_code
    return NewEvent(code=code, level=level, message=message, step=job.step, data=data)


def _is_cut_short(job: Job) -> bool:
    return job.step < job.total_steps and limits.wants_finish(job.spec, job.limit_reached)


def _upsert_artifacts(tx: Connection, job: Job, artifacts: Sequence[NewArtifact]) -> None:
    """One row per path; a path is taken over only by the same or a later attempt."""
    table = models.artifact
    for one in artifacts:
        fields = dataclasses.asdict(one) | {"attempt": job.attempt}
        statement = postgresql.insert(table).values(
            job_id=job.id, tenant_id=job.tenant_id, **fields
        )
        tx.execute(
            statement.on_conflict_do_update(
                index_elements=[table.c.job_id, table.c.path],
                set_=fields,
                where=table.c.attempt <= job.attempt,
            )
        )
