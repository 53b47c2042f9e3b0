"""What the engine tells of its steps and passes, and the one table of metric names.

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

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Shares of the ratio quantiles `ratio_q01` to `ratio_q99`."""


def quantile_name(share: float) -> str:
    """`ratio_q05` for 0.05."""
    return f"ratio_q{round(share * 100):02d}"


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


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number of a report means."""

    unit: str
    """Unit; "1" for a plain number."""
    formula: str
    """Formula, or how it is measured."""


METRICS: dict[str, Metric] = {
    "reward_mean": Metric("reward", "mean of the raw scores of the step's responses"),
    "reward_std": Metric("reward", "population standard deviation of the raw scores"),
    "reward_p05": Metric("reward", "5th percentile of the raw scores"),
    "reward_p95": Metric("reward", "95th percentile of the raw scores"),
    "valid_reward_mean": Metric("reward", "mean raw score of answers to validation prompts"),
    "kl_reference_per_sequence": Metric(
        "nats per response", "mean over rows of Σ_t D,  D = log π_old − log π_ref"
    ),
    "kl_reference_per_token": Metric("nats per token", "ΣD / N"),
    "kl_reference_exact_per_token": Metric(
        "nats per token", "Σ_t Σ_v π_old·(ln π_old − ln π_ref) / N, over the whole vocabulary"
    ),
    "kl_coef": Metric("reward per nat", "β of the KL penalty in this step's token rewards"),
    "entropy": Metric("nats per token", "ΣH / N,  H = logsumexp(z/τ) − Σ_v softmax(z/τ)_v·z_v/τ"),
    "reference_perplexity": Metric(
        "1", "exp(−Σ log π_ref / N): how odd the frozen base finds the responses"
    ),
    "distinct_2": Metric(
        "share", "different pairs of neighbouring tokens / all pairs, over all responses"
    ),
    "repeated_4gram_fraction": Metric(
        "share", "mean over responses of 1 − different 4-grams / 4-grams; 0 below 4 tokens"
    ),
    "longest_token_run_mean": Metric(
        "tokens", "mean over responses of the longest run of one and the same token"
    ),
    "identical_response_fraction": Metric(
        "share", "responses whose text also answers another prompt of the step / responses"
    ),
    "zero_advantage_group_fraction": Metric(
        "share", "prompts whose responses all got the same score / prompts; null for groups of 1"
    ),
    "reward_limited_fraction": Metric(
        "share", "scores bounded to ±10 by running_std scaling / scores"
    ),
    "policy_loss": Metric("1", "−Σ w·J, mean over the step's passes"),
    "value_loss": Metric(
        "reward²", "Σ w·½·max((V−G)², (V_c−G)²), mean over the passes; in scaled reward units"
    ),
    "advantage_std": Metric("reward", "standard deviation of A before standardizing"),
    "value_explained_variance": Metric("1", "1 − var(G − V_old) / var(G); null if var(G) = 0"),
    "value_bias": Metric("reward", "mean(V_old − G)"),
    "return_std": Metric("reward", "standard deviation of the returns G, in scaled reward units"),
    "kl_loss": Metric("1", "β·Σ w·(KL term), mean over the passes; null unless KL is in the loss"),
    "sampler_mismatch_mean": Metric(
        "nats per token", "mean |log π_old − log π_behavior|: trainer against sampler"
    ),
    "sampler_mismatch_ratio": Metric("1", "mean of exp(|log π_old − log π_behavior|)"),
    "noise_limit": Metric(
        "nats", "log-ratios below this may be rounding: 1e-4, or what the self-check measured"
    ),
    "skipped_passes": Metric("passes", "passes of the step without an optimizer step"),
    "learning_rate": Metric("1", "AdamW's rate of the adapter in this step"),
    "value_learning_rate": Metric("1", "AdamW's rate of the value head in this step"),
    "response_tokens_mean": Metric("tokens", "mean response length"),
    "response_tokens_p95": Metric("tokens", "95th percentile of the response length"),
    "reward_length_correlation": Metric(
        "1", "Pearson correlation of raw score and response length; null if either is constant"
    ),
    "truncated_response_fraction": Metric("share", "rows ended by length / rows"),
    "stopped_response_fraction": Metric("share", "rows ended by a stop token / rows"),
    "prompt_tokens": Metric("tokens", "prompt tokens read, since the start of the job"),
    "response_tokens": Metric("tokens", "response tokens sampled, since the start of the job"),
    "tokens_per_second": Metric("tokens per second", "response tokens of the step / its seconds"),
    "peak_memory_bytes": Metric("bytes", "largest resident memory of the trainer so far"),
    "tokens": Metric("tokens", "N = Σ response_mask, over the passes counted"),
    "sequences": Metric("rows", "rows with response tokens, over the passes counted"),
    "policy_clip_fraction": Metric(
        "share", "(clipped_high + clipped_low + dual_clipped) / N: gradient removed by clipping"
    ),
    "policy_clip_fraction_high": Metric("share", "clipped_high / N"),
    "policy_clip_fraction_low": Metric("share", "clipped_low / N"),
    "policy_clip_fraction_dual": Metric("share", "dual_clipped / N"),
    "policy_clip_fraction_of_positive": Metric("share", "clipped_high / #(A > 0)"),
    "policy_clip_fraction_of_negative": Metric("share", "(clipped_low + dual_clipped) / #(A < 0)"),
    "ratio_above_range_fraction": Metric("share", "#(ρ > 1+ε_high) / N, whatever the sign of A"),
    "ratio_below_range_fraction": Metric("share", "#(ρ < 1−ε_low) / N, whatever the sign of A"),
    "clipped_advantage_mass": Metric("share", "Σ|A| of tokens in clipped classes / Σ|A|"),
    "policy_gradient_kept": Metric("share", "Σρ|A|g / Σρ|A|,  g = 0 where clipped, else 1"),
    "surrogate_unclipped": Metric("1", "Σu / N,  u = ρA"),
    "surrogate_clipped": Metric("1", "Σk / N,  k = clip(ρ, 1−ε_low, 1+ε_high)·A"),
    "surrogate_objective": Metric(
        "1", "ΣJ / N,  J = min(u, k), with a dual clip at least c·A where A < 0"
    ),
    "objective_gap": Metric("1", "Σ(u − J) / N; never negative without a dual clip"),
    "ratio_mean": Metric("1", "Σρ / N,  ρ = π / π_old"),
    "ratio_std": Metric("1", "sqrt(Σρ²/N − (Σρ/N)²)"),
    "ratio_min": Metric("1", "smallest ρ"),
    "ratio_max": Metric("1", "largest ρ"),
    **{
        quantile_name(share): Metric(
            "1", f"ρ below which {share:.0%} of the tokens lie; of several passes, by histogram"
        )
        for share in QUANTILES
    },
    "update_kl_k1": Metric("nats per token", "Σ(−d) / N,  d = log π − log π_old"),
    "update_kl_k2": Metric("nats per token", "Σ(d²/2) / N"),
    "update_kl_k3": Metric("nats per token", "Σ(ρ − 1 − d) / N"),
    "update_kl_k3_max": Metric("nats per token", "largest update_kl_k3 of any pass of the step"),
    "update_kl_per_sequence": Metric("nats per response", "mean over rows of Σ_t (ρ − 1 − d)"),
    "log_ratio_abs_max": Metric("nats", "largest |log π − log π_old|, before it is bounded to 20"),
    "log_ratio_clamped_count": Metric("tokens", "#(|log π − log π_old| > 20)"),
    "ess_token": Metric("share", "(Σρ)² / (N·Σρ²)"),
    "ess_sequence": Metric("share", "(Σρ_i)² / (B·Σρ_i²),  ρ_i = exp(Σ_t d) of row i"),
    "importance_weight_mean": Metric(
        "1", "Σw / N,  w = min(π_old/π_behavior, cap); null where the run uses no weights"
    ),
    "importance_weight_max": Metric("1", "largest w"),
    "importance_weight_capped_fraction": Metric("share", "#(w = cap) / N"),
    "value_clip_fraction": Metric(
        "share", "#((V_c−G)² > (V−G)²) / N: value clipping binds and removes the gradient"
    ),
    "value_out_of_range_fraction": Metric("share", "#(|V − V_old| > ε_v) / N"),
    "grad_norm": Metric("1", "norm of the whole gradient before clipping; mean over passes"),
    "grad_norm_clipped": Metric("share", "1 if grad_norm exceeded max_grad_norm; mean over passes"),
}
"""Every metric by name; `seconds.<part>` (seconds a part of the step took) stands for a family."""


def metrics_table() -> str:
    """`METRICS` as a Markdown table."""
    rows = ["| name | unit | formula |", "|---|---|---|"]
    for name, metric in METRICS.items():
        formula = metric.formula.replace("|", "\\|")
        rows.append(f"| `{name}` | {metric.unit} | {formula} |")
    return "\n".join(rows)
