"""What users do to jobs: create, find, list, cancel, pause, resume.  Holders: `core/attempts.py`.

Each function takes the caller's transaction and never commits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Text,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)

from core import journal, models
from core.db import now
from core.dispatch import DEFAULT_QUEUE, NOTIFY_CHANNEL
from core.errors import CancelPending, InvalidCursor, JobAlreadyFinished, JobNotFound
from core.events import EventCode, NewEvent
from core.ids import public_job_id
from core.rows import Attempt, Checkpoint, Job, attempt_of, checkpoint_of, job_of
from core.spec import SPEC_VERSION
from core.states import FINAL, HELD, JobStatus, StopWanted

_job = models.job.c


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A checked request, ready to be stored."""

    tenant_id: UUID
    created_by: UUID
    spec: Mapping[str, Any]
    """`JobSpec.stored()`."""
    resolved: Mapping[str, Any]
    """`Resolved.to_dict()`."""
    model: str
    """Id of the base model, as the catalog writes it."""
    training_file_id: UUID
    validation_file_id: UUID | None = None
    method: str = "ppo"
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    start: Checkpoint | None = None
    """The checkpoint whose adapter it starts from; None for the bare base model."""
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    warnings: Sequence[Mapping[str, Any]] = ()
    """`{code, param, message}` each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs a list shows."""

    status: Sequence[JobStatus] = ()
    model: str | None = None
    method: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    has_no_metadata: bool = False
    created_after: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """Some jobs in order, and whether there are more."""

    jobs: list[Job]
    has_more: bool


def create(tx: Connection, new: NewJob) -> Job:
    """Store the job with its first event; the commit itself rings the dispatcher."""
    values = {
        "tenant_id": new.tenant_id,
        "created_by": new.created_by,
        "spec": dict(new.spec),
        "spec_version": SPEC_VERSION,
        "resolved": dict(new.resolved),
        "warnings": [dict(one) for one in new.warnings],
        "model": new.model,
        "method": new.method,
        "training_file_id": new.training_file_id,
        "validation_file_id": new.validation_file_id,
        "suffix": new.suffix,
        "seed": new.resolved["seed"],
        "metadata": None if new.metadata is None else dict(new.metadata),
        "start_job_id": new.start and new.start.job_id,
        "start_step": new.start and new.start.step,
        "start_attempt": new.start and new.start.attempt,
        "status": JobStatus.QUEUED,
        "queue": new.queue,
        "priority": new.priority,
        "total_steps": new.resolved["total_steps"],
        "last_seq": 1,
    }
    row = tx.execute(_INSERT, values).one()
    job = job_of(row._asdict())
    event = NewEvent(
        code=EventCode.JOB_CREATED,
        message="Created fine-tuning job: " + public_job_id(job.id),
        data={"from": None, "to": job.status.value},
    )
    _write(tx, job, [event])
    notify(tx, job.id)
    return job


def get(tx: Connection, job_id: UUID, *, tenant_id: UUID) -> Job:
    """The tenant's job; JobNotFound for another tenant's as for none."""
    row = tx.execute(_GET, {"job": job_id, "tenant": tenant_id}).one_or_none()
    if row is None:
        raise JobNotFound(f"There is no job {public_job_id(job_id)}.")
    return job_of(row._asdict())


# Built once: building takes longer than the database's answer.
_INSERT = insert(models.job).returning(models.job)
_GET = select(models.job).where(_job.id == bindparam("job"), _job.tenant_id == bindparam("tenant"))


def lock(tx: Connection, job_id: UUID, *, tenant_id: UUID) -> Job:
    """The tenant's job, which nobody else changes until the transaction ends."""
    tx.execute(
        select(_job.id).where(_job.id == job_id, _job.tenant_id == tenant_id).with_for_update()
    )
    return get(tx, job_id, tenant_id=tenant_id)


