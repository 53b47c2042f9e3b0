"""What a run's metrics show together: the known ways in which PPO goes wrong, by name.

A detector looks at a short `History` and returns the signs it sees; `Monitor` keeps that history.
Nothing here acts: that is `guards`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple, Self

from ppo_engine.verdicts import CUT_OFFS, ClipVerdict

Level = Literal["warn", "critical"]
Code = Literal[
    "update_too_large",
    "kl_blow_up",
    "negative_kl",
    "entropy_collapse",
    "entropy_explosion",
    "repetition",
    "reward_hacking",
    "length_explosion",
    "length_collapse",
    "value_divergence",
    "clip",
    "sampler_mismatch",
    "zero_variance_reward",
    "numerics",
]

BASELINE_UPDATES = 5
"""The run's own first updates, against which later ones are compared."""
RECENT_UPDATES = 10
"""Updates kept: the window of trends."""
TREND_MINIMUM = 8
"""Known values without which there is no trend."""
SPIKE_UPDATES = 3
"""A signal is its median over these: one odd update neither raises a finding nor ends it."""
STREAK_UPDATES = 5
"""Updates in a row that a sign of small size must last."""
VALIDATIONS = 3
"""Evaluations on held-out prompts that are compared."""
GRADIENT_MEMORY = 0.9
"""Weight of the past in the running mean of the gradient norm."""
REWARD_ROUNDING = 1e-9
"""Spread of rewards that are all the same, but for rounding."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond `warn` a signal is odd, beyond `critical` it is dangerous; None: never."""

    warn: float
    critical: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits of every sign."""

    update_kl: Limits
    """Largest update KL of a pass, without `target_kl`; with it 1.5 times that warns."""
    target_kl_tolerance: float
    """Times `target_kl` from which an update is too large."""
    ratio_max: Limits
    clip_fraction: Limits
    ess_token: Limits
    """Below."""
    kl_to_target: Limits
    """KL per response as a multiple of `target_kl_per_sequence`, which is aimed at."""
    rising_kl: Limits
    """KL per response that is rising without a target."""
    kl_per_token: Limits
    negative_kl: Limits
    """KL per response below."""
    entropy_to_baseline: Limits
    """Below."""
    low_entropy: float
    """Entropy below which falling further is a collapse, in nats per token."""
    distinct_2_to_baseline: Limits
    """Below."""
    entropy_growth: Limits
    perplexity_growth: float
    repeated_4grams: Limits
    longest_run: Limits
    growth: float
    """Times its baseline a share must also have grown: some models start with a high one."""
    held_out_share: float
    """Part of the training reward's rise that the held-out reward must show."""
    reward_rise: float
    """Rise of the training reward worth comparing, in standard deviations of the baseline."""
    length_correlation: float
    length_with_correlation: float
    """Length as a multiple of its baseline, beside that correlation."""
    identical_responses: Limits
    length_growth: Limits
    truncated: Limits
    length_shrinkage: Limits
    """Below."""
    explained_variance: Limits
    """Below."""
    value_clip_fraction: Limits
    value_bias_to_std: Limits
    value_loss_growth: Limits
    log_ratio_mismatch: Limits
    ratio_mismatch: Limits
    capped_weights: Limits
    constant_groups: Limits
    log_ratio: float
    """|log ratio| above which a pass is skipped."""
    grad_norm_growth: float
    """Times its running mean."""
    trend: float
    """Kendall's τ of a window from which it has a trend."""
    trend_change: float
    """Relative change between the halves of a window with a trend."""

    def to_dict(self) -> dict[str, Any]:
        """The limits by name, to be stored with a run."""
        return dataclasses.asdict(self)


