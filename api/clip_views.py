"""From clip statistics to answers.  Pure: no database, no request."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from api import clip_schemas as schemas
from api.views import stream_cursor
from core.feed import ClipPass
from core.ids import public_clip_id, public_job_id, public_sample_id, public_token_id
from core.rows import Job
from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES, Explanation, TokenClass, sweep
from ppo_engine.histogram import SUMS, Histogram, histogram_edges
from ppo_engine.reports import PassReport, PassSummary, PassSums, summarize
from ppo_engine.verdicts import CUT_OFFS, ClipVerdict, clip_verdict

SWEEP_CAVEAT = (
    "These are the tokens that the recorded passes met, judged under other ranges. They do not "
    "say how training with such a range would have gone on: the policy would have moved "
    "differently and met other tokens. Pass [0][0] of a step tells nothing, since nothing has "
    "moved there and every ratio is 1; it counts unless epoch or minibatch leaves it out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRule:
    """The range that ratios are kept in, and the bound of bad tokens' ratios."""

    clip_range: float
    clip_range_high: float
    dual_clip: float | None

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges of the histograms of a run with this rule."""
        return tuple(histogram_edges(self.clip_range, self.clip_range_high, self.dual_clip))


def rule_of(job: Job) -> ClipRule:
    """The rule that a job trains with."""
    settings = job.resolved["hyperparameters"]
    low, high = settings["clip_range"], settings["clip_range_high"]
    return ClipRule(
        clip_range=low,
        clip_range_high=low if high is None else high,
        dual_clip=settings["dual_clip"],
    )


def clip_view(
    job: Job,
    passes: Sequence[ClipPass],
    values: Mapping[str, float | None],
    *,
    with_passes: bool,
    with_buckets: bool,
) -> schemas.ClipUpdate:
    """What clipping did in one step, whose metrics are `values`."""
    edges, first = rule_of(job).edges, passes[0]
    reports = [_report(each, edges) for each in passes]
    summary = summarize(reports)
    verdict = verdict_of(job, first.step, reports, values)
    is_active = verdict.verdict != "inactive_by_construction"
    settings = job.resolved["hyperparameters"]
    return schemas.ClipUpdate(
        id=public_clip_id(job.id, first.attempt, first.step),
        step=first.step,
        attempt=first.attempt,
        clip_range=settings["clip_range"],
        clip_range_high=settings["clip_range_high"],
        dual_clip=settings["dual_clip"],
        clip_active=is_active,
        reason=None if is_active else verdict.sentence,
        summary=schemas.ClipSummary(
            **summary.values, counts=_counts(summary.counts), skipped=summary.skipped
        ),
        passes=_matrix(reports) if with_passes else None,
        noise_floor=_noise_floor(reports[0]),
        buckets=_buckets(passes, summary) if with_buckets else None,
        verdict=schemas.ClipVerdict(**verdict.to_dict()),
    )


def verdict_of(
    job: Job, step: int, reports: Sequence[PassReport], values: Mapping[str, float | None]
) -> ClipVerdict:
    """The verdict on a step of the job, whose metrics are `values`."""
    settings = job.resolved["hyperparameters"]
    rate, noise_limit = values.get("learning_rate"), values.get("noise_limit")
    return clip_verdict(
        reports,
        epochs=settings["epochs"],
        minibatches=settings["minibatches"],
        learning_rate=settings["learning_rate"] if rate is None else rate,
        precision=settings["precision"],
        is_adapter_frozen=has_critic(settings) and step <= settings["critic_warmup_steps"],
        noise_limit=CUT_OFFS.noise_log_ratio if noise_limit is None else noise_limit,
    )


def has_critic(settings: Mapping[str, Any]) -> bool:
    """Whether a job with these hyperparameters trains a critic; only GAE asks for one."""
    return bool(settings.get("advantage_estimator", "gae") == "gae")


def reports_of(job: Job, passes: Iterable[ClipPass]) -> list[PassReport]:
    """The passes as the engine reported them."""
    edges = rule_of(job).edges
    return [_report(each, edges) for each in passes]


def _report(row: ClipPass, edges: Sequence[float]) -> PassReport:
    return PassReport.from_stored(row.epoch, row.minibatch, row.values, row.histogram, edges=edges)


def _counts(counts: Mapping[str, int]) -> schemas.TokenCounts:
    return schemas.TokenCounts(**counts)


def _matrix(reports: Sequence[PassReport]) -> list[list[schemas.ClipPass]]:
    """[epoch][minibatch]."""
    matrix: list[list[schemas.ClipPass]] = [[] for _ in range(max(r.epoch for r in reports) + 1)]
    for each in reports:
        matrix[each.epoch].append(
            schemas.ClipPass(
                **each.values,
                epoch=each.epoch,
                minibatch=each.minibatch,
                skipped=each.skipped,
                counts=_counts(each.counts),
            )
        )
    return matrix


def _noise_floor(first: PassReport) -> schemas.NoiseFloor | None:
    if (first.epoch, first.minibatch) != (0, 0):
        return None
    names = schemas.NoiseFloor.model_fields
    return schemas.NoiseFloor(**{name: first.values[name] for name in names})


def _buckets(passes: Sequence[ClipPass], summary: PassSummary) -> schemas.Buckets | None:
    if not any("buckets" in each.values for each in passes):
        return None
    tables = {
        name: {
            label: schemas.Bucket(**{**bucket, "counts": _counts(bucket["counts"])})
            for label, bucket in table.items()
        }
        for name, table in summary.buckets.to_dict().items()
    }
    worst = [schemas.WorstSequence(**each) for each in summary.worst_sequences]
    return schemas.Buckets(**tables, worst_sequences=worst)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedPasses:
    """Passes of consecutive steps, taken together."""

    first_step: int
    last_step: int
    passes: int
    ratios: Histogram


def histogram_view(
    job: Job, columns: Sequence[MergedPasses], *, epoch: int | None, minibatch: int | None
) -> schemas.ClipHistogram:
    """The ratios of some passes, in columns."""
    return schemas.ClipHistogram(
        job_id=public_job_id(job.id),
        epoch=epoch,
        minibatch=minibatch,
        edges=list(rule_of(job).edges),
        columns=[
            schemas.HistogramColumn(
                from_step=each.first_step,
                to_step=each.last_step,
                passes=each.passes,
                positive=_sums(each.ratios, "positive"),
                negative=_sums(each.ratios, "negative"),
                zero_advantage_count=each.ratios.zero_advantage_count,
            )
            for each in columns
        ],
        stream_cursor=stream_cursor(job),
    )


def _sums(ratios: Histogram, sign: str) -> schemas.HistogramSums:
    columns: dict[str, Any] = {kind: ratios.column(sign, kind) for kind in SUMS}
    return schemas.HistogramSums(**columns | {"count": [round(x) for x in columns["count"]]})


def sweep_view(
    job: Job,
    merged: MergedPasses | None,
    rules: Sequence[ClipRule],
    *,
    epoch: int | None,
    minibatch: int | None,
) -> schemas.Sweep:
    """The rules judged on the passes; nothing to judge without passes."""
    return schemas.Sweep(
        job_id=public_job_id(job.id),
        from_step=None if merged is None else merged.first_step,
        to_step=None if merged is None else merged.last_step,
        epoch=epoch,
        minibatch=minibatch,
        passes=0 if merged is None else merged.passes,
        tokens=0 if merged is None else _tokens(merged.ratios),
        data=[]
        if merged is None
        else [_point(merged.ratios, rule, is_own=rule == rule_of(job)) for rule in rules],
        caveat=SWEEP_CAVEAT,
        stream_cursor=stream_cursor(job),
    )


def _tokens(ratios: Histogram) -> int:
    return round(ratios.total("count")) + ratios.zero_advantage_count


def _point(ratios: Histogram, rule: ClipRule, *, is_own: bool) -> schemas.SweepPoint:
    found = sweep(
        ratios,
        clip_low=rule.clip_range,
        clip_high=rule.clip_range_high,
        dual_clip=rule.dual_clip,
    )
    undefined = _undefined(ratios)
    values = {name: None if name in undefined else x for name, x in found.values.items()}
    limits = {
        name: schemas.Limits(low=low, high=high)
        for name, (low, high) in found.bounds.items()
        if low != high and name not in undefined
    }
    return schemas.SweepPoint(
        clip_range=rule.clip_range,
        clip_range_high=rule.clip_range_high,
        dual_clip=rule.dual_clip,
        is_own=is_own,
        **values,
        exact=not limits,
        bounds=limits,
    )


def _undefined(ratios: Histogram) -> set[str]:
    """Metrics whose denominator is 0."""
    found = set() if _tokens(ratios) else {*schemas.SweepPoint.model_fields}
    found |= set() if ratios.total("abs_advantage") else {"clipped_advantage_mass"}
    return found | (set() if ratios.total("ratio_abs_advantage") else {"policy_gradient_kept"})


def token_row(job_id: UUID, attempt: int, step: int, token: Mapping[str, Any]) -> schemas.TokenRow:
    """One line of a token table."""
    place = (job_id, attempt, step, token["row"])
    ids = {
        "id": public_token_id(*place, token["position"]),
        "sample_id": public_sample_id(*place),
    }
    return schemas.TokenRow.model_validate({**token, **ids})


def explanation_view(explanations: Sequence[Explanation], rule: ClipRule) -> schemas.Explanation:
    """What the rule does with some tokens, each and together."""
    sums = _sums_of(explanations, rule)
    values = sums.values()
    return schemas.Explanation(
        clip_range=rule.clip_range,
        clip_range_high=rule.clip_range_high,
        dual_clip=rule.dual_clip,
        data=[schemas.ExplainedToken.model_validate(each.to_dict()) for each in explanations],
        summary=schemas.ExplainedSummary(
            **{name: values[name] for name in schemas.EXPLAINED_METRICS},
            counts=_counts(dict(zip(TOKEN_CLASSES, sums.counts, strict=True))),
        ),
    )


def _sums_of(tokens: Sequence[Explanation], rule: ClipRule) -> PassSums:
    """The sums of the metrics' definitions; nothing is known of sequences and values."""
    clipped = [each for each in tokens if each.token_class in CLIPPED_CLASSES]
    drifts = [math.log(each.ratio) for each in tokens]
    return PassSums(
        counts=tuple(sum(each.token_class is kind for each in tokens) for kind in TokenClass),
        above_range=sum(each.ratio > 1 + rule.clip_range_high for each in tokens),
        below_range=sum(each.ratio < 1 - rule.clip_range for each in tokens),
        ratio=math.fsum(each.ratio for each in tokens),
        ratio_square=math.fsum(each.ratio**2 for each in tokens),
        ratio_min=min(each.ratio for each in tokens),
        ratio_max=max(each.ratio for each in tokens),
        log_ratio_abs_max=max(map(abs, drifts)),
        abs_advantage=math.fsum(abs(each.advantage) for each in tokens),
        abs_advantage_clipped=math.fsum(abs(each.advantage) for each in clipped),
        ratio_abs_advantage=math.fsum(abs(each.unclipped) for each in tokens),
        ratio_abs_advantage_kept=math.fsum(
            abs(each.unclipped) for each in tokens if each.gradient_kept
        ),
        unclipped=math.fsum(each.unclipped for each in tokens),
        clipped=math.fsum(each.clipped for each in tokens),
        objective=math.fsum(each.objective for each in tokens),
        kl_k1=math.fsum(-d for d in drifts),
        kl_k2=math.fsum(d**2 / 2 for d in drifts),
        kl_k3=math.fsum(math.expm1(d) - d for d in drifts),
    )
