"""From rows to answers.  Pure: no database, no request."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from api import schemas
from api.queries import JobFacts
from core.adapter_tar import MEDIA_TYPE
from core.artifacts import Adapter, Artifact
from core.events import FeedItem
from core.feed import MetricPoint
from core.files import StoredFile
from core.ids import (
    public_checkpoint_id,
    public_event_id,
    public_file_id,
    public_job_id,
)
from core.limits import limits_of
from core.models_catalog import CatalogEntry
from core.rows import Attempt, Checkpoint, Job
from core.states import FINAL, JobStatus, StopWanted
from ppo_engine.metrics import METRICS

JOBS_URL = "/v1/fine_tuning/jobs"

_LINKS = {
    "events": "events",
    "metrics": "metrics",
    "diagnosis": "diagnosis",
    "clip": "clip",
    "clip_histogram": "clip/histogram",
    "clip_sweep": "clip/sweep",
    "clip_tokens": "clip/tokens",
    "checkpoints": "checkpoints",
    "stream": "stream",
    "artifacts": "artifacts",
    "adapter": "adapter",
}
"""What hangs on a job: the link's name, and the path below the job's address."""


def unix(moment: datetime) -> int:
    """Whole seconds since 1970."""
    return int(moment.timestamp())


def unix_or_none(moment: datetime | None) -> int | None:
    """Whole seconds since 1970, if it happened."""
    return None if moment is None else unix(moment)


def job_url(job: Job) -> str:
    """Where the job is found."""
    return f"{JOBS_URL}/{public_job_id(job.id)}"


def job_view(job: Job, facts: JobFacts, *, organization: str) -> schemas.Job:
    """The job as users see it."""
    is_final = job.status in FINAL
    seconds = None if is_final else _seconds_per_step(facts.recent)
    return schemas.Job(
        id=public_job_id(job.id),
        created_at=unix(job.created_at),
        finished_at=unix_or_none(job.finished_at),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=organization,
        status=job.status,
        hyperparameters={},
        training_file=public_file_id(job.training_file_id),
        validation_file=_file_id(job),
        result_files=[public_file_id(each) for each in facts.result_files],
        seed=job.seed,
        trained_tokens=job.usage.get("response_tokens", 0) if is_final else None,
        estimated_finish=_estimated_finish(job, facts, seconds),
        integrations=None,
        metadata=job.metadata,
        method=job.spec["method"],
        error=_error(job),
        user_provided_suffix=job.suffix,
        phase=_phase(job, facts.now),
        started_at=unix_or_none(job.started_at),
        attempt=job.attempt,
        worker=job.worker_label if job.lease_until else None,
        resumed_from_step=facts.resumed_from_step,
        pause_requested_at=_stop_time(job, StopWanted.PAUSE),
        cancel_requested_at=_stop_time(job, StopWanted.CANCEL),
        progress=schemas.Progress(
            step=job.step,
            total_steps=job.total_steps,
            fraction=round(job.step / job.total_steps, 4),
            generated_tokens=_generated_tokens(job, facts.recent),
            seconds_per_step=seconds,
        ),
        queue=_queue(facts),
        usage=job.usage,
        limits=_limits(job),
        start_checkpoint=_start_checkpoint(job),
        priority=job.priority,
        latest=_latest(facts.recent),
        health=_health(facts.diagnosis),
        resolved=job.resolved["hyperparameters"],
        warnings=[schemas.Warning_(**warning) for warning in job.warnings],
        stream_cursor=stream_cursor(job),
        links=_links(job),
    )


def _file_id(job: Job) -> str | None:
    return None if job.validation_file_id is None else public_file_id(job.validation_file_id)


def stream_cursor(job: Job) -> str:
    """The stream's id of the last thing told."""
    return f"{job.attempt}-{job.last_seq}"


def _links(job: Job) -> dict[str, str]:
    url = job_url(job)
    return {"self": url} | {name: f"{url}/{path}" for name, path in _LINKS.items()}