def page(
    tx: Connection,
    *,
    tenant_id: UUID,
    limit: int,
    after: UUID | None = None,
    order: Literal["asc", "desc"] = "desc",
    where: JobFilter | None = None,
) -> JobPage:
    """The tenant's jobs by creation time, beginning behind `after`; InvalidCursor if not theirs."""
    place = tuple_(_job.created_at, _job.id)
    conditions = [_job.tenant_id == tenant_id, *_conditions(where or JobFilter())]
    if after is not None:
        cursor = _cursor(tx, after, tenant_id)
        conditions.append(place < cursor if order == "desc" else place > cursor)
    ordering = (
        (_job.created_at.desc(), _job.id.desc())
        if order == "desc"
        else (_job.created_at.asc(), _job.id.asc())
    )
    rows = tx.execute(
        select(models.job).where(*conditions).order_by(*ordering).limit(limit + 1)
    ).all()
    return JobPage(jobs=[job_of(row._asdict()) for row in rows[:limit]], has_more=len(rows) > limit)


def _cursor(tx: Connection, after: UUID, tenant_id: UUID) -> Any:
    row = tx.execute(
        select(_job.created_at, _job.id).where(_job.id == after, _job.tenant_id == tenant_id)
    ).one_or_none()
    if row is None:
        raise InvalidCursor(f"after: there is no job {public_job_id(after)}", param="after")
    return tuple_(row.created_at, row.id)