THRESHOLDS = Thresholds(
    update_kl=Limits(0.03, 0.1),
    target_kl_tolerance=1.5,
    ratio_max=Limits(10.0),
    clip_fraction=Limits(0.2, 0.3),
    ess_token=Limits(0.5),
    kl_to_target=Limits(2.0, 4.0),
    rising_kl=Limits(10.0, 40.0),
    kl_per_token=Limits(0.3),
    negative_kl=Limits(-0.05, -1.0),
    entropy_to_baseline=Limits(0.3, 0.1),
    low_entropy=0.2,
    distinct_2_to_baseline=Limits(0.5),
    entropy_growth=Limits(2.0),
    perplexity_growth=2.0,
    repeated_4grams=Limits(0.2, 0.4),
    longest_run=Limits(8.0, 16.0),
    growth=1.5,
    held_out_share=0.1,
    reward_rise=0.5,
    length_correlation=0.6,
    length_with_correlation=1.5,
    identical_responses=Limits(0.25, 0.5),
    length_growth=Limits(2.0, 4.0),
    truncated=Limits(0.2, 0.5),
    length_shrinkage=Limits(0.3, 0.1),
    explained_variance=Limits(0.0),
    value_clip_fraction=Limits(0.5),
    value_bias_to_std=Limits(1.0),
    value_loss_growth=Limits(10.0),
    log_ratio_mismatch=Limits(0.02),
    ratio_mismatch=Limits(1.02, 1.05),
    capped_weights=Limits(0.05),
    constant_groups=Limits(0.5, 0.9),
    log_ratio=20.0,
    grad_norm_growth=10.0,
    trend=0.6,
    trend_change=0.1,
)
"""Those in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A number behind a finding."""

    metric: str
    """Its name."""
    step: int
    """The update it ends with."""
    value: float
    """What was compared."""
    threshold: float
    """With what."""
    window: int
    """Updates it was taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Something to do about a finding."""

    kind: Literal["setting", "check", "checkpoint"]
    """Change a setting, look at something, or go back."""
    param: str | None
    """The setting of the API, if it is one."""
    text: str
    """One sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A syndrome that a run shows."""

    code: Code
    level: Level
    since_step: int
    """First update since which it has been there without a break."""
    message: str
    """What is wrong, in words and numbers."""
    evidence: tuple[Evidence, ...]
    """At least one."""
    actions: tuple[Advice, ...]
    """What to do, most useful first."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self) | {
            "evidence": [dataclasses.asdict(each) for each in self.evidence],
            "actions": [dataclasses.asdict(each) for each in self.actions],
        }


def level_of(findings: Sequence[Finding]) -> Literal["ok", "warn", "critical"]:
    """The worst level among findings."""
    levels = {each.level for each in findings}
    if "critical" in levels:
        return "critical"
    return "warn" if levels else "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorSettings:
    """What of a run's settings decides which signals mean something."""

    kl_controller: Literal["fixed", "adaptive"]
    """Only the adaptive one aims at a KL."""
    target_kl_per_sequence: float
    """What it aims at, in nats per response."""
    target_kl: float | None
    """Update KL at 1.5 times which passes end; None: never."""
    group_size: int
    """Responses per prompt."""
    has_critic: bool
    """Whether there are values to diverge."""
    value_clip_range: float | None
    """None: values are not clipped."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one update told."""

    step: int
    values: Mapping[str, float]
    """Known and finite ones only."""
    verdict: str | None
    """Of its clip statistics; None where nothing could have been clipped yet."""


@dataclass(frozen=True, slots=True)
class Validation:
    """A held-out reward, and what training showed at that time."""

    step: int
    held_out_reward: float
    reward: float
    kl: float


@dataclass(frozen=True, slots=True)
class Sign:
    """One signal beyond its limit."""

    level: Level
    evidence: Evidence
    text: str
    """For the user, without a full stop."""
    actions: tuple[Advice, ...] = ()
    """What to do about this sign in particular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the detectors look at: the recent updates, newest last, and the run's own start."""

    recent: Sequence[Observation]
    """At most `RECENT_UPDATES`, at least one."""
    baseline: Mapping[str, float]
    """Means of the first updates; empty until they are over."""
    settled: int
    """How many of the recent updates lie after the baseline."""
    validations: Sequence[Validation] = ()
    """At most `VALIDATIONS`, newest last."""
    verdict: ClipVerdict | None = None
    """Of the newest update."""

    @property
    def step(self) -> int:
        """The newest update."""
        return self.recent[-1].step

    def known(self, metric: str, updates: int = RECENT_UPDATES) -> list[float]:
        """Its known values in the newest updates, newest last."""
        return [x.values[metric] for x in self.recent[-updates:] if metric in x.values]

    def high(self, metric: str) -> float | None:
        """What it reached in at least two of the last three updates, from below."""
        known = sorted(self.known(metric, SPIKE_UPDATES))
        return known[-2] if len(known) > 1 else None

    def low(self, metric: str) -> float | None:
        """What it fell to in at least two of the last three updates."""
        known = sorted(self.known(metric, SPIKE_UPDATES))
        return known[1] if len(known) > 1 else None

    def streak(self, metric: str, updates: int) -> list[float]:
        """Its values in the newest updates if all of them are known, else none."""
        known = self.known(metric, updates)
        return known if len(known) == updates else []

    def evidence(self, metric: str, value: float, threshold: float, window: int) -> Evidence:
        """A number that ends with the newest update."""
        return Evidence(
            metric=metric, step=self.step, value=value, threshold=threshold, window=window
        )


def above(history: History, metric: str, limits: Limits) -> list[Sign]:
    """A sign if the metric exceeded a limit in two of the last three updates."""
    value = history.high(metric)
    if value is None or value <= limits.warn:
        return []
    is_critical = limits.critical is not None and value > limits.critical
    return [_sign(history, metric, value, limits, is_critical=is_critical, side="above")]