def _error(job: Job) -> schemas.JobError | None:
    if job.error_code is None:
        return None
    return schemas.JobError(
        code=job.error_code,
        message=job.error_message or "",
        param=job.error_param,
        attempt=job.attempt,
    )


def _phase(job: Job, now: datetime) -> str | None:
    """What goes on inside the status; derived, so that the two cannot disagree."""
    if job.status == JobStatus.RUNNING:
        if job.lease_until is not None and job.lease_until < now:
            return "lost_contact"
        stops = {StopWanted.CANCEL: "cancelling", StopWanted.PAUSE: "pausing"}
        return stops[job.stop_wanted] if job.stop_wanted else job.phase
    if job.status == JobStatus.QUEUED:
        return "backing_off" if job.not_before and job.not_before > now else "waiting"
    if job.status == JobStatus.VALIDATING_FILES:
        return "validating" if job.lease_until else "waiting"
    return None


_DONE_BY = {StopWanted.CANCEL: JobStatus.CANCELLED, StopWanted.PAUSE: JobStatus.PAUSED}


def _stop_time(job: Job, wanted: StopWanted) -> int | None:
    is_its_own = job.stop_wanted == wanted or job.status == _DONE_BY[wanted]
    return unix_or_none(job.stop_wanted_at) if is_its_own else None


def _limits(job: Job) -> schemas.JobLimits | None:
    limits = limits_of(job.spec)
    if limits is None:
        return None
    return schemas.JobLimits(**limits.model_dump(), reached=job.limit_reached)


def _start_checkpoint(job: Job) -> str | None:
    if job.start_job_id is None or job.start_attempt is None or job.start_step is None:
        return None
    return public_checkpoint_id(job.start_job_id, job.start_attempt, job.start_step)


def _queue(facts: JobFacts) -> schemas.QueuePlace | None:
    position = facts.queue_position
    return None if position is None else schemas.QueuePlace(position=position)


def _latest(recent: Sequence[MetricPoint]) -> schemas.Latest | None:
    if not recent:
        return None
    last = recent[0]
    names = ("reward_mean", "kl_reference_per_sequence", "policy_clip_fraction", "entropy")
    return schemas.Latest(step=last.step, **{name: last.values.get(name) for name in names})


def _health(diagnosis: Mapping[str, Any] | None) -> schemas.JobHealth:
    if diagnosis is None:
        return schemas.JobHealth(level="unknown", findings=[])
    return schemas.JobHealth(level=diagnosis["level"], findings=diagnosis["findings"])


def _generated_tokens(job: Job, recent: Sequence[MetricPoint]) -> int:
    """Response tokens since the start of the job; the trainer counts over all attempts."""
    told = recent[0].values.get("response_tokens") if recent else None
    return int(told or job.usage.get("response_tokens", 0))


def _seconds_per_step(recent: Sequence[MetricPoint]) -> float | None:
    """Mean over the last steps of the present attempt; nothing before its second step."""
    own = [row for row in recent if row.attempt == recent[0].attempt]
    steps = own[0].step - own[-1].step if own else 0
    if steps <= 0:
        return None
    return round((own[0].at - own[-1].at).total_seconds() / steps, 3)


def _estimated_finish(job: Job, facts: JobFacts, seconds: float | None) -> int | None:
    if job.status != JobStatus.RUNNING or seconds is None:
        return None
    last = facts.recent[0]
    return unix(last.at) + round(seconds * (job.total_steps - last.step))


def event_view(item: FeedItem, *, total_steps: int) -> schemas.Event:
    """A feed item in the form of OpenAI's events."""
    is_metrics = item.kind == "metrics"
    return schemas.Event(
        id=public_event_id(item.job_id, item.seq),
        created_at=unix(item.at),
        level=item.level,
        type="metrics" if is_metrics else "message",
        message=_metrics_message(item, total_steps) if is_metrics else item.message,
        data=_metrics_data(item, total_steps) if is_metrics else item.data,
        code=item.code or None,
        attempt=item.attempt,
        seq=item.seq,
        step=item.step,
    )


