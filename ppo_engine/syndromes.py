"""The known ways in which PPO goes wrong: how each shows in the metrics, what it means, what helps.

Every detector is a pure function of a short `History`; nothing is kept here.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ppo_engine.signs import (
    REWARD_ROUNDING,
    SPIKE_UPDATES,
    STREAK_UPDATES,
    THRESHOLDS,
    USUAL_GRAD_NORM,
    VALIDATIONS,
    Advice,
    Evidence,
    History,
    Level,
    Limits,
    MonitorSettings,
    Observation,
    Sign,
    above,
    above_baseline,
    below,
    below_baseline,
    grown_above,
    is_falling,
    is_rising,
    scaled,
    worse_together,
)
from ppo_engine.verdicts import CUT_OFFS, ClipVerdict

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
        limits = scaled(THRESHOLDS.kl_to_target, settings.target_kl_per_sequence)
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
    return worse_together([*signs, *words])


def entropy_explosion(history: History, _: MonitorSettings) -> list[Sign]:
    """The policy dissolves into noise."""
    signs = above_baseline(history, "entropy", THRESHOLDS.entropy_growth)
    if not signs:
        return []
    limits = Limits(THRESHOLDS.perplexity_growth)
    return worse_together([*signs, *above_baseline(history, "reference_perplexity", limits)])


def repetition(history: History, _: MonitorSettings) -> list[Sign]:
    """Answers repeat themselves."""
    return [
        *grown_above(history, "repeated_4gram_fraction", THRESHOLDS.repeated_4grams),
        *grown_above(history, "longest_token_run_mean", THRESHOLDS.longest_run),
    ]


def reward_hacking(history: History, _: MonitorSettings) -> list[Sign]:
    """The score rises for a reason that nobody wanted."""
    return worse_together(
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
    return worse_together(
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
    shown = _shown(verdict)
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


def _shown(verdict: ClipVerdict) -> _Shown:
    """The number that the verdict was judged on."""
    fraction, mass = "policy_clip_fraction", "clipped_advantage_mass"
    match verdict.verdict:
        case "numeric_noise":
            limit = verdict.numbers.get("noise_limit") or CUT_OFFS.noise_log_ratio
            return _Shown("noise_log_ratio_abs_max", "log_ratio_abs_max", limit, "precision")
        case "dead":
            return _Shown("update_kl_k3", "update_kl_k3", CUT_OFFS.dead_update_kl, "learning_rate")
        case "tight" if (verdict.numbers.get(fraction) or 0.0) > CUT_OFFS.tight_clip_fraction:
            return _Shown(fraction, fraction, CUT_OFFS.tight_clip_fraction, "learning_rate")
        case "tight":
            return _Shown(mass, mass, CUT_OFFS.tight_advantage_mass, "learning_rate")
        case _:
            return _Shown(fraction, fraction, 0.0, "epochs")


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
    return [*_limited_rewards(history), *_constant_groups(history, settings)]


def _limited_rewards(history: History) -> list[Sign]:
    metric, limits = "reward_limited_fraction", THRESHOLDS.limited_rewards
    advice = Advice(
        kind="setting",
        param="reward_scaling",
        text="Set reward_scaling to none: the rewards differ little for their size.",
    )
    return _lasting(
        history,
        metric,
        limits,
        text="{share:.0%} of the rewards or more were bounded to 10 standard deviations",
        advice=advice,
    )


def _constant_groups(history: History, settings: MonitorSettings) -> list[Sign]:
    if settings.group_size == 1:
        return []
    advice = Advice(
        kind="setting",
        param="group_size",
        text="Raise group_size, so that more prompts get answers that differ in reward.",
    )
    return _lasting(
        history,
        "zero_advantage_group_fraction",
        THRESHOLDS.constant_groups,
        text="{share:.0%} of the prompts or more got the same reward for all their answers",
        advice=advice,
    )


def _lasting(
    history: History, metric: str, limits: Limits, *, text: str, advice: Advice
) -> list[Sign]:
    """A sign if a share exceeded a limit in each of the newest updates."""
    shares = history.streak(metric, SPIKE_UPDATES)
    if not shares or min(shares) <= limits.warn:
        return []
    is_critical = limits.critical is not None and min(shares) > limits.critical
    level: Level = "critical" if is_critical else "warn"
    evidence = history.evidence(metric, min(shares), limits.warn, SPIKE_UPDATES)
    told = f"in {SPIKE_UPDATES} steps in a row {text.format(share=min(shares))}"
    return [Sign(level, evidence, told, (advice,))]


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
    count = observation.values.get("nonfinite_passes", 0.0)
    if count == 0:
        return None
    text = (
        f"in {count:.0f} passes of step {observation.step} loss or gradient was not finite, so "
        "nothing was learned from them"
    )
    return Sign("warn", _of(observation, "nonfinite_passes", count, 0.0), text)


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
    limit = THRESHOLDS.grad_norm_growth * observation.values.get(USUAL_GRAD_NORM, math.inf)
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
        "reward_limited_fraction",
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
        "nonfinite_passes",
        "log_ratio_abs_max",
        "log_ratio_clamped_count",
        "grad_norm",
    }
)
"""Metrics that are kept; `valid_reward_mean` is kept apart, being rare."""