def below(history: History, metric: str, limits: Limits) -> list[Sign]:
    """A sign if the metric was under a limit in two of the last three updates."""
    value = history.low(metric)
    if value is None or value >= limits.warn:
        return []
    is_critical = limits.critical is not None and value < limits.critical
    return [_sign(history, metric, value, limits, is_critical=is_critical, side="below")]


def above_baseline(history: History, metric: str, factors: Limits) -> list[Sign]:
    """A sign if the metric exceeded multiples of its baseline."""
    start = history.baseline.get(metric, 0.0)
    return above(history, metric, _scaled(factors, start)) if start > 0 else []


def below_baseline(history: History, metric: str, factors: Limits) -> list[Sign]:
    """A sign if the metric was under fractions of its baseline."""
    start = history.baseline.get(metric, 0.0)
    return below(history, metric, _scaled(factors, start)) if start > 0 else []


def grown_above(history: History, metric: str, limits: Limits) -> list[Sign]:
    """A sign if the metric exceeded a limit and has clearly grown since the run's start."""
    start = history.baseline.get(metric)
    value = history.high(metric)
    if start is None or value is None or value <= THRESHOLDS.growth * start:
        return []
    return above(history, metric, limits)


def is_rising(history: History, metric: str) -> bool:
    """Whether the recent values go up beyond doubt and by more than a little."""
    return _trend(history.known(metric)) > 0


def is_falling(history: History, metric: str) -> bool:
    """Whether the recent values go down beyond doubt and by more than a little."""
    return _trend(history.known(metric)) < 0


def _trend(values: Sequence[float]) -> int:
    """1, -1 or 0, by Kendall's τ over time and the means of the two halves."""
    if len(values) < TREND_MINIMUM:
        return 0
    pairs = list(combinations(values, 2))
    tau = sum((later > earlier) - (later < earlier) for earlier, later in pairs) / len(pairs)
    half = len(values) // 2
    before = math.fsum(values[:half]) / half
    change = math.fsum(values[-half:]) / half - before
    if abs(tau) < THRESHOLDS.trend or abs(change) < THRESHOLDS.trend_change * abs(before):
        return 0
    return 1 if tau > 0 else -1


def _scaled(factors: Limits, start: float) -> Limits:
    critical = None if factors.critical is None else factors.critical * start
    return Limits(factors.warn * start, critical)


def _sign(
    history: History,
    metric: str,
    value: float,
    limits: Limits,
    *,
    is_critical: bool,
    side: Literal["above", "below"],
) -> Sign:
    threshold = limits.critical if is_critical and limits.critical is not None else limits.warn
    return Sign(
        "critical" if is_critical else "warn",
        history.evidence(metric, value, threshold, SPIKE_UPDATES),
        f"{metric} was {value:.3g} or {'more' if side == 'above' else 'less'} in two of the last "
        f"{SPIKE_UPDATES} steps, {side} {threshold:.3g}",
    )


def _worse_together(signs: Sequence[Sign]) -> list[Sign]:
    """The same signs, critical if they come from two metrics or more."""
    if len({each.evidence.metric for each in signs}) < 2:
        return list(signs)
    return [dataclasses.replace(each, level="critical") for each in signs]


def update_too_large(history: History, settings: MonitorSettings) -> list[Sign]:
    """One update moved the policy further than its clip range is made for."""
    limits = THRESHOLDS.update_kl
    if settings.target_kl is not None:
        warn = THRESHOLDS.target_kl_tolerance * settings.target_kl
        limits = Limits(warn, max(limits.critical or 0.0, 2 * warn))
    return [
        *above(history, "update_kl_k3_max", limits),
        *above(history, "ratio_max", THRESHOLDS.ratio_max),
        *above(history, "policy_clip_fraction", THRESHOLDS.clip_fraction),
        *below(history, "ess_token", THRESHOLDS.ess_token),
    ]


def kl_blow_up(history: History, settings: MonitorSettings) -> list[Sign]:
    """The policy runs away from the base model."""
    metric = "kl_reference_per_sequence"
    per_token = above(history, "kl_reference_per_token", THRESHOLDS.kl_per_token)
    if settings.kl_controller == "adaptive":
        limits = _scaled(THRESHOLDS.kl_to_target, settings.target_kl_per_sequence)
        return [*above(history, metric, limits), *per_token]
    rising = above(history, metric, THRESHOLDS.rising_kl) if is_rising(history, metric) else []
    return [*rising, *per_token]