def _metrics_message(item: FeedItem, total_steps: int) -> str:
    reward = item.data.get("reward_mean")
    told = "" if reward is None else f": reward {reward:.4g}"
    return f"Step {item.step}/{total_steps}{told}"


def _metrics_data(item: FeedItem, total_steps: int) -> dict[str, Any]:
    """OpenAI's names where there is one, and everything under `ppo`."""
    values = item.data
    return {
        "step": item.step,
        "total_steps": total_steps,
        "train_mean_reward": values.get("reward_mean"),
        "full_valid_mean_reward": values.get("valid_reward_mean"),
        "completion_tokens_mean": values.get("response_tokens_mean"),
        "ppo": values,
    }


def checkpoint_view(
    checkpoint: Checkpoint, values: Mapping[str, float | None], *, model: str
) -> schemas.Checkpoint:
    """A checkpoint with the figures of its step."""
    return schemas.Checkpoint(
        id=public_checkpoint_id(checkpoint.job_id, checkpoint.attempt, checkpoint.step),
        created_at=unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=f"{model}:ckpt-step-{checkpoint.step}",
        fine_tuning_job_id=public_job_id(checkpoint.job_id),
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **values},
        bytes=checkpoint.bytes,
        sha256=checkpoint.manifest_sha256,
        attempt=checkpoint.attempt,
        best=checkpoint.best,
        score=checkpoint.score,
        resumable=checkpoint.resumable,
    )


def metrics_view(
    job: Job,
    rows: Sequence[MetricPoint],
    attempts: Sequence[Attempt],
    *,
    names: Sequence[str],
    max_points: int,
) -> schemas.Metrics:
    """Curves in columns; `names` empty means all there are."""
    shown = list(names) or _names_in(rows)
    kept = thin(rows, shown, max_points=max_points)
    return schemas.Metrics(
        job_id=public_job_id(job.id),
        steps=[row.step for row in kept],
        series={name: [row.values.get(name) for row in kept] for name in shown},
        definitions={name: definition(name) for name in shown},
        thinned=len(kept) < len(rows),
        nonfinite=_nonfinite(rows, shown),
        attempts=[
            schemas.AttemptSpan(attempt=each.attempt, resumed_from_step=each.resumed_from_step)
            for each in attempts
        ],
        stream_cursor=stream_cursor(job),
    )


def _names_in(rows: Sequence[MetricPoint]) -> list[str]:
    """All names, in the order of the table of metrics, others after them."""
    found = {name for row in rows for name in row.values}
    return [name for name in METRICS if name in found] + sorted(found - METRICS.keys())


def _nonfinite(rows: Sequence[MetricPoint], names: Sequence[str]) -> dict[str, list[int]]:
    found = {
        name: [row.step for row in rows if name in row.values and row.values[name] is None]
        for name in names
    }
    return {name: steps for name, steps in found.items() if steps}


def definition(name: str) -> schemas.Definition:
    """Unit and formula of a metric; parts of the step's time are a family of their own."""
    if name in METRICS:
        return schemas.Definition(unit=METRICS[name].unit, formula=METRICS[name].formula)
    if name.startswith("seconds."):
        return schemas.Definition(unit="s", formula="wall time of this part of the step")
    return schemas.Definition(unit="", formula="as the trainer reports it")