def _conditions(where: JobFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if where.status:
        conditions.append(_job.status.in_([status.value for status in where.status]))
    if where.model is not None:
        conditions.append(_job.model == where.model)
    if where.method is not None:
        conditions.append(_job.method == where.method)
    if where.metadata:
        conditions.append(_job.metadata.contains(dict(where.metadata)))
    if where.has_no_metadata:
        conditions.append(_job.metadata.is_(None))
    if where.created_after is not None:
        conditions.append(_job.created_at > where.created_after)
    if where.created_before is not None:
        conditions.append(_job.created_at < where.created_before)
    return conditions


def cancel(tx: Connection, job_id: UUID, *, tenant_id: UUID) -> Job:
    """The job, cancelled at once or, if it is held, asked to stop; the same again if it is already.

    JobAlreadyFinished after success or failure.  From here on it never becomes `succeeded`.
    """
    is_held = _job.lease_until.is_not(None)
    row = tx.execute(
        update(models.job)
        .where(
            _job.id == job_id,
            _job.tenant_id == tenant_id,
            or_(
                _job.status.in_([JobStatus.QUEUED, JobStatus.PAUSED]),
                and_(_job.status.in_(HELD), _job.stop_wanted.is_distinct_from(StopWanted.CANCEL)),
            ),
        )
        .values(
            status=case((is_held, _job.status), else_=JobStatus.CANCELLED),
            stop_wanted=case((is_held, StopWanted.CANCEL), else_=None),
            stop_wanted_at=now(),
            finished_at=case((is_held, None), else_=now()),
            dispatched_at=case((is_held, _job.dispatched_at), else_=None),
            last_seq=_job.last_seq + 1,
        )
        .returning(models.job, literal_column("old.status").label("old_status"))
    ).one_or_none()
    if row is None:
        same = _after_no_change(tx, job_id, tenant_id, same=_SAME_ON_CANCEL, wish="cancel")
        return same or cancel(tx, job_id, tenant_id=tenant_id)
    fields = row._asdict()
    was = JobStatus(fields.pop("old_status"))
    job = job_of(fields)
    _write(tx, job, [_cancel_event(job, was)])
    return job


def _cancel_event(job: Job, was: JobStatus) -> NewEvent:
    if job.status == JobStatus.CANCELLED:
        return NewEvent(
            code=EventCode.JOB_CANCELLED,
            message="The job was cancelled while it was not running",
            step=job.step,
            data=_move(was, job.status, "cancel_requested"),
        )
    return NewEvent(
        code=EventCode.CANCEL_REQUESTED,
        message="Cancel requested; the job stops at the next step",
        step=job.step,
    )


def pause(tx: Connection, job_id: UUID, *, tenant_id: UUID) -> Job:
    """The job, paused at once if it waits, or asked to pause; the same again if it is already.

    A running job saves a checkpoint first.  JobAlreadyFinished at the end of a job, CancelPending
    while it is being cancelled.
    """
    waits = _job.status == JobStatus.QUEUED
    row = tx.execute(
        update(models.job)
        .where(
            _job.id == job_id,
            _job.tenant_id == tenant_id,
            or_(waits, and_(_job.status.in_(HELD), _job.stop_wanted.is_(None))),
        )
        .values(
            status=case((waits, JobStatus.PAUSED), else_=_job.status),
            stop_wanted=case((waits, None), else_=StopWanted.PAUSE),
            stop_wanted_at=now(),
            dispatched_at=case((waits, None), else_=_job.dispatched_at),
            last_seq=_job.last_seq + 1,
        )
        .returning(models.job)
    ).one_or_none()
    if row is None:
        same = _after_no_change(tx, job_id, tenant_id, same=_SAME_ON_PAUSE, wish="pause")
        return same or pause(tx, job_id, tenant_id=tenant_id)
    job = job_of(row._asdict())
    _write(tx, job, [_pause_event(job)])
    return job


def _pause_event(job: Job) -> NewEvent:
    if job.status == JobStatus.PAUSED:
        return NewEvent(
            code=EventCode.JOB_PAUSED,
            message="The job was paused while it waited",
            step=job.step,
            data=_move(JobStatus.QUEUED, job.status, "pause_requested"),
        )
    when = "it has saved a checkpoint" if job.status == JobStatus.RUNNING else "its files' check"
    return NewEvent(
        code=EventCode.PAUSE_REQUESTED,
        message=f"Pause requested; the job pauses after {when}",
        step=job.step,
    )


def resume(tx: Connection, job_id: UUID, *, tenant_id: UUID) -> Job:
    """The job, back in the queue if it was paused, or without the wish to pause it.

    The same again if it waits or runs.  It goes on from its newest checkpoint, its crashes are
    forgotten, and a limit that it had reached is granted once more.  JobAlreadyFinished at the end
    of a job, CancelPending while it is being cancelled.
    """
    rests = _job.status == JobStatus.PAUSED
    row = tx.execute(
        update(models.job)
        .where(
            _job.id == job_id,
            _job.tenant_id == tenant_id,
            or_(rests, and_(_job.status.in_(HELD), _job.stop_wanted == StopWanted.PAUSE)),
        )
        .values(
            status=case((rests, JobStatus.QUEUED), else_=_job.status),
            stop_wanted=None,
            stop_wanted_at=None,
            crashes=case((rests, 0), else_=_job.crashes),
            dispatched_at=case((rests, None), else_=_job.dispatched_at),
            not_before=case((rests, None), else_=_job.not_before),
            limit_reached=None,
            budget_from=case((_job.limit_reached.is_(None), _job.budget_from), else_=_job.usage),
            last_seq=_job.last_seq + 1,
        )
        .returning(models.job, literal_column("old.limit_reached").label("was_at_limit"))
    ).one_or_none()
    if row is None:
        same = _after_no_change(tx, job_id, tenant_id, same=_SAME_ON_RESUME, wish="resume")
        return same or resume(tx, job_id, tenant_id=tenant_id)
    fields = row._asdict()
    was_at_limit = fields.pop("was_at_limit")
    job = job_of(fields)
    _write(tx, job, [_resume_event(job, was_at_limit)])
    if job.status == JobStatus.QUEUED:
        notify(tx, job.id)
    return job


def _resume_event(job: Job, was_at_limit: str | None) -> NewEvent:
    again = f"; its {was_at_limit} counts anew from here" if was_at_limit else ""
    if job.status == JobStatus.QUEUED:
        return NewEvent(
            code=EventCode.JOB_QUEUED,
            message=f"The job was resumed; it goes on from its newest checkpoint{again}",
            step=job.step,
            data=_move(JobStatus.PAUSED, job.status, "resume_requested"),
        )
    return NewEvent(
        code=EventCode.PAUSE_WITHDRAWN,
        message=f"The pause was withdrawn; the job goes on{again}",
        step=job.step,
    )


_SAME_ON_CANCEL = frozenset({JobStatus.VALIDATING_FILES, JobStatus.RUNNING, JobStatus.CANCELLED})
_SAME_ON_PAUSE = frozenset({JobStatus.VALIDATING_FILES, JobStatus.RUNNING, JobStatus.PAUSED})
_SAME_ON_RESUME = frozenset({JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING})
"""States in which a wish that changed no row is fulfilled, or noted, already."""


def _after_no_change(
    tx: Connection,
    job_id: UUID,
    tenant_id: UUID,
    *,
    same: frozenset[JobStatus],
    wish: Literal["cancel", "pause", "resume"],
) -> Job | None:
    """The job that a wish left as it was; None if it has moved since and must be asked again.

    JobAlreadyFinished or CancelPending where the wish cannot be fulfilled.
    """
    job = get(tx, job_id, tenant_id=tenant_id)
    if wish != "cancel" and job.stop_wanted == StopWanted.CANCEL:
        raise CancelPending(f"The job is being cancelled; it is too late to {wish} it.")
    if job.status in same:
        return job
    if job.status not in FINAL:
        return None
    instead = (
        "start a new job with its checkpoint as `model`"
        if wish == "resume"
        else f"there is nothing to {wish}"
    )
    raise JobAlreadyFinished(f"The job has already {_ended(job)}; {instead}.")


def _move(was: JobStatus, now_is: JobStatus, reason: str) -> dict[str, Any]:
    return {"from": was.value, "to": now_is.value, "reason": reason}


def _ended(job: Job) -> str:
    return "been cancelled" if job.status == JobStatus.CANCELLED else job.status.value


def queue_position() -> ColumnElement[int | None]:
    """The place of a row of `job` among the queued ones of its queue; null unless it is queued."""
    ahead = models.job.alias("ahead").c
    goes_first = or_(
        ahead.priority > _job.priority,
        and_(ahead.priority == _job.priority, ahead.created_at < _job.created_at),
    )
    num_ahead = select(func.count()).where(
        ahead.status == JobStatus.QUEUED, ahead.queue == _job.queue, goes_first
    )
    position = num_ahead.correlate(models.job).scalar_subquery() + 1
    return case((_job.status == JobStatus.QUEUED, position), else_=None)


def attempts(tx: Connection, job_id: UUID) -> list[Attempt]:
    """All attempts of a job, first to last."""
    table = models.attempt
    rows = tx.execute(select(table).where(table.c.job_id == job_id).order_by(table.c.attempt)).all()
    return [attempt_of(row) for row in rows]


def checkpoints(tx: Connection, job_id: UUID) -> list[Checkpoint]:
    """All checkpoints of a job, newest first."""
    table = models.checkpoint
    rows = tx.execute(
        select(table)
        .where(table.c.job_id == job_id)
        .order_by(table.c.attempt.desc(), table.c.step.desc())
    ).all()
    return [checkpoint_of(row) for row in rows]


def notify(tx: Connection, job_id: UUID) -> None:
    """Ring the dispatcher when the transaction commits."""
    tx.execute(_NOTIFY, {"job": str(job_id)})


_NOTIFY = select(func.pg_notify(NOTIFY_CHANNEL, bindparam("job", type_=Text)))


def _write(tx: Connection, job: Job, events: Sequence[NewEvent]) -> None:
    place = journal.Place(
        job_id=job.id,
        tenant_id=job.tenant_id,
        attempt=job.attempt,
        first_seq=job.last_seq - len(events) + 1,
    )
    journal.write_items(tx, place, events)