def negative_kl(history: History, _: MonitorSettings) -> list[Sign]:
    """A divergence is never negative: its estimate is only by chance, or by a fault."""
    metric, limits = "kl_reference_per_sequence", THRESHOLDS.negative_kl
    deep = below(history, metric, Limits(limits.critical or 0.0, limits.critical))
    if deep:
        return deep
    values = history.streak(metric, STREAK_UPDATES)
    # While the policy is still the base model, the estimate's sign is a coin flip: size counts too.
    if not values or max(values) >= 0 or (mean := math.fsum(values) / len(values)) > limits.warn:
        return []
    text = f"{metric} was negative in {len(values)} steps in a row, {mean:.3g} on average"
    return [Sign("warn", history.evidence(metric, mean, 0.0, len(values)), text)]


def entropy_collapse(history: History, _: MonitorSettings) -> list[Sign]:
    """The policy has become sure of a few answers."""
    metric = "entropy"
    signs = below_baseline(history, metric, THRESHOLDS.entropy_to_baseline)
    if not signs and is_falling(history, metric):
        signs = below(history, metric, Limits(THRESHOLDS.low_entropy))
    words = below_baseline(history, "distinct_2", THRESHOLDS.distinct_2_to_baseline)
    return _worse_together([*signs, *words])


def entropy_explosion(history: History, _: MonitorSettings) -> list[Sign]:
    """The policy dissolves into noise."""
    signs = above_baseline(history, "entropy", THRESHOLDS.entropy_growth)
    if not signs:
        return []
    limits = Limits(THRESHOLDS.perplexity_growth)
    return _worse_together([*signs, *above_baseline(history, "reference_perplexity", limits)])


def repetition(history: History, _: MonitorSettings) -> list[Sign]:
    """Answers repeat themselves."""
    return [
        *grown_above(history, "repeated_4gram_fraction", THRESHOLDS.repeated_4grams),
        *grown_above(history, "longest_token_run_mean", THRESHOLDS.longest_run),
    ]


def reward_hacking(history: History, _: MonitorSettings) -> list[Sign]:
    """The score rises for a reason that nobody wanted."""
    return _worse_together(
        [
            *_held_out_left_behind(history),
            *_paid_by_length(history),
            *grown_above(history, "identical_response_fraction", THRESHOLDS.identical_responses),
        ]
    )


def _held_out_left_behind(history: History) -> list[Sign]:
    """Reward and KL went up, the held-out reward did not, over all kept evaluations."""
    seen, spread = history.validations, history.baseline.get("reward_std", 0.0)
    if len(seen) < VALIDATIONS or spread <= 0:
        return []
    first, last = seen[0], seen[-1]
    rise = last.reward - first.reward
    threshold = first.held_out_reward + THRESHOLDS.held_out_share * rise
    reached = max(each.held_out_reward for each in seen[1:])
    if rise < THRESHOLDS.reward_rise * spread or last.kl <= first.kl or reached > threshold:
        return []
    window = last.step - first.step + 1
    text = (
        f"since step {first.step} the training reward rose by {rise:.3g} and the KL to "
        f"{last.kl:.3g} nats per response, while the held-out reward went from "
        f"{first.held_out_reward:.3g} to {last.held_out_reward:.3g}"
    )
    return [Sign("warn", history.evidence("valid_reward_mean", reached, threshold, window), text)]


def _paid_by_length(history: History) -> list[Sign]:
    """Longer answers score higher, and answers have become longer."""
    longer = Limits(THRESHOLDS.length_with_correlation)
    if not above_baseline(history, "response_tokens_mean", longer):
        return []
    return above(history, "reward_length_correlation", Limits(THRESHOLDS.length_correlation))


def length_explosion(history: History, _: MonitorSettings) -> list[Sign]:
    """Answers grow, or no longer end by themselves."""
    return [
        *above_baseline(history, "response_tokens_mean", THRESHOLDS.length_growth),
        *grown_above(history, "truncated_response_fraction", THRESHOLDS.truncated),
    ]


def length_collapse(history: History, _: MonitorSettings) -> list[Sign]:
    """Answers shrink to almost nothing."""
    return below_baseline(history, "response_tokens_mean", THRESHOLDS.length_shrinkage)


def value_divergence(history: History, settings: MonitorSettings) -> list[Sign]:
    """The critic predicts worse than a constant would; its first updates do not count."""
    if not settings.has_critic or not history.baseline:
        return []
    is_clipped = settings.value_clip_range is not None
    clipped = above(history, "value_clip_fraction", THRESHOLDS.value_clip_fraction)
    return _worse_together(
        [
            *_unexplained_returns(history),
            *(clipped if is_clipped else []),
            *_biased_values(history),
            *above_baseline(history, "value_loss", THRESHOLDS.value_loss_growth),
        ]
    )


