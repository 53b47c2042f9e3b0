"""When a signal of a run counts as out of the ordinary: limits, baselines, windows, trends.

The ways to go wrong that are told by these signs are in `syndromes`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from ppo_engine.verdicts import ClipVerdict

Level = Literal["warn", "critical"]

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
USUAL_GRAD_NORM = "usual_grad_norm"
"""Running mean of grad_norm before an update; kept among that update's values."""


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
    limited_rewards: Limits
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
    limited_rewards=Limits(0.5, 0.9),
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
    return above(history, metric, scaled(factors, start)) if start > 0 else []


def below_baseline(history: History, metric: str, factors: Limits) -> list[Sign]:
    """A sign if the metric was under fractions of its baseline."""
    start = history.baseline.get(metric, 0.0)
    return below(history, metric, scaled(factors, start)) if start > 0 else []


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
    least = THRESHOLDS.trend_change * abs(before)
    if tau >= THRESHOLDS.trend and change >= least:
        return 1
    return -1 if tau <= -THRESHOLDS.trend and change <= -least else 0


def scaled(factors: Limits, start: float) -> Limits:
    """Limits that are multiples of a number."""
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


def worse_together(signs: Sequence[Sign]) -> list[Sign]:
    """The same signs, critical if they come from two metrics or more."""
    if len({each.evidence.metric for each in signs}) < 2:
        return list(signs)
    return [dataclasses.replace(each, level="critical") for each in signs]
