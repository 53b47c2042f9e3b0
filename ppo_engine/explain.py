"""The clip rule in plain numbers: one token explained, and other clip ranges judged afterwards.

Twin of `losses` and `clip_stats` for readers without torch; tests prove that they agree.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from ppo_engine.errors import InvalidConfig
from ppo_engine.histogram import Bin, Histogram, single


class TokenClass(StrEnum):
    """What the clip rule does with a token; every token is in exactly one class."""

    ZERO_ADVANTAGE = "zero_advantage"
    DUAL_CLIPPED = "dual_clipped"
    CLIPPED_HIGH = "clipped_high"
    CLIPPED_LOW = "clipped_low"
    UNCLIPPED_OUT_LOW = "unclipped_out_low"
    UNCLIPPED_OUT_HIGH = "unclipped_out_high"
    IN_RANGE_POSITIVE = "in_range_positive"
    IN_RANGE_NEGATIVE = "in_range_negative"


TOKEN_CLASSES = tuple(token_class.value for token_class in TokenClass)
"""Names in the order of their numbers in `clip_stats.classify`."""

CLIPPED_CLASSES = (TokenClass.CLIPPED_HIGH, TokenClass.CLIPPED_LOW, TokenClass.DUAL_CLIPPED)
"""Those whose policy gradient clipping removes."""

_SENTENCES = {
    TokenClass.ZERO_ADVANTAGE: (
        "The advantage is 0: the token was neither better nor worse than expected, so there is "
        "nothing to learn from it."
    ),
    TokenClass.DUAL_CLIPPED: (
        "A bad token has become {ratio:.4g} times as likely, more than the dual clip "
        "{dual_clip:g}: its weight is too large to trust, so its gradient is removed."
    ),
    TokenClass.CLIPPED_HIGH: (
        "A good token is already {ratio:.4g} times as likely, above the upper bound {high:.4g}: "
        "the push stops and its gradient is removed."
    ),
    TokenClass.CLIPPED_LOW: (
        "A bad token is already down to {ratio:.4g} times its old probability, below the lower "
        "bound {low:.4g}: min takes the lower, clipped value, so the push stops and its gradient "
        "is removed."
    ),
    TokenClass.UNCLIPPED_OUT_LOW: (
        "A good token has become rarer, {ratio:.4g} times its old probability, below the lower "
        "bound {low:.4g}: min takes the unclipped value, so its gradient stays and pulls it back."
    ),
    TokenClass.UNCLIPPED_OUT_HIGH: (
        "A bad token has become {ratio:.4g} times as likely, above the upper bound {high:.4g}: "
        "min takes the unclipped value, so its gradient stays, with the full weight of the ratio."
    ),
    TokenClass.IN_RANGE_POSITIVE: (
        "The ratio {ratio:.4g} lies within [{low:.4g}, {high:.4g}]: clipping does nothing, and "
        "the good token is made likelier."
    ),
    TokenClass.IN_RANGE_NEGATIVE: (
        "The ratio {ratio:.4g} lies within [{low:.4g}, {high:.4g}]: clipping does nothing, and "
        "the bad token is made rarer."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What the clip rule does with one token, and why."""

    ratio: float
    """ρ, current over old probability."""
    advantage: float
    """A."""
    unclipped: float
    """u = ρ·A."""
    clipped_ratio: float
    """The ratio moved into the range."""
    clipped: float
    """k = clipped ratio · A."""
    objective: float
    """J, what the loss takes."""
    branch: Literal["unclipped", "clipped", "dual"]
    """Which term J is."""
    token_class: TokenClass
    """The token's class."""
    gradient_kept: bool
    """False where clipping removes the policy gradient."""
    d_objective_d_logprob: float
    """∂J/∂log π: ρ·A where the gradient is kept, else 0."""
    explanation: str
    """One or two sentences for the user."""

    def to_dict(self) -> dict[str, Any]:
        """The fields under their names in the API."""
        return {
            "ratio": self.ratio,
            "advantage": self.advantage,
            "unclipped": self.unclipped,
            "clipped_ratio": self.clipped_ratio,
            "clipped": self.clipped,
            "objective": self.objective,
            "branch": self.branch,
            "class": self.token_class.value,
            "gradient_kept": self.gradient_kept,
            "d_objective_d_logprob": self.d_objective_d_logprob,
            "explanation": self.explanation,
        }