def _unexplained_returns(history: History) -> list[Sign]:
    metric, limit = "value_explained_variance", THRESHOLDS.explained_variance.warn
    values = history.streak(metric, STREAK_UPDATES)
    if history.settled < STREAK_UPDATES or not values or max(values) >= limit:
        return []
    text = f"{metric} was below {limit:g} in {len(values)} steps in a row, lately {values[-1]:.3g}"
    return [Sign("warn", history.evidence(metric, max(values), limit, len(values)), text)]


def _biased_values(history: History) -> list[Sign]:
    """|bias| beyond the returns' own spread in two of the last three updates."""
    factor = THRESHOLDS.value_bias_to_std.warn
    beyond = [
        each
        for each in history.recent[-SPIKE_UPDATES:]
        if (spread := each.values.get("return_std", 0.0)) > 0
        and abs(each.values.get("value_bias", 0.0)) > factor * spread
    ]
    if len(beyond) < 2:
        return []
    values = beyond[-1].values
    bias, spread = values["value_bias"], values["return_std"]
    text = f"value_bias was {bias:.3g}, while the returns spread by only {spread:.3g}"
    evidence = history.evidence("value_bias", bias, math.copysign(factor * spread, bias), 3)
    return [Sign("warn", dataclasses.replace(evidence, step=beyond[-1].step), text)]


def clip(history: History, _: MonitorSettings) -> list[Sign]:
    """The clip statistics show the same trouble several times in a row."""
    verdict = history.verdict
    latest = [each.verdict for each in history.recent[-SPIKE_UPDATES:]]
    if verdict is None or verdict.verdict == "ok":
        return []
    if latest != [verdict.verdict] * SPIKE_UPDATES:
        return []
    shown = _CLIP_EVIDENCE[verdict.verdict]
    value = verdict.numbers.get(shown.number) or 0.0
    return [
        Sign(
            "warn",
            history.evidence(shown.metric, value, shown.threshold, SPIKE_UPDATES),
            verdict.sentence.removesuffix("."),
            (Advice(kind="setting", param=shown.param, text=verdict.suggestion),),
        )
    ]


class _Shown(NamedTuple):
    """What a finding about a clip verdict shows."""

    number: str
    """Among the verdict's numbers."""
    metric: str
    threshold: float
    param: str
    """The setting to change first."""


_CLIP_EVIDENCE: dict[str, _Shown] = {
    "inactive_by_construction": _Shown(
        "policy_clip_fraction", "policy_clip_fraction", 0.0, "epochs"
    ),
    "numeric_noise": _Shown(
        "noise_log_ratio_abs_max", "log_ratio_abs_max", CUT_OFFS.noise_log_ratio, "precision"
    ),
    "dead": _Shown("update_kl_k3", "update_kl_k3", CUT_OFFS.dead_update_kl, "learning_rate"),
    "tight": _Shown(
        "policy_clip_fraction",
        "policy_clip_fraction",
        CUT_OFFS.tight_clip_fraction,
        "clip_range",
    ),
}


def sampler_mismatch(history: History, _: MonitorSettings) -> list[Sign]:
    """What sampled the tokens is not what the trainer takes it for."""
    return [
        *above(history, "sampler_mismatch_mean", THRESHOLDS.log_ratio_mismatch),
        *above(history, "sampler_mismatch_ratio", THRESHOLDS.ratio_mismatch),
        *above(history, "importance_weight_capped_fraction", THRESHOLDS.capped_weights),
    ]


def zero_variance_reward(history: History, settings: MonitorSettings) -> list[Sign]:
    """All answers score the same, so nothing tells good from bad."""
    spread = history.streak("reward_std", SPIKE_UPDATES)
    if spread and max(spread) <= REWARD_ROUNDING:
        text = f"all answers of a step got the same reward in {SPIKE_UPDATES} steps in a row"
        evidence = history.evidence("reward_std", max(spread), 0.0, SPIKE_UPDATES)
        return [Sign("critical", evidence, text)]
    metric, limits = "zero_advantage_group_fraction", THRESHOLDS.constant_groups
    shares = history.streak(metric, SPIKE_UPDATES)
    if settings.group_size == 1 or not shares or min(shares) <= limits.warn:
        return []
    is_critical = limits.critical is not None and min(shares) > limits.critical
    text = (
        f"in {SPIKE_UPDATES} steps in a row {min(shares):.0%} of the prompts or more got the same "
        "reward for all their answers"
    )
    advice = Advice(
        kind="setting",
        param="group_size",
        text="Raise group_size, so that more prompts get answers that differ in reward.",
    )
    evidence = history.evidence(metric, min(shares), limits.warn, SPIKE_UPDATES)
    return [Sign("critical" if is_critical else "warn", evidence, text, (advice,))]


