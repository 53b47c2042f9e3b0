"""Shapes of the clip resources; numbers carry their definitions from the one table of metrics."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas import View
from ppo_engine.explain import TokenClass
from ppo_engine.metrics import METRICS, QUANTILES, quantile_name
from ppo_engine.reports import PassSums

Number = int | float | None

PASS_METRICS = (*PassSums().values(), *map(quantile_name, QUANTILES))
"""What is measured of every pass."""

EXPLAINED_METRICS = (
    "tokens",
    "policy_clip_fraction",
    "policy_clip_fraction_high",
    "policy_clip_fraction_low",
    "policy_clip_fraction_dual",
    "policy_clip_fraction_of_positive",
    "policy_clip_fraction_of_negative",
    "ratio_above_range_fraction",
    "ratio_below_range_fraction",
    "clipped_advantage_mass",
    "policy_gradient_kept",
    "surrogate_unclipped",
    "surrogate_clipped",
    "surrogate_objective",
    "objective_gap",
    "ratio_mean",
    "ratio_std",
    "ratio_min",
    "ratio_max",
    "update_kl_k1",
    "update_kl_k2",
    "update_kl_k3",
    "log_ratio_abs_max",
    "ess_token",
)
"""What a few tokens without their sequences, values and gradients tell."""


def defined_as(name: str) -> str:
    """Formula and unit of a metric, as a description."""
    metric = METRICS[name]
    return metric.formula if metric.unit == "1" else f"{metric.formula} ({metric.unit})"


def _metric(name: str) -> Any:
    return Field(description=defined_as(name))


def _with_metrics(names: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """Adds the metrics, which are told by name, to a schema."""

    def add(schema: dict[str, Any]) -> None:
        number = {"anyOf": [{"type": "number"}, {"type": "null"}]}
        schema["properties"] |= {
            name: {"description": defined_as(name), **number} for name in names
        }

    return add


class TokenCounts(View):
    """Tokens by class: each token is in the first class whose condition holds."""

    zero_advantage: int = Field(description="A = 0; no gradient anyway.")
    dual_clipped: int = Field(description="A < 0 and ρ > dual_clip; gradient removed.")
    clipped_high: int = Field(description="A > 0 and ρ > 1 + ε_high; gradient removed.")
    clipped_low: int = Field(description="A < 0 and ρ < 1 − ε_low; gradient removed.")
    unclipped_out_low: int = Field(description="A > 0 and ρ < 1 − ε_low; gradient kept.")
    unclipped_out_high: int = Field(description="A < 0 and ρ > 1 + ε_high; kept, with weight ρ.")
    in_range_positive: int = Field(description="A > 0 and ρ in the range; gradient kept.")
    in_range_negative: int = Field(description="A < 0 and ρ in the range; gradient kept.")


class PassValues(View):
    """Clip statistics over the response tokens of one pass, or of several taken together."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_metrics(PASS_METRICS))
    __pydantic_extra__: dict[str, Number]

    counts: TokenCounts


class ClipPass(PassValues):
    """One optimizer step's tokens, measured before that step."""

    epoch: int = Field(description="Walk over the rollout, from 0.")
    minibatch: int = Field(description="Pass within the walk, from 0.")
    skipped: bool = Field(description="Whether the optimizer did not step.")


class ClipSummary(PassValues):
    """All passes of a step merged from their sums; quantiles of several come by histogram."""

    skipped: int = Field(description="Passes in which the optimizer did not step.")


class NoiseFloor(View):
    """What pass [0][0] measured: nothing had moved, so anything above 0 is numeric noise."""

    policy_clip_fraction: float | None = _metric("policy_clip_fraction")
    log_ratio_abs_max: float | None = _metric("log_ratio_abs_max")
    update_kl_k3: float | None = _metric("update_kl_k3")


class Bucket(View):
    """The tokens of one bucket, all passes of the step taken together."""

    tokens: int = _metric("tokens")
    counts: TokenCounts
    policy_clip_fraction: float | None = _metric("policy_clip_fraction")
    policy_clip_fraction_high: float | None = _metric("policy_clip_fraction_high")
    policy_clip_fraction_low: float | None = _metric("policy_clip_fraction_low")
    policy_clip_fraction_dual: float | None = _metric("policy_clip_fraction_dual")
    clipped_advantage_mass: float | None = _metric("clipped_advantage_mass")
    ratio_mean: float | None = _metric("ratio_mean")
    update_kl_k3: float | None = _metric("update_kl_k3")


class WorstSequence(View):
    """A response with many clipped tokens, as one pass met it."""

    row: int = Field(description="Place in the step's rollout, from 0.")
    epoch: int = Field(description="Walk over the rollout, from 0.")
    minibatch: int = Field(description="Pass within the walk, from 0.")
    tokens: int = Field(description="Its response tokens.")
    clipped_tokens: int = Field(description="Those whose gradient clipping removed.")
    ratio_max: float | None = Field(description="Its largest ρ.")