def thin(
    rows: Sequence[MetricPoint], names: Sequence[str], *, max_points: int
) -> list[MetricPoint]:
    """At most `max_points` rows: per bucket those with a minimum or maximum, so spikes stay."""
    if len(rows) <= max_points:
        return list(rows)
    buckets = max(1, max_points // (2 * max(1, len(names))))
    kept: set[int] = set()
    for bucket in range(buckets):
        places = range(bucket * len(rows) // buckets, (bucket + 1) * len(rows) // buckets)
        for name in names:
            kept.update(_extremes(rows, places, name))
    return [rows[place] for place in sorted(kept)[:max_points]]


def _extremes(rows: Sequence[MetricPoint], places: range, name: str) -> set[int]:
    values = {p: v for p in places if (v := rows[p].values.get(name)) is not None}
    if not values:
        return set()
    return {min(values, key=values.__getitem__), max(values, key=values.__getitem__)}


def artifact_url(job: Job, path: str) -> str:
    """Where the bytes of an artifact are."""
    return f"{job_url(job)}/artifacts/{path}"


def manifest_view(
    job: Job, adapter: Adapter, files: Sequence[Artifact], *, base: schemas.BaseModelRef
) -> schemas.Manifest:
    """All files that belong to an adapter of a job; its tar stands out.

    Those of the result belong to no checkpoint; a checkpoint's adapter is in its tar alone.
    """
    of = adapter.checkpoint
    checkpoint_id = None if of is None else public_checkpoint_id(of.job_id, of.attempt, of.step)
    query = "" if checkpoint_id is None else f"?checkpoint={checkpoint_id}"
    return schemas.Manifest(
        job_id=public_job_id(job.id),
        checkpoint_id=checkpoint_id,
        step=adapter.step,
        base_model=base,
        adapter=schemas.AdapterLink(
            url=f"{job_url(job)}/adapter{query}",
            bytes=adapter.bytes,
            sha256=adapter.sha256,
            media_type=MEDIA_TYPE,
        ),
        files=[
            schemas.ManifestFile(
                id=public_file_id(each.id),
                path=each.path,
                role=each.role,
                bytes=each.bytes,
                sha256=each.sha256,
                media_type=each.media_type,
                url=artifact_url(job, each.path),
            )
            for each in files
            if of is None or each.role in _RUN_ROLES
        ],
    )


_RUN_ROLES = frozenset({"sample", "tokens"})
"""Roles of files that a run leaves whether it ends or not."""


def base_model_view(entry: CatalogEntry) -> schemas.Model:
    """A model that jobs can start from."""
    return schemas.Model(
        id=entry.id,
        created=entry.created,
        owned_by="operator",
        kind="base",
        base_model=None,
        job_id=None,
        context_length=entry.context_length,
    )


def adapter_model_view(job: Job, *, owner: str) -> schemas.Model:
    """A model that a job made."""
    return schemas.Model(
        id=job.fine_tuned_model or "",
        created=unix(job.finished_at or job.created_at),
        owned_by=owner,
        kind="adapter",
        base_model=job.model,
        job_id=public_job_id(job.id),
        context_length=None,
    )


def file_view(file: StoredFile) -> schemas.File:
    """An uploaded file."""
    return schemas.File(
        id=public_file_id(file.id),
        bytes=file.bytes,
        created_at=unix(file.created_at),
        expires_at=unix_or_none(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=_status_details(file),
        sha256=file.sha256,
        validation=_validation(file),
    )


def _validation(file: StoredFile) -> schemas.FileValidation:
    if file.report is None:
        return schemas.FileValidation(state="not_checked", rows=None, error_count=0)
    return schemas.FileValidation(
        state="failed" if file.status == "error" else "passed",
        rows=file.report["rows"],
        error_count=file.report["error_count"],
    )


def _status_details(file: StoredFile) -> str | None:
    if file.status != "error" or file.report is None:
        return None
    faults = file.report["errors"]
    first = f"; line {faults[0]['line']}: {faults[0]['message']}" if faults else ""
    return f"{file.report['error_count']} faults{first}"


def result_view(artifact: Artifact) -> schemas.File:
    """A result of a job, as a file."""
    return schemas.File(
        id=public_file_id(artifact.id),
        bytes=artifact.bytes,
        created_at=unix(artifact.created_at),
        expires_at=None,
        filename=artifact.path.rpartition("/")[2],
        purpose=RESULTS_PURPOSE,
        status="processed",
        status_details=None,
        sha256=artifact.sha256,
        validation=schemas.FileValidation(state="not_checked", rows=None, error_count=0),
    )


RESULTS_PURPOSE = "fine-tune-results"
"""OpenAI's purpose of files that jobs make."""