def numerics(history: History, _: MonitorSettings) -> list[Sign]:
    """Numbers that are not finite, or close to it; told at once and for three updates."""
    latest = history.recent[-SPIKE_UPDATES:]
    signs = []
    for fault in (_nonfinite_passes, _bounded_ratios):
        found = [sign for each in latest if (sign := fault(each)) is not None]
        if found:
            level: Level = "critical" if len(found) > 1 else "warn"
            signs.append(dataclasses.replace(found[-1], level=level))
    gradients = [sign for each in latest if (sign := _exploding_gradient(each)) is not None]
    return [*signs, *gradients[-1:]]


def _nonfinite_passes(observation: Observation) -> Sign | None:
    """Skipped passes alone may be a guard's doing; without a gradient norm they are not."""
    skipped = observation.values.get("skipped_passes", 0.0)
    if skipped == 0 or "grad_norm" in observation.values:
        return None
    text = f"in step {observation.step} loss or gradient was not finite, so nothing was learned"
    return Sign("warn", _of(observation, "skipped_passes", skipped, 0.0), text)


def _bounded_ratios(observation: Observation) -> Sign | None:
    value = observation.values.get("log_ratio_abs_max", 0.0)
    if value > THRESHOLDS.log_ratio:
        text = f"in step {observation.step} a log ratio reached {value:.3g}"
        return Sign(
            "warn", _of(observation, "log_ratio_abs_max", value, THRESHOLDS.log_ratio), text
        )
    count = observation.values.get("log_ratio_clamped_count", 0.0)
    if count > 0:
        text = f"in step {observation.step} {count:g} log ratios were beyond any sense"
        return Sign("warn", _of(observation, "log_ratio_clamped_count", count, 0.0), text)
    return None


def _exploding_gradient(observation: Observation) -> Sign | None:
    value = observation.values.get("grad_norm", 0.0)
    limit = THRESHOLDS.grad_norm_growth * observation.values.get(_USUAL_GRAD_NORM, math.inf)
    if value <= limit:
        return None
    text = f"in step {observation.step} grad_norm was {value:.3g}, far above its usual size"
    return Sign("warn", _of(observation, "grad_norm", value, limit), text)