class Buckets(View):
    """Where in the responses, and on which tokens, clipping acted."""

    position: dict[str, Bucket] = Field(description="By place in the response, from 0.")
    old_probability: dict[str, Bucket] = Field(
        description="By probability under the old policy; a border belongs to the higher part."
    )
    worst_sequences: list[WorstSequence] = Field(description="Most clipped tokens first.")


class ClipVerdict(View):
    """What clipping did in one step, in words."""

    verdict: Literal["inactive_by_construction", "numeric_noise", "dead", "tight", "ok"] = Field(
        description="The first of these whose condition holds: ρ could never leave 1; it left 1 "
        "before any optimizer step; nothing was clipped since the policy stood still; clipping "
        "took much of the gradient; none of these."
    )
    one_sided: bool = Field(description="Whether one bound binds far more often than the other.")
    cause: str | None = Field(description="Why nothing is clipped, where the verdict says so.")
    sentence: str = Field(description="What was found.")
    suggestion: str = Field(description="What to change, if anything.")
    numbers: dict[str, float | None] = Field(
        description="What it was judged on: of the epoch that was clipped most, and of the passes "
        "after the first; `noise_` stands before those of the first pass."
    )


class ClipUpdate(View):
    """What clipping did in one step."""

    id: str
    object: Literal["fine_tuning.job.clip"] = "fine_tuning.job.clip"
    step: int
    attempt: int
    clip_range: float = Field(description="ε_low: ratios below 1 − x are out of range.")
    clip_range_high: float | None = Field(
        description="ε_high: ratios above 1 + x are out of range; null: as `clip_range`."
    )
    dual_clip: float | None = Field(description="c: bound of the ratio where A < 0; null: off.")
    clip_active: bool = Field(
        description="Whether clipping could act: only after a pass moved the policy can ρ leave 1."
    )
    reason: str | None = Field(description="Why it could not; null where it could.")
    summary: ClipSummary = Field(description="All passes of the step merged.")
    passes: list[list[ClipPass]] | None = Field(
        description="[epoch][minibatch]; with `detail=passes`."
    )
    noise_floor: NoiseFloor | None = Field(description="Of pass [0][0]; null if it is missing.")
    buckets: Buckets | None = Field(
        description="With `detail=buckets`; null too where the run kept none."
    )
    verdict: ClipVerdict = Field(description="What the numbers amount to.")


class HistogramSums(View):
    """Sums over the tokens of one sign of A, by bin."""

    count: list[int] = Field(description="n, tokens.")
    abs_advantage: list[float] = Field(description="Σ|A|.")
    ratio_abs_advantage: list[float] = Field(description="Σρ|A|.")


class HistogramColumn(View):
    """Ratios of the passes of consecutive steps, taken together."""

    from_step: int = Field(description="First step.")
    to_step: int = Field(description="Last step.")
    passes: int = Field(description="Passes merged.")
    positive: HistogramSums = Field(description="Tokens with A > 0.")
    negative: HistogramSums = Field(description="Tokens with A < 0.")
    zero_advantage_count: int = Field(description="Tokens with A = 0; they are in no bin.")


class ClipHistogram(View):
    """Ratios by bin and sign of the advantage, in columns of consecutive steps."""

    object: Literal["fine_tuning.job.clip.histogram"] = "fine_tuning.job.clip.histogram"
    job_id: str
    epoch: int | None = Field(description="The one epoch taken; null: all.")
    minibatch: int | None = Field(description="The one minibatch taken; null: all.")
    edges: list[float] = Field(
        description="Ratios between the bins, ascending. A bin above 1 is closed on the right, one "
        "below 1 on the left; there is one bin more than edges, the first from 0, the last open."
    )
    columns: list[HistogramColumn]
    stream_cursor: str


class Limits(View):
    """A number known to lie between two others."""

    low: float = Field(description="It is not below this.")
    high: float = Field(description="It is not above this.")


class SweepPoint(View):
    """What a clip range would have done to the tokens of the recorded passes."""

    clip_range: float = Field(description="ε_low.")
    clip_range_high: float = Field(description="ε_high.")
    dual_clip: float | None = Field(description="c; null: none.")
    is_own: bool = Field(description="Whether this is the rule that the run trained with.")
    policy_clip_fraction: float | None = _metric("policy_clip_fraction")
    policy_clip_fraction_high: float | None = _metric("policy_clip_fraction_high")
    policy_clip_fraction_low: float | None = _metric("policy_clip_fraction_low")
    policy_clip_fraction_dual: float | None = _metric("policy_clip_fraction_dual")
    clipped_advantage_mass: float | None = _metric("clipped_advantage_mass")
    policy_gradient_kept: float | None = _metric("policy_gradient_kept")
    objective_gap: float | None = _metric("objective_gap")
    exact: bool = Field(
        description="Whether every number is exact: all bounds are edges of bins, or split none "
        "that holds tokens."
    )
    bounds: dict[str, Limits] = Field(
        description="Lower and upper limit of each number that is null because a bound of the "
        "range lies inside a bin."
    )


