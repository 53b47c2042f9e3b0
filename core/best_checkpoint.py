"""Which checkpoint of a job is the best: the one with the highest score that can be resumed.

    score = reward − kl_coef · KL

The reward is that of the held-out prompts at the checkpoint's own step. A job without held-out
prompts takes the mean reward of its last steps instead. KL is to the reference, per response, over
the same steps; `kl_coef` is the one the job began with, so that scores stay comparable under an
adaptive controller. A checkpoint of an unhealthy run, or without these figures, does not compete.
"""

import statistics
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, and_, select, update

from core import feed, models
from core.feed import MetricPoint
from core.rows import Job

AVERAGED_STEPS = 10
"""Steps whose mean reward stands for a checkpoint where nothing is held out."""

_checkpoint = models.checkpoint.c


def score_at(tx: Connection, job: Job, step: int) -> float | None:
    """The score of a checkpoint made at this step."""
    points = feed.metrics(tx, job.id, from_step=step - AVERAGED_STEPS + 1, to_step=step)
    return score(
        points,
        step=step,
        kl_coef=job.resolved["hyperparameters"]["kl_coef"],
        is_held_out=job.validation_file_id is not None,
    )


def score(
    points: Sequence[MetricPoint], *, step: int, kl_coef: float, is_held_out: bool
) -> float | None:
    """Reward less the price of its divergence; None where either was not measured."""
    name = "valid_reward_mean" if is_held_out else "reward_mean"
    figures = [
        (point.values.get(name), point.values.get("kl_reference_per_sequence"))
        for point in points
        if not is_held_out or point.step == step
    ]
    scores = [
        reward - kl_coef * divergence
        for reward, divergence in figures
        if reward is not None and divergence is not None
    ]
    return statistics.fmean(scores) if scores else None


def choose(tx: Connection, job_id: UUID) -> None:
    """Mark the best checkpoint of the job, the earlier one of equals; and only it."""
    best = tx.execute(
        select(_checkpoint.step, _checkpoint.attempt)
        .where(_checkpoint.job_id == job_id, _checkpoint.resumable, _checkpoint.score.is_not(None))
        .order_by(_checkpoint.score.desc(), _checkpoint.step, _checkpoint.attempt)
        .limit(1)
    ).one_or_none()
    step, attempt = (None, None) if best is None else best
    is_best = and_(
        _checkpoint.step.is_not_distinct_from(step),
        _checkpoint.attempt.is_not_distinct_from(attempt),
    )
    tx.execute(
        update(models.checkpoint)
        .where(_checkpoint.job_id == job_id, _checkpoint.best != is_best)
        .values(best=is_best)
    )