def _of(observation: Observation, metric: str, value: float, threshold: float) -> Evidence:
    """A number of one update alone."""
    return Evidence(
        metric=metric, step=observation.step, value=value, threshold=threshold, window=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Syndrome:
    """A way to go wrong: how it shows, what it means, what helps."""

    detect: Callable[[History, MonitorSettings], list[Sign]]
    meaning: str
    """Start of the message, before the numbers."""
    advice: tuple[Advice, ...]
    """In the order in which to try it."""


def _set(param: str, text: str) -> Advice:
    return Advice(kind="setting", param=param, text=text)


def _check(text: str) -> Advice:
    return Advice(kind="check", param=None, text=text)


def _go_back(text: str) -> Advice:
    return Advice(kind="checkpoint", param=None, text=text)


SYNDROMES: dict[Code, Syndrome] = {
    "update_too_large": Syndrome(
        detect=update_too_large,
        meaning="The policy moves too far within one step",
        advice=(
            _set("target_kl", "Set or lower target_kl: it ends a step's passes once they drift."),
            _set("learning_rate", "Halve learning_rate."),
            _set("epochs", "Use fewer epochs, so that each answer is learned from less often."),
        ),
    ),
    "kl_blow_up": Syndrome(
        detect=kl_blow_up,
        meaning="The policy runs away from the base model",
        advice=(
            _set("kl_coef", "Raise kl_coef by half, or let kl_controller adapt it."),
            _go_back("Go on from a checkpoint before the rise, with learning_rate halved."),
            _set("learning_rate", "Lower learning_rate."),
        ),
    ),
    "negative_kl": Syndrome(
        detect=negative_kl,
        meaning=(
            "The KL to the base model is negative, which a divergence cannot be: sampling and "
            "training disagree about the probabilities"
        ),
        advice=(
            _check("Pause the job and report this: it points to a fault, not to a bad setting."),
            _set("temperature", "Try temperature 1, in case sampling and training differ in it."),
            _set("precision", "Try precision fp32, to rule out rounding."),
        ),
    ),
    "entropy_collapse": Syndrome(
        detect=entropy_collapse,
        meaning="Policy collapse: the model has become sure of a few answers and stops exploring",
        advice=(
            _set("clip_range_high", "Set clip_range_high to 0.28: rare tokens can rise more."),
            _set("entropy_coef", "Raise entropy_coef a little, say to 0.01."),
            _go_back("Go on from a checkpoint before the collapse, with learning_rate halved."),
        ),
    ),
    "entropy_explosion": Syndrome(
        detect=entropy_explosion,
        meaning="The answers dissolve into noise: the model has become unsure of everything",
        advice=(
            _set("learning_rate", "Halve learning_rate."),
            _set("kl_coef", "Raise kl_coef, so that the base model's language holds."),
            _set("entropy_coef", "Lower entropy_coef if it is above 0."),
        ),
    ),
    "repetition": Syndrome(
        detect=repetition,
        meaning="Policy collapse: the answers repeat themselves",
        advice=(
            _check("Make the reward punish repetition; look at the samples it pays best."),
            _set("kl_coef", "Raise kl_coef: the base model seldom repeats itself."),
            _go_back("Go on from a checkpoint before the repetition, with learning_rate halved."),
        ),
    ),
    "reward_hacking": Syndrome(
        detect=reward_hacking,
        meaning="The score seems to rise for the wrong reason (reward hacking)",
        advice=(
            _check(
                "Read the best-paid samples; if length pays, make the reward independent of it."
            ),
            _set("kl_coef", "Raise kl_coef."),
            _go_back("Choose the checkpoint with the best held-out reward minus kl_coef × KL."),
        ),
    ),
    "length_explosion": Syndrome(
        detect=length_explosion,
        meaning="The answers grow longer and longer, or no longer end",
        advice=(
            _set("missing_stop_penalty", "Set missing_stop_penalty, so that ending pays."),
            _set("overlong_buffer", "Set overlong_buffer, which takes off more near the limit."),
            _set("mask_truncated", "Set mask_truncated, so that cut answers teach nothing."),
        ),
    ),
    "length_collapse": Syndrome(
        detect=length_collapse,
        meaning="The answers shrink to almost nothing",
        advice=(
            _check("Make the reward pay for content; a forced minimum length would bias training."),
            _set("kl_coef", "Lower kl_coef if it is large: its penalty grows with every token."),
        ),
    ),
    "value_divergence": Syndrome(
        detect=value_divergence,
        meaning="The critic does not predict the returns",
        advice=(
            _set("critic_warmup_steps", "Raise critic_warmup_steps."),
            _set("value_learning_rate", "Change value_learning_rate: lower if the loss jumps."),
            _set("reward_scaling", "Set reward_scaling to running_std."),
            _set("lambda", "Set lambda nearer to 1, which trusts the critic less."),
        ),
    ),
    "clip": Syndrome(detect=clip, meaning="The clip range does not do its work", advice=()),
    "sampler_mismatch": Syndrome(
        detect=sampler_mismatch,
        meaning="The sampler's probabilities differ from the trainer's",
        advice=(
            _set("importance_weight_cap", "Set importance_weight_cap to 2, which corrects for it."),
            _check("Compare temperature and number format of sampler and trainer."),
            _set("precision", "Try precision fp32."),
        ),
    ),
    "zero_variance_reward": Syndrome(
        detect=zero_variance_reward,
        meaning="The reward does not tell answers apart, so there is nothing to learn",
        advice=(
            _check("Try the grader on a few samples: is it always the same, or out of reach?"),
            _set("temperature", "Raise temperature, so that answers differ more."),
        ),
    ),
    "numerics": Syndrome(
        detect=numerics,
        meaning="Numbers are running out of range",
        advice=(
            _set("learning_rate", "Lower learning_rate."),
            _set("max_grad_norm", "Lower max_grad_norm."),
            _set("precision", "Try precision fp32."),
        ),
    ),
}
"""All of them, in the order in which findings are told."""

_USUAL_GRAD_NORM = "usual_grad_norm"
"""Running mean of grad_norm before an update; kept among that update's values."""

WATCHED = frozenset(
    {
        "update_kl_k3_max",
        "ratio_max",
        "policy_clip_fraction",
        "ess_token",
        "kl_reference_per_sequence",
        "kl_reference_per_token",
        "entropy",
        "reference_perplexity",
        "distinct_2",
        "repeated_4gram_fraction",
        "longest_token_run_mean",
        "identical_response_fraction",
        "reward_mean",
        "reward_std",
        "reward_length_correlation",
        "response_tokens_mean",
        "truncated_response_fraction",
        "value_explained_variance",
        "value_bias",
        "return_std",
        "value_clip_fraction",
        "value_loss",
        "sampler_mismatch_mean",
        "sampler_mismatch_ratio",
        "importance_weight_capped_fraction",
        "zero_advantage_group_fraction",
        "skipped_passes",
        "log_ratio_abs_max",
        "log_ratio_clamped_count",
        "grad_norm",
    }
)
"""Metrics that are kept; `valid_reward_mean` is kept apart, being rare."""


@dataclass(slots=True)
class _Mean:
    """A mean over the values so far."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass(slots=True)
class _Memory:
    """All that a monitor remembers; bounded."""

    observed: int = 0
    baseline: dict[str, _Mean] = field(default_factory=dict)
    recent: list[Observation] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    grad_norm: _Mean = field(default_factory=_Mean)
    since: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(
            observed=state["observed"],
            baseline={name: _Mean(**mean) for name, mean in state["baseline"].items()},
            recent=[Observation(**each) for each in state["recent"]],
            validations=[Validation(**each) for each in state["validations"]],
            grad_norm=_Mean(**state["grad_norm"]),
            since=dict(state["since"]),
        )


class Monitor:
    """Watches a run, one update after the other, and says what it shows."""

    def __init__(self, settings: MonitorSettings) -> None:
        self._settings = settings
        self._memory = _Memory()

    def observe(
        self, step: int, values: Mapping[str, float | None], verdict: ClipVerdict | None = None
    ) -> tuple[Finding, ...]:
        """What the run shows after this update; call it once per update, in order."""
        known = {
            name: float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
        is_frozen = verdict is not None and verdict.cause == "frozen_adapter"
        self._remember(step, known, verdict=None if is_frozen else verdict, is_frozen=is_frozen)
        history = self._history(verdict)
        found = {
            code: signs
            for code, syndrome in SYNDROMES.items()
            if (signs := syndrome.detect(history, self._settings))
        }
        self._memory.since = {code: self._memory.since.get(code, step) for code in found}
        return tuple(self._finding(code, signs) for code, signs in found.items())

    def forget_recent(self) -> None:
        """After a rollback: the abandoned updates no longer count, the run's own start does."""
        memory = self._memory
        self._memory = _Memory(observed=memory.observed, baseline=memory.baseline)

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON types; `load` goes on exactly from there."""
        return self._memory.to_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told."""
        self._memory = _Memory.from_dict(state)

    def _remember(
        self, step: int, known: Mapping[str, float], *, verdict: ClipVerdict | None, is_frozen: bool
    ) -> None:
        memory = self._memory
        kept = {name: value for name, value in known.items() if name in WATCHED}
        if memory.observed < BASELINE_UPDATES:
            for name, value in kept.items():
                memory.baseline.setdefault(name, _Mean()).add(value)
        memory.observed += 1
        # A frozen adapter has no gradient: what comes after it would look like an explosion.
        if "grad_norm" in kept and not is_frozen:
            kept |= self._usual_grad_norm(kept["grad_norm"])
        seen = Observation(step, kept, None if verdict is None else verdict.verdict)
        memory.recent = [*memory.recent, seen][-RECENT_UPDATES:]
        if "valid_reward_mean" in known:
            self._remember_validation(step, known["valid_reward_mean"])

    def _usual_grad_norm(self, grad_norm: float) -> dict[str, float]:
        """The running mean before this update, once it rests on enough; then takes this one in."""
        mean = self._memory.grad_norm
        if mean.count < BASELINE_UPDATES:
            mean.add(grad_norm)
            return {}
        usual = mean.value
        moved = GRADIENT_MEMORY * usual + (1 - GRADIENT_MEMORY) * grad_norm
        self._memory.grad_norm = _Mean(moved * mean.count, mean.count)
        return {_USUAL_GRAD_NORM: usual}

    def _remember_validation(self, step: int, held_out_reward: float) -> None:
        history = self._history(None)
        rewards = history.known("reward_mean", SPIKE_UPDATES)
        kls = history.known("kl_reference_per_sequence", SPIKE_UPDATES)
        if not rewards or not kls:
            return
        seen = Validation(step, held_out_reward, _mean(rewards), _mean(kls))
        self._memory.validations = [*self._memory.validations, seen][-VALIDATIONS:]

    def _history(self, verdict: ClipVerdict | None) -> History:
        memory = self._memory
        after = memory.observed - BASELINE_UPDATES
        means = memory.baseline if after > 0 else {}
        return History(
            recent=memory.recent,
            baseline={name: mean.value for name, mean in means.items()},
            settled=max(0, min(after, len(memory.recent))),
            validations=memory.validations,
            verdict=verdict,
        )

    def _finding(self, code: Code, signs: Sequence[Sign]) -> Finding:
        syndrome = SYNDROMES[code]
        return Finding(
            code=code,
            level="critical" if any(each.level == "critical" for each in signs) else "warn",
            since_step=self._memory.since[code],
            message=f"{syndrome.meaning}: {'; '.join(each.text for each in signs)}.",
            evidence=tuple(each.evidence for each in signs),
            actions=(*(advice for each in signs for advice in each.actions), *syndrome.advice),
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