class Sweep(View):
    """Other clip ranges judged on recorded passes."""

    object: Literal["fine_tuning.job.clip.sweep"] = "fine_tuning.job.clip.sweep"
    job_id: str
    from_step: int | None = Field(description="First step taken; null without recorded passes.")
    to_step: int | None = Field(description="Last step taken; null without recorded passes.")
    epoch: int | None = Field(description="The one epoch taken; null: all.")
    minibatch: int | None = Field(description="The one minibatch taken; null: all.")
    passes: int = Field(description="Passes merged.")
    tokens: int = Field(description="N, their response tokens; one counts in each of its passes.")
    data: list[SweepPoint]
    caveat: str = Field(description="What these numbers say, and what they do not.")
    stream_cursor: str


class TokenRow(View):
    """One response token of a stored sample, as the last pass over it met it."""

    model_config = ConfigDict(serialize_by_alias=True)

    id: str
    object: Literal["fine_tuning.job.clip.token"] = "fine_tuning.job.clip.token"
    sample_id: str
    position: int = Field(description="Place in the response, from 0.")
    token_id: int
    text: str
    behavior_logprob: float | None = Field(description="log π_behavior: the sampler's own.")
    old_logprob: float | None = Field(description="log π_old: recomputed before the first pass.")
    logprob: float | None = Field(description="log π: when the pass began.")
    kl_reference_logprob: float | None = Field(description="log π_ref: adapter off.")
    log_ratio: float | None = Field(description="d = log π − log π_old.")
    ratio: float | None = Field(description="ρ = exp(d).")
    advantage: float | None = Field(description="A, as the loss took it.")
    reward: float | None = Field(description="r, the token's reward with its KL penalty.")
    value: float | None = Field(description="V_old, the critic's estimate before the token.")
    return_: float | None = Field(alias="return", description="G, what the critic learns from.")
    class_: TokenClass = Field(alias="class", description="The token's class.")
    gradient_kept: bool = Field(description="g: false where clipping removed the gradient.")
    unclipped: float | None = Field(description="u = ρ·A.")
    clipped: float | None = Field(description="k = clip(ρ, 1 − ε_low, 1 + ε_high)·A.")
    objective: float | None = Field(description="J, what the loss took.")
    d_objective_d_logprob: float | None = Field(description="∂J/∂log π = g·ρ·A.")
    epoch: int = Field(description="Walk over the rollout, from 0.")
    minibatch: int = Field(description="Pass within the walk, from 0.")


class ExplainedToken(View):
    """What PPO's clipped objective does with one token, and why."""

    model_config = ConfigDict(serialize_by_alias=True)

    ratio: float = Field(description="ρ = π / π_old.")
    advantage: float = Field(description="A.")
    unclipped: float = Field(description="u = ρ·A.")
    clipped_ratio: float = Field(description="clip(ρ, 1 − ε_low, 1 + ε_high).")
    clipped: float = Field(description="k = clipped ratio · A.")
    objective: float = Field(description="J = min(u, k); with a dual clip at least c·A if A < 0.")
    branch: Literal["unclipped", "clipped", "dual"] = Field(description="Which of them J is.")
    class_: TokenClass = Field(alias="class", description="The token's class.")
    gradient_kept: bool = Field(description="g: false where clipping removes the gradient.")
    d_objective_d_logprob: float = Field(description="∂J/∂log π = g·ρ·A.")
    explanation: str = Field(description="The same in words.")


class ExplainedSummary(View):
    """The tokens of a request taken together."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_metrics(EXPLAINED_METRICS))
    __pydantic_extra__: dict[str, Number]

    counts: TokenCounts


class Explanation(View):
    """The clip rule applied to tokens of the request's own."""

    object: Literal["ppo.clip.explanation"] = "ppo.clip.explanation"
    clip_range: float = Field(description="ε_low.")
    clip_range_high: float = Field(description="ε_high.")
    dual_clip: float | None = Field(description="c; null: none.")
    data: list[ExplainedToken]
    summary: ExplainedSummary


class Evidence(View):
    """A number behind a finding."""

    metric: str = Field(description="Its name among the metrics.")
    step: int = Field(description="The step it ends with.")
    value: float = Field(description="What was compared.")
    threshold: float = Field(description="With what.")
    window: int = Field(description="Steps it was taken over.")


class Advice(View):
    """Something to do about a finding."""

    kind: Literal["setting", "check", "checkpoint"] = Field(
        description="Change a setting, look at something, or go back to a checkpoint."
    )
    param: str | None = Field(description="The hyperparameter, if it is one.")
    text: str


class Finding(View):
    """A known way for PPO to go wrong that the run shows."""

    code: str
    level: Literal["warn", "critical"]
    since_step: int = Field(description="First step since which it has been there without a break.")
    message: str
    evidence: list[Evidence]
    actions: list[Advice] = Field(description="Most useful first.")


class Diagnosis(View):
    """What a run's metrics show together, after a step."""

    object: Literal["fine_tuning.job.diagnosis"] = "fine_tuning.job.diagnosis"
    job_id: str
    step: int | None = Field(description="The last step that was looked at; null before any.")
    level: Literal["ok", "warn", "critical", "unknown"] = Field(
        description="The worst of the findings; `unknown` before the first step."
    )
    clip_verdict: ClipVerdict | None = Field(description="Of that step; null without its passes.")
    findings: list[Finding]
    stream_cursor: str
