"""A run judged once more from its stored numbers, as its trainer judged it.  Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api import clip_schemas as schemas
from api.clip_views import has_critic, reports_of, verdict_of
from api.queries import Place
from api.views import stream_cursor
from core.feed import ClipPass, MetricPoint
from core.ids import public_job_id
from core.rows import Job
from ppo_engine.diagnosis import Finding, Monitor, MonitorSettings, level_of
from ppo_engine.signs import BASELINE_UPDATES, SPIKE_UPDATES
from ppo_engine.verdicts import ClipVerdict

REPLAYED_STEPS = 300
"""Last steps that are looked at, besides the first ones; a finding is not told to be older."""

FIRST_STEPS = BASELINE_UPDATES
"""First steps of a run, against which later ones are compared."""

JUDGED_PASSES = 800
"""Passes that are read, of the last steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What was found after the last step."""

    findings: tuple[Finding, ...] = ()
    verdict: ClipVerdict | None = None


def judged_steps(job: Job) -> int:
    """Last steps whose passes are read: as many as a finding about clipping needs, or more."""
    settings = job.resolved["hyperparameters"]
    steps: int = JUDGED_PASSES // (settings["epochs"] * settings["minibatches"])
    return max(SPIKE_UPDATES, min(steps, REPLAYED_STEPS))


def diagnosis_view(
    job: Job, rows: Sequence[MetricPoint], passes: Mapping[Place, Sequence[ClipPass]]
) -> schemas.Diagnosis:
    """What the steps show; `passes` are those of the last `judged_steps`."""
    judged = _replay(job, rows, passes)
    verdict = judged.verdict
    return schemas.Diagnosis(
        job_id=public_job_id(job.id),
        step=rows[-1].step if rows else None,
        level=level_of(judged.findings) if rows else "unknown",
        clip_verdict=None if verdict is None else schemas.ClipVerdict(**verdict.to_dict()),
        findings=[schemas.Finding.model_validate(each.to_dict()) for each in judged.findings],
        stream_cursor=stream_cursor(job),
    )


def _replay(
    job: Job, rows: Sequence[MetricPoint], passes: Mapping[Place, Sequence[ClipPass]]
) -> _Judged:
    monitor, judged = Monitor(monitor_settings(job)), _Judged()
    for row in rows:
        verdict = _verdict(job, row, passes.get((row.attempt, row.step), ()))
        judged = _Judged(findings=monitor.observe(row.step, row.values, verdict), verdict=verdict)
    return judged


def _verdict(job: Job, row: MetricPoint, passes: Sequence[ClipPass]) -> ClipVerdict | None:
    """Of a step whose passes are known; that the adapter was frozen is known without them."""
    verdict = verdict_of(job, row.step, reports_of(job, passes), row.values)
    return verdict if passes or verdict.cause == "frozen_adapter" else None


def monitor_settings(job: Job) -> MonitorSettings:
    """Those of the job; what older jobs lack has the value that they ran with."""
    settings = job.resolved["hyperparameters"]
    return MonitorSettings(
        kl_controller=settings["kl_controller"],
        target_kl_per_sequence=settings["target_kl_per_sequence"],
        target_kl=settings["target_kl"],
        group_size=settings.get("group_size", 1),
        has_critic=has_critic(settings),
        value_clip_range=settings["value_clip_range"],
    )
