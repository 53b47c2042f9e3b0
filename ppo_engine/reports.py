"""What the engine tells of its steps and passes; `metrics` says what the numbers mean.

A pass is kept as sums (`PassSums`), so that micro-batches, ranks and passes merge exactly; the
numbers users see are derived from them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, Self

from ppo_engine.buckets import WORST_SEQUENCES, Buckets
from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES, TokenClass
from ppo_engine.histogram import Histogram
from ppo_engine.metrics import QUANTILES, quantile_name


def _add_log(first: float, second: float) -> float:
    """ln(e^first + e^second)."""
    high, low = max(first, second), min(first, second)
    return high if math.isinf(high) else high + math.log1p(math.exp(low - high))


def _largest(first: float, second: float) -> float:
    """The larger one; NaN if one is: Python's `max` may hide it."""
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


def _merged_by(rule: Callable[[float, float], float], start: float) -> Any:
    return field(default=start, metadata={"rule": rule})


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSums:
    """Sums over the response tokens of one pass, or of several; they merge without loss."""

    sequences: int = 0
    """Rows with response tokens."""
    counts: tuple[int, ...] = (0,) * len(TOKEN_CLASSES)
    """Tokens by class, in the order of `TOKEN_CLASSES`."""
    above_range: int = 0
    """Tokens with ρ > 1 + ε_high."""
    below_range: int = 0
    """Tokens with ρ < 1 − ε_low."""
    ratio: float = 0.0
    """Σρ."""
    ratio_square: float = 0.0
    """Σρ²."""
    ratio_min: float = _merged_by(min, math.inf)
    """Smallest ρ."""
    ratio_max: float = _merged_by(_largest, -math.inf)
    """Largest ρ."""
    log_sequence_ratio: float = _merged_by(_add_log, -math.inf)
    """ln Σ_i exp(Σ_t d): sum of the sequences' ratios, as a logarithm because it may be huge."""
    log_sequence_ratio_square: float = _merged_by(_add_log, -math.inf)
    """ln Σ_i exp(2·Σ_t d)."""
    log_ratio_abs_max: float = _merged_by(_largest, 0.0)
    """Largest |d| before it was bounded."""
    log_ratio_clamped: int = 0
    """Tokens whose |d| was beyond the bound."""
    abs_advantage: float = 0.0
    """Σ|A|."""
    abs_advantage_clipped: float = 0.0
    """Σ|A| of the tokens in clipped classes."""
    ratio_abs_advantage: float = 0.0
    """Σρ|A|."""
    ratio_abs_advantage_kept: float = 0.0
    """Σρ|A|·g, g = 0 where the gradient is removed."""
    unclipped: float = 0.0
    """Σu."""
    clipped: float = 0.0
    """Σk."""
    objective: float = 0.0
    """ΣJ."""
    kl_k1: float = 0.0
    """Σ−d."""
    kl_k2: float = 0.0
    """Σd²/2."""
    kl_k3: float = 0.0
    """Σ(ρ − 1 − d)."""
    importance_weight: float = 0.0
    """Σw over the tokens that have a weight."""
    importance_weight_max: float = _merged_by(_largest, -math.inf)
    """Largest w."""
    importance_weights: int = 0
    """Tokens that have a weight: all of them, or none where the run uses none."""
    importance_weights_capped: int = 0
    """Tokens whose weight reached its cap."""
    value_clipped: int = 0
    """Tokens where value clipping binds."""
    value_out_of_range: int = 0
    """Tokens whose value left its window."""
    grad_norm: float = 0.0
    """Gradient norm before clipping, summed over the passes where it is finite."""
    grad_norms: int = 0
    """Passes whose gradient norm is finite."""
    grad_norms_clipped: int = 0
    """Passes whose gradient norm exceeded the limit."""

    def merged(self, other: "PassSums") -> "PassSums":
        """The sums of both together."""
        merged: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name == "counts":
                merged["counts"] = tuple(map(sum, zip(mine, theirs, strict=True)))
            else:
                merged[each.name] = each.metadata.get("rule", _add)(mine, theirs)
        return PassSums(**merged)

    @property
    def tokens(self) -> int:
        """N, the response tokens."""
        return sum(self.counts)

    def count(self, *classes: TokenClass) -> int:
        """Tokens in any of these classes."""
        return sum(self.counts[TOKEN_CLASSES.index(each)] for each in classes)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; None for what is not finite."""
        return {
            name: list(value) if isinstance(value, tuple) else _finite(value)
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The sums that `to_dict` wrote; what was not finite stays unknown (NaN)."""
        if not sum(fields["counts"]):
            known = {"grad_norm", "grad_norms", "grad_norms_clipped"}
            return cls(**{name: fields[name] for name in known})
        values: dict[str, Any] = {n: math.nan if x is None else x for n, x in fields.items()}
        values["counts"] = tuple(fields["counts"])
        return cls(**values)

    def values(self) -> dict[str, float | None]:
        """Every metric that follows from the sums; None where its denominator is 0."""
        return {
            "tokens": self.tokens,
            "sequences": self.sequences,
            **self._clip_values(),
            **self._surrogate_values(),
            **self._ratio_values(),
            **self._drift_values(),
            **self._weight_values(),
            "value_clip_fraction": _share(self.value_clipped, self.tokens),
            "value_out_of_range_fraction": _share(self.value_out_of_range, self.tokens),
            "grad_norm": _share(self.grad_norm, self.grad_norms),
            "grad_norm_clipped": _share(self.grad_norms_clipped, self.grad_norms),
        }

    def _clip_values(self) -> dict[str, float | None]:
        high, low, dual = (
            self.count(each)
            for each in (TokenClass.CLIPPED_HIGH, TokenClass.CLIPPED_LOW, TokenClass.DUAL_CLIPPED)
        )
        positive = high + self.count(TokenClass.UNCLIPPED_OUT_LOW, TokenClass.IN_RANGE_POSITIVE)
        negative = self.tokens - positive - self.count(TokenClass.ZERO_ADVANTAGE)
        return {
            "policy_clip_fraction": _share(self.count(*CLIPPED_CLASSES), self.tokens),
            "policy_clip_fraction_high": _share(high, self.tokens),
            "policy_clip_fraction_low": _share(low, self.tokens),
            "policy_clip_fraction_dual": _share(dual, self.tokens),
            "policy_clip_fraction_of_positive": _share(high, positive),
            "policy_clip_fraction_of_negative": _share(low + dual, negative),
            "ratio_above_range_fraction": _share(self.above_range, self.tokens),
            "ratio_below_range_fraction": _share(self.below_range, self.tokens),
            "clipped_advantage_mass": _share(self.abs_advantage_clipped, self.abs_advantage),
            "policy_gradient_kept": _share(self.ratio_abs_advantage_kept, self.ratio_abs_advantage),
        }

    def _surrogate_values(self) -> dict[str, float | None]:
        return {
            "surrogate_unclipped": _share(self.unclipped, self.tokens),
            "surrogate_clipped": _share(self.clipped, self.tokens),
            "surrogate_objective": _share(self.objective, self.tokens),
            "objective_gap": _share(self.unclipped - self.objective, self.tokens),
        }

    def _ratio_values(self) -> dict[str, float | None]:
        if not self.tokens:
            return dict.fromkeys(
                ("ratio_mean", "ratio_std", "ratio_min", "ratio_max", "ess_token", "ess_sequence")
            )
        mean = self.ratio / self.tokens
        variance = self.ratio_square / self.tokens - mean**2
        log_ess = 2 * self.log_sequence_ratio - self.log_sequence_ratio_square
        return {
            "ratio_mean": _finite(mean),
            "ratio_std": _finite(math.sqrt(max(variance, 0.0))),
            "ratio_min": _finite(self.ratio_min),
            "ratio_max": _finite(self.ratio_max),
            "ess_token": _share(self.ratio**2, self.tokens * self.ratio_square),
            "ess_sequence": _share(math.exp(log_ess), self.sequences),
        }

    def _drift_values(self) -> dict[str, float | None]:
        return {
            "update_kl_k1": _share(self.kl_k1, self.tokens),
            "update_kl_k2": _share(self.kl_k2, self.tokens),
            "update_kl_k3": _share(self.kl_k3, self.tokens),
            "update_kl_per_sequence": _share(self.kl_k3, self.sequences),
            "log_ratio_abs_max": _finite(self.log_ratio_abs_max),
            "log_ratio_clamped_count": self.log_ratio_clamped,
        }

    def _weight_values(self) -> dict[str, float | None]:
        count = self.importance_weights
        return {
            "importance_weight_mean": _share(self.importance_weight, count),
            "importance_weight_max": _finite(self.importance_weight_max) if count else None,
            "importance_weight_capped_fraction": _share(self.importance_weights_capped, count),
        }


