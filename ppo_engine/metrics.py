"""The one table of metrics: what each number of a report is, its unit, and how it looks in health.

The API's descriptions and `docs/ppo.md` are made from it.  Ranges are rules of thumb for tasks like
those in the documentation, not laws.
"""

from dataclasses import dataclass

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Shares of the ratio quantiles `ratio_q01` to `ratio_q99`."""


def quantile_name(share: float) -> str:
    """`ratio_q05` for 0.05."""
    return f"ratio_q{round(share * 100):02d}"


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number of a report means."""

    unit: str
    """Unit; "1" for a plain number."""
    formula: str
    """Formula, or how it is measured."""
    healthy: str
    """What it looks like in a run that goes well."""


METRICS: dict[str, Metric] = {
    "reward_mean": Metric(
        "reward",
        "mean of the raw scores of the step's responses",
        "rises, then levels off",
    ),
    "reward_std": Metric(
        "reward",
        "population standard deviation of the raw scores",
        "well above 0; 0 teaches nothing",
    ),
    "reward_p05": Metric(
        "reward",
        "5th percentile of the raw scores",
        "rises with the mean",
    ),
    "reward_p95": Metric(
        "reward",
        "95th percentile of the raw scores",
        "rises; at the reward's maximum there is nothing left to gain",
    ),
    "valid_reward_mean": Metric(
        "reward",
        "mean raw score of answers to validation prompts",
        "follows reward_mean; flat while that rises is reward hacking",
    ),
    "kl_reference_per_sequence": Metric(
        "nats per response",
        "mean over rows of Σ_t D,  D = log π_old − log π_ref",
        "0 at first, then slowly up; below 10, or near the adaptive target",
    ),
    "kl_reference_per_token": Metric(
        "nats per token",
        "ΣD / N",
        "below 0.3",
    ),
    "kl_reference_exact_per_token": Metric(
        "nats per token",
        "Σ_t Σ_v π_old·(ln π_old − ln π_ref) / N, over the whole vocabulary",
        "close to kl_reference_per_token; never negative",
    ),
    "kl_coef": Metric(
        "reward per nat",
        "β of the KL penalty in this step's token rewards",
        "as set; under the adaptive controller within 10 times either way",
    ),
    "entropy": Metric(
        "nats per token",
        "ΣH / N,  H = logsumexp(z/τ) − Σ_v softmax(z/τ)_v·z_v/τ",
        "0.3 to 2 times that of the first steps",
    ),
    "reference_perplexity": Metric(
        "1",
        "exp(−Σ log π_ref / N): how odd the frozen base finds the responses",
        "near that of the first steps; rising is odd text",
    ),
    "distinct_2": Metric(
        "share",
        "different pairs of neighbouring tokens / all pairs, over all responses",
        "above half of that of the first steps",
    ),
    "repeated_4gram_fraction": Metric(
        "share",
        "mean over responses of 1 − different 4-grams / 4-grams; 0 below 4 tokens",
        "below 0.2",
    ),
    "longest_token_run_mean": Metric(
        "tokens",
        "mean over responses of the longest run of one and the same token",
        "1 to 3",
    ),
    "identical_response_fraction": Metric(
        "share",
        "responses whose text also answers another prompt of the step / responses",
        "near 0",
    ),
    "zero_advantage_group_fraction": Metric(
        "share",
        "prompts whose responses all got the same score / prompts; null for groups of 1",
        "below 0.5",
    ),
    "reward_limited_fraction": Metric(
        "share",
        "scores bounded to ±10 by running_std scaling / scores",
        "0; above, large rewards look alike",
    ),
    "policy_loss": Metric(
        "1",
        "−Σ w·J, mean over the step's passes",
        "small, around 0; its size says nothing",
    ),
    "value_loss": Metric(
        "reward²",
        "Σ w·½·max((V−G)², (V_c−G)²), mean over the passes; in scaled reward units",
        "falls in the first steps",
    ),
    "advantage_std": Metric(
        "reward",
        "standard deviation of A before standardizing",
        "above 0",
    ),
    "value_explained_variance": Metric(
        "1",
        "1 − var(G − V_old) / var(G); null if var(G) = 0",
        "0 to 1 after some steps; below 0 the critic harms",
    ),
    "value_bias": Metric(
        "reward",
        "mean(V_old − G)",
        "small against return_std",
    ),
    "return_std": Metric(
        "reward",
        "standard deviation of the returns G, in scaled reward units",
        "about 1 with running_std",
    ),
    "kl_loss": Metric(
        "1",
        "β·Σ w·(KL term), mean over the passes; null unless KL is in the loss",
        "small against the reward's scale",
    ),
    "sampler_mismatch_mean": Metric(
        "nats per token",
        "mean |log π_old − log π_behavior|: trainer against sampler",
        "below 1e-4 in fp32, 0.05 in bf16",
    ),
    "sampler_mismatch_ratio": Metric(
        "1",
        "mean of exp(|log π_old − log π_behavior|)",
        "below 1.02",
    ),
    "noise_limit": Metric(
        "nats",
        "log-ratios below this may be rounding: 1e-4, or what the self-check measured",
        "1e-4; in bf16 up to 0.05",
    ),
    "nonfinite_passes": Metric(
        "passes", "passes of the step whose loss or gradient was not finite; they are skipped", "0"
    ),
    "skipped_passes": Metric(
        "passes",
        "passes of the step without an optimizer step",
        "0",
    ),
    "learning_rate": Metric(
        "1",
        "AdamW's rate of the adapter in this step",
        "as set",
    ),
    "value_learning_rate": Metric(
        "1",
        "AdamW's rate of the value head in this step",
        "as set",
    ),
    "response_tokens_mean": Metric(
        "tokens",
        "mean response length",
        "0.3 to 2 times that of the first steps",
    ),
    "response_tokens_p95": Metric(
        "tokens",
        "95th percentile of the response length",
        "below max_response_tokens",
    ),
    "reward_length_correlation": Metric(
        "1",
        "Pearson correlation of raw score and response length; null if either is constant",
        "below 0.6 either way",
    ),
    "truncated_response_fraction": Metric(
        "share",
        "rows ended by length / rows",
        "below 0.2",
    ),
    "stopped_response_fraction": Metric(
        "share",
        "rows ended by a stop token / rows",
        "above 0.8",
    ),
    "prompt_tokens": Metric(
        "tokens",
        "prompt tokens read, since the start of the job",
        "counts up",
    ),
    "response_tokens": Metric(
        "tokens",
        "response tokens sampled, since the start of the job",
        "counts up",
    ),
    "tokens_per_second": Metric(
        "tokens per second",
        "response tokens of the step / its seconds",
        "steady",
    ),
    "peak_memory_bytes": Metric(
        "bytes",
        "largest resident memory of the trainer so far",
        "flat after the first steps",
    ),
    "tokens": Metric(
        "tokens",
        "N = Σ response_mask, over the passes counted",
        "> 0",
    ),
    "sequences": Metric(
        "rows",
        "rows with response tokens, over the passes counted",
        "> 0",
    ),
    "policy_clip_fraction": Metric(
        "share",
        "(clipped_high + clipped_low + dual_clipped) / N: gradient removed by clipping",
        "0.01 to 0.1; above 0.3 clipping is tight",
    ),
    "policy_clip_fraction_high": Metric(
        "share",
        "clipped_high / N",
        "of the size of _low",
    ),
    "policy_clip_fraction_low": Metric(
        "share",
        "clipped_low / N",
        "of the size of _high",
    ),
    "policy_clip_fraction_dual": Metric(
        "share",
        "dual_clipped / N",
        "near 0",
    ),
    "policy_clip_fraction_of_positive": Metric(
        "share",
        "clipped_high / #(A > 0)",
        "below 0.3",
    ),
    "policy_clip_fraction_of_negative": Metric(
        "share",
        "(clipped_low + dual_clipped) / #(A < 0)",
        "below 0.3",
    ),
    "ratio_above_range_fraction": Metric(
        "share",
        "#(ρ > 1+ε_high) / N, whatever the sign of A",
        "below 0.3",
    ),
    "ratio_below_range_fraction": Metric(
        "share",
        "#(ρ < 1−ε_low) / N, whatever the sign of A",
        "below 0.3",
    ),
    "clipped_advantage_mass": Metric(
        "share",
        "Σ|A| of tokens in clipped classes / Σ|A|",
        "below 0.5",
    ),
    "policy_gradient_kept": Metric(
        "share",
        "Σρ|A|g / Σρ|A|,  g = 0 where clipped, else 1",
        "above 0.5",
    ),
    "surrogate_unclipped": Metric(
        "1",
        "Σu / N,  u = ρA",
        "above surrogate_objective, slightly",
    ),
    "surrogate_clipped": Metric(
        "1",
        "Σk / N,  k = clip(ρ, 1−ε_low, 1+ε_high)·A",
        "near surrogate_unclipped",
    ),
    "surrogate_objective": Metric(
        "1",
        "ΣJ / N,  J = min(u, k), with a dual clip at least c·A where A < 0",
        "around 0 in the first pass, then up",
    ),
    "objective_gap": Metric(
        "1",
        "Σ(u − J) / N; never negative without a dual clip",
        "small against |surrogate_objective|",
    ),
    "ratio_mean": Metric(
        "1",
        "Σρ / N,  ρ = π / π_old",
        "1 ± 0.05",
    ),
    "ratio_std": Metric(
        "1",
        "sqrt(Σρ²/N − (Σρ/N)²)",
        "below 0.3",
    ),
    "ratio_min": Metric(
        "1",
        "smallest ρ",
        "above 0.1",
    ),
    "ratio_max": Metric(
        "1",
        "largest ρ",
        "below 10",
    ),
    "ratio_q01": Metric(
        "1",
        "ρ below which 1% of the tokens lie; of several passes, by histogram",
        "above 0.5",
    ),
    "ratio_q05": Metric(
        "1",
        "ρ below which 5% of the tokens lie; of several passes, by histogram",
        "above 0.7",
    ),
    "ratio_q25": Metric(
        "1",
        "ρ below which 25% of the tokens lie; of several passes, by histogram",
        "0.9 to 1",
    ),
    "ratio_q50": Metric(
        "1",
        "ρ below which 50% of the tokens lie; of several passes, by histogram",
        "1 ± 0.02",
    ),
    "ratio_q75": Metric(
        "1",
        "ρ below which 75% of the tokens lie; of several passes, by histogram",
        "1 to 1.1",
    ),
    "ratio_q95": Metric(
        "1",
        "ρ below which 95% of the tokens lie; of several passes, by histogram",
        "below 1.3",
    ),
    "ratio_q99": Metric(
        "1",
        "ρ below which 99% of the tokens lie; of several passes, by histogram",
        "below 2",
    ),
    "update_kl_k1": Metric(
        "nats per token",
        "Σ(−d) / N,  d = log π − log π_old",
        "near update_kl_k3",
    ),
    "update_kl_k2": Metric(
        "nats per token",
        "Σ(d²/2) / N",
        "near update_kl_k3",
    ),
    "update_kl_k3": Metric(
        "nats per token",
        "Σ(ρ − 1 − d) / N",
        "1e-5 to 0.03; above 0.1 the step is too large",
    ),
    "update_kl_k3_max": Metric(
        "nats per token",
        "largest update_kl_k3 of any pass of the step",
        "below 1.5 times target_kl",
    ),
    "update_kl_per_sequence": Metric(
        "nats per response",
        "mean over rows of Σ_t (ρ − 1 − d)",
        "below 1",
    ),
    "log_ratio_abs_max": Metric(
        "nats",
        "largest |log π − log π_old|, before it is bounded to 20",
        "below 2.3",
    ),
    "log_ratio_clamped_count": Metric(
        "tokens",
        "#(|log π − log π_old| > 20)",
        "0",
    ),
    "ess_token": Metric(
        "share",
        "(Σρ)² / (N·Σρ²)",
        "above 0.5",
    ),
    "ess_sequence": Metric(
        "share",
        "(Σρ_i)² / (B·Σρ_i²),  ρ_i = exp(Σ_t d) of row i",
        "above 0.3",
    ),
    "importance_weight_mean": Metric(
        "1",
        "Σw / N,  w = min(π_old/π_behavior, cap); null where the run uses no weights",
        "1 ± 0.05",
    ),
    "importance_weight_max": Metric(
        "1",
        "largest w",
        "below its cap",
    ),
    "importance_weight_capped_fraction": Metric(
        "share",
        "#(w = cap) / N",
        "below 0.05",
    ),
    "value_clip_fraction": Metric(
        "share",
        "#((V_c−G)² > (V−G)²) / N: value clipping binds and removes the gradient",
        "below 0.5",
    ),
    "value_out_of_range_fraction": Metric(
        "share",
        "#(|V − V_old| > ε_v) / N",
        "below 0.5",
    ),
    "grad_norm": Metric(
        "1",
        "norm of the whole gradient before clipping; mean over passes",
        "steady; 10 times its usual size is a warning",
    ),
    "grad_norm_clipped": Metric(
        "share",
        "1 if grad_norm exceeded max_grad_norm; mean over passes",
        "not always 1",
    ),
}
"""Every metric by name; `seconds.<part>` (seconds a part of the step took) stands for a family."""


def metrics_table() -> str:
    """`METRICS` as a Markdown table."""
    rows = ["| name | unit | formula | healthy |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        cells = (metric.unit, metric.formula, metric.healthy)
        escaped = (cell.replace("|", "\\|") for cell in cells)
        rows.append(f"| `{name}` | {' | '.join(escaped)} |")
    return "\n".join(rows)