def explain(
    ratio: float,
    advantage: float,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Explanation:
    """What PPO's clipped objective does with a token of this ratio and advantage."""
    high_range = clip_range if clip_range_high is None else clip_range_high
    _check_clip_rule(clip_range, high_range, dual_clip)
    _check_token(ratio, advantage)
    low, high = 1 - clip_range, 1 + high_range
    clipped_ratio = min(max(ratio, low), high)
    unclipped, clipped = ratio * advantage, clipped_ratio * advantage
    objective = min(unclipped, clipped)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    token_class = _classify(ratio, advantage, low=low, high=high, dual_clip=dual_clip)
    is_kept = token_class not in CLIPPED_CLASSES
    return Explanation(
        ratio=ratio,
        advantage=advantage,
        unclipped=unclipped,
        clipped_ratio=clipped_ratio,
        clipped=clipped,
        objective=objective,
        branch=_branch(token_class),
        token_class=token_class,
        gradient_kept=is_kept,
        d_objective_d_logprob=unclipped if is_kept else 0.0,
        explanation=_SENTENCES[token_class].format(
            ratio=ratio, low=low, high=high, dual_clip=dual_clip
        ),
    )


def _classify(
    ratio: float, advantage: float, *, low: float, high: float, dual_clip: float | None
) -> TokenClass:
    """The first class from the top whose condition holds."""
    if advantage == 0:
        return TokenClass.ZERO_ADVANTAGE
    if advantage > 0:
        if ratio > high:
            return TokenClass.CLIPPED_HIGH
        return TokenClass.UNCLIPPED_OUT_LOW if ratio < low else TokenClass.IN_RANGE_POSITIVE
    if dual_clip is not None and ratio > dual_clip:
        return TokenClass.DUAL_CLIPPED
    if ratio < low:
        return TokenClass.CLIPPED_LOW
    return TokenClass.UNCLIPPED_OUT_HIGH if ratio > high else TokenClass.IN_RANGE_NEGATIVE


def _branch(token_class: TokenClass) -> Literal["unclipped", "clipped", "dual"]:
    if token_class is TokenClass.DUAL_CLIPPED:
        return "dual"
    return "clipped" if token_class in CLIPPED_CLASSES else "unclipped"


def _check_clip_rule(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 < clip_low < 1:
        raise InvalidConfig(
            f"clip_range must lie in (0, 1), got {clip_low}; usual is 0.1 to 0.3",
            param="clip_range",
        )
    if not 0 < clip_high < math.inf:
        raise InvalidConfig(
            f"clip_range_high must be positive, got {clip_high}; usual is 0.2 to 0.3",
            param="clip_range_high",
        )
    if dual_clip is not None and not 1 + clip_high < dual_clip < math.inf:
        raise InvalidConfig(
            f"dual_clip must exceed the upper bound {1 + clip_high:g}, got {dual_clip}; usual is 3",
            param="dual_clip",
        )


def _check_token(ratio: float, advantage: float) -> None:
    if not 0 < ratio < math.inf:
        raise InvalidConfig(f"ratio must be positive and finite, got {ratio}", param="ratio")
    if not math.isfinite(advantage):
        raise InvalidConfig(f"advantage must be finite, got {advantage}", param="advantage")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """What another clip range would have done to the tokens of a histogram.

    It judges these recorded tokens; training with that range would have met others.
    """

    clip_range: float
    clip_range_high: float
    dual_clip: float | None
    values: dict[str, float | None]
    """By metric name; None where a bound lies inside a bin and only `bounds` are known."""
    bounds: dict[str, tuple[float, float]]
    """Lower and upper limit by metric name; equal where the value is exact."""

    @property
    def exact(self) -> bool:
        """True where every bound lies on an edge between bins."""
        return all(low == high for low, high in self.bounds.values())


@dataclass(frozen=True, slots=True)
class _Interval:
    """A sum known to lie between two limits."""

    low: float
    high: float

    def __add__(self, other: "_Interval") -> "_Interval":
        return _Interval(self.low + other.low, self.high + other.high)

    def __neg__(self) -> "_Interval":
        return _Interval(-self.high, -self.low)

    def over(self, denominator: float) -> "_Interval":
        """Both limits divided by a positive number; zero when there is nothing to divide."""
        if denominator == 0:
            return _Interval(0.0, 0.0)
        return _Interval(self.low / denominator, self.high / denominator)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    """The tokens beyond one bound: their sums, and Σ|ρ − bound|·|A| over them."""

    count: _Interval
    abs_advantage: _Interval
    ratio_abs_advantage: _Interval
    excess: _Interval


def sweep(
    histogram: Histogram, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> SweepPoint:
    """What a clip range would have done to the tokens of this histogram.

    Exact where the bounds are edges of the histogram, which the run's own always are.
    """
    _check_clip_rule(clip_low, clip_high, dual_clip)
    high = _tail(histogram, "positive", 1 + clip_high, above=True)
    low = _tail(histogram, "negative", 1 - clip_low, above=False)
    dual_bound = math.inf if dual_clip is None else dual_clip
    dual = _tail(histogram, "negative", dual_bound, above=True)
    tokens = histogram.total("count") + histogram.zero_advantage_count
    weight = histogram.total("ratio_abs_advantage")
    removed = high.ratio_abs_advantage + low.ratio_abs_advantage + dual.ratio_abs_advantage
    mass = high.abs_advantage + low.abs_advantage + dual.abs_advantage
    lost = removed.over(weight)
    bounds = {
        "policy_clip_fraction": (high.count + low.count + dual.count).over(tokens),
        "policy_clip_fraction_high": high.count.over(tokens),
        "policy_clip_fraction_low": low.count.over(tokens),
        "policy_clip_fraction_dual": dual.count.over(tokens),
        "clipped_advantage_mass": mass.over(histogram.total("abs_advantage")),
        "policy_gradient_kept": _Interval(1 - lost.high, 1 - lost.low),
        "objective_gap": (high.excess + low.excess + -dual.excess).over(tokens),
    }
    return SweepPoint(
        clip_range=clip_low,
        clip_range_high=clip_high,
        dual_clip=dual_clip,
        values={name: x.low if x.low == x.high else None for name, x in bounds.items()},
        bounds={name: (x.low, x.high) for name, x in bounds.items()},
    )


def _tail(histogram: Histogram, sign: str, bound: float, *, above: bool) -> _Tail:
    """Sums over the tokens of one sign strictly beyond the bound."""
    whole: list[Bin] = []
    split: list[Bin] = []
    at = single(bound)
    for each in histogram.bins(sign):
        left, right = single(each.low), single(each.high)
        if left >= at if above else right <= at:
            whole.append(each)
        elif left < at < right:
            split.append(each)
    return _Tail(
        count=_limits([x.count for x in whole], [x.count for x in split]),
        abs_advantage=_limits([x.abs_advantage for x in whole], [x.abs_advantage for x in split]),
        ratio_abs_advantage=_limits(
            [x.ratio_abs_advantage for x in whole], [x.ratio_abs_advantage for x in split]
        ),
        excess=_excess(whole, split, bound, above=above),
    )


def _limits(whole: list[float], split: list[float]) -> _Interval:
    """Of a split bin, anything between nothing and everything may lie beyond the bound."""
    certain = math.fsum(whole)
    return _Interval(certain, certain + math.fsum(split))


def _excess(whole: list[Bin], split: list[Bin], bound: float, *, above: bool) -> _Interval:
    """Σ|ρ − bound|·|A| over the tokens beyond the bound.

    |ρ − bound| beyond the bound, else 0, is convex in ρ: over a split bin its weighted sum is at
    least that of the bin's mean (Jensen) and at most that of the chord over the bin.
    """
    if not whole and not split:
        return _Interval(0.0, 0.0)
    sign = 1.0 if above else -1.0
    certain = math.fsum(sign * (x.ratio_abs_advantage - bound * x.abs_advantage) for x in whole)
    least = most = certain
    for x in split:
        least += max(sign * (x.ratio_abs_advantage - bound * x.abs_advantage), 0.0)
        most += max(_chord(x, bound, above=above), 0.0)
    return _Interval(least, max(most, least))


def _chord(x: Bin, bound: float, *, above: bool) -> float:
    """Weighted sum over the bin of the line from 0 at its inner edge to its outer edge."""
    if above:
        slope = 1.0 if math.isinf(x.high) else (x.high - bound) / (x.high - x.low)
        return slope * (x.ratio_abs_advantage - x.low * x.abs_advantage)
    slope = (bound - x.low) / (x.high - x.low)
    return slope * (x.high * x.abs_advantage - x.ratio_abs_advantage)