def _add(first: float, second: float) -> float:
    return first + second


def _finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None


def _share(part: float, whole: float) -> float | None:
    """A quotient; None where the denominator is 0 or something is not finite."""
    return None if whole == 0 else _finite(part / whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """One optimizer step's tokens, measured before that step."""

    epoch: int
    """Walk over the rollout, from 0."""
    minibatch: int
    """Pass within the walk, from 0."""
    skipped: bool
    """True where the optimizer did not step."""
    sums: PassSums
    """What everything else follows from."""
    ratio_quantiles: Mapping[str, float | None]
    """Exact ones of this pass, by metric name."""
    ratios: Histogram
    """Its ratios, to judge other clip ranges and to merge quantiles."""
    buckets: Buckets = field(default_factory=Buckets)
    """The same classes by place in the response and by old probability."""
    worst_sequences: tuple[dict[str, Any], ...] = ()
    """Responses with the most clipped tokens: `row`, `tokens`, `clipped_tokens`, `ratio_max`."""

    @property
    def values(self) -> dict[str, float | None]:
        """Every metric of the pass."""
        return {**self.sums.values(), **self.ratio_quantiles}

    @property
    def counts(self) -> dict[str, int]:
        """Tokens by class; they add up to all tokens."""
        return dict(zip(TOKEN_CLASSES, self.sums.counts, strict=True))

    @property
    def histogram(self) -> bytes:
        """Little-endian fp32 in the order [sign][n, Σ|A|, Σρ|A|][bin]."""
        return self.ratios.to_bytes()

    def stored_values(self) -> dict[str, Any]:
        """JSON of everything but the histogram; `from_stored` reads it."""
        return {
            **self.values,
            "counts": self.counts,
            "skipped": self.skipped,
            "sums": self.sums.to_dict(),
            "buckets": self.buckets.to_rows(),
            "worst_sequences": list(self.worst_sequences),
        }

    @classmethod
    def from_stored(
        cls,
        epoch: int,
        minibatch: int,
        values: Mapping[str, Any],
        histogram: bytes,
        *,
        edges: Sequence[float],
    ) -> Self:
        """The report that `stored_values` and `histogram` hold; edges of `histogram_edges`."""
        zeros = values["counts"][TokenClass.ZERO_ADVANTAGE]
        return cls(
            epoch=epoch,
            minibatch=minibatch,
            skipped=values["skipped"],
            sums=PassSums.from_dict(values["sums"]),
            ratio_quantiles={name: values[name] for name in map(quantile_name, QUANTILES)},
            ratios=Histogram.from_bytes(histogram, edges, zero_advantage_count=zeros),
            buckets=Buckets.from_rows(values["buckets"]) if "buckets" in values else Buckets(),
            worst_sequences=tuple(values.get("worst_sequences", ())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSummary:
    """Several passes taken together."""

    values: dict[str, float | None]
    """Metrics over all their tokens; the quantiles are interpolated in the histogram."""
    counts: dict[str, int]
    """Tokens by class."""
    skipped: int
    """Passes in which the optimizer did not step."""
    ratios: Histogram
    """Ratios of all."""
    buckets: Buckets
    """Classes of all by place in the response and by old probability."""
    worst_sequences: tuple[dict[str, Any], ...]
    """Responses with the most clipped tokens of any pass, with its `epoch` and `minibatch`."""


def summarize(passes: Sequence[PassReport]) -> PassSummary:
    """One or more passes taken together; every sum is exact."""
    sums = reduce(PassSums.merged, (each.sums for each in passes))
    ratios = reduce(Histogram.merged, (each.ratios for each in passes))
    quantiles = passes[0].ratio_quantiles if len(passes) == 1 else _quantiles(ratios, sums)
    return PassSummary(
        values={**sums.values(), **quantiles},
        counts=dict(zip(TOKEN_CLASSES, sums.counts, strict=True)),
        skipped=sum(each.skipped for each in passes),
        ratios=ratios,
        buckets=reduce(Buckets.merged, (each.buckets for each in passes)),
        worst_sequences=_worst_sequences(passes),
    )


def _worst_sequences(passes: Sequence[PassReport]) -> tuple[dict[str, Any], ...]:
    named = [
        {**row, "epoch": each.epoch, "minibatch": each.minibatch}
        for each in passes
        for row in each.worst_sequences
    ]
    named.sort(key=lambda row: -row["clipped_tokens"])
    return tuple(named[:WORST_SEQUENCES])


def merge_passes(passes: Sequence[PassReport]) -> dict[str, float | None]:
    """The metrics of a step: all its passes taken together."""
    return summarize(passes).values


def _quantiles(ratios: Histogram, sums: PassSums) -> dict[str, float | None]:
    """Quantiles of merged passes; tokens with advantage 0 are in no bin and do not count."""
    return {
        quantile_name(share): ratios.quantile(share, low=sums.ratio_min, high=sums.ratio_max)
        for share in QUANTILES
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEvent:
    """Something worth telling the user."""

    level: Literal["info", "warn", "error"]
    """How bad it is."""
    code: str
    """Stable name."""
    message: str
    """One sentence."""
    data: dict[str, Any]
    """Numbers behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one update did."""

    step: int
    """From 1."""
    values: dict[str, float | None]
    """Metrics by name; None where undefined."""
    passes: tuple[PassReport, ...]
    """In order."""
    events: tuple[EngineEvent, ...]
    """What happened in it."""
    samples: tuple[dict[str, Any], ...]
    """Stored responses with their scores."""
    tokens: tuple[dict[str, Any], ...] = ()
    """The tokens of the stored responses, one by one, as the last epoch met them."""
    wants_pause: bool = False
    """Whether a guard asks to pause the run after this step."""
