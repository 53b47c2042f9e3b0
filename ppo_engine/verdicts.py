"""What the clip statistics of one update amount to: a verdict, a sentence, a suggestion.

Judged are the sums of its passes; what several updates show together is `diagnosis`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

from ppo_engine.explain import TokenClass
from ppo_engine.reports import PassReport, PassSummary, summarize

VerdictName = Literal["inactive_by_construction", "numeric_noise", "dead", "tight", "ok"]
Cause = Literal[
    "one_pass",
    "zero_learning_rate",
    "frozen_adapter",
    "zero_advantages",
    "skipped_passes",
    "untrained_adapter",
    "small_learning_rate",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOffs:
    """Where one verdict ends and the next begins."""

    noise_log_ratio: float
    """|log ratio| in the first pass that fp32 explains; in bf16 the caller knows a larger one."""
    dead_clip_fraction: float
    """Clip fraction of every later pass up to which clipping is dead."""
    dead_update_kl: float
    """Update KL of every later pass below which the policy stood still, in nats per token."""
    tight_clip_fraction: float
    """Clip fraction above which clipping is tight."""
    tight_advantage_mass: float
    """Clipped share of Σ|A| above which clipping is tight."""
    usual_clip_fraction: float
    """Clip fraction from which it is usual; below it is quiet."""
    busy_clip_fraction: float
    """Clip fraction from which it is busy."""
    one_sided_clip_fraction: float
    """Clip fraction up to which nobody asks which side it is on."""
    one_sided_ratio: float
    """Times that one side must exceed the other."""

    def to_dict(self) -> dict[str, float]:
        """The cut-offs by name, to be stored with a run."""
        return dataclasses.asdict(self)


CUT_OFFS = CutOffs(
    noise_log_ratio=1e-4,
    dead_clip_fraction=1e-4,
    dead_update_kl=1e-5,
    tight_clip_fraction=0.30,
    tight_advantage_mass=0.5,
    usual_clip_fraction=0.01,
    busy_clip_fraction=0.10,
    one_sided_clip_fraction=0.01,
    one_sided_ratio=5.0,
)
"""Those in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipVerdict:
    """What clipping did in one update, in words and numbers."""

    verdict: VerdictName
    """The first of these, in this order, whose condition holds."""
    one_sided: bool
    """True where one bound binds far more often than the other."""
    sentence: str
    """What was found, for the user."""
    suggestion: str
    """What to change, if anything."""
    numbers: dict[str, float | None]
    """What it was judged on, by metric name; `noise_` stands before those of the first pass."""
    cause: Cause | None = None
    """Why nothing is clipped, where the verdict says so."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)


def clip_verdict(
    passes: Sequence[PassReport],
    *,
    epochs: int,
    minibatches: int,
    learning_rate: float,
    precision: str,
    is_adapter_frozen: bool,
    noise_limit: float,
) -> ClipVerdict:
    """The verdict on one update; `noise_limit` bounds |log ratio| of its first pass.

    `learning_rate` is the rate in effect.  Skipped passes count: they were measured too.
    """
    numbers = _numbers(passes) | {"learning_rate": learning_rate, "noise_limit": noise_limit}
    cause = _construction(
        passes_planned=epochs * minibatches,
        learning_rate=learning_rate,
        is_adapter_frozen=is_adapter_frozen,
    )
    if cause is not None:
        return _because("inactive_by_construction", cause, numbers)
    noise = numbers["noise_log_ratio_abs_max"]
    if noise is not None and noise > noise_limit:
        return _numeric_noise(noise, noise_limit, precision, numbers)
    if _is_dead(passes, numbers):
        return _because("dead", _cause_of_death(passes, numbers), numbers)
    if _exceeds(numbers["policy_clip_fraction"], CUT_OFFS.tight_clip_fraction) or _exceeds(
        numbers["clipped_advantage_mass"], CUT_OFFS.tight_advantage_mass
    ):
        return _tight(numbers)
    return _ok(numbers, passes_measured=len(passes))


def _numbers(passes: Sequence[PassReport]) -> dict[str, float | None]:
    """The largest mean of an epoch, the first pass's noise, and how far later passes moved."""
    summaries = [summarize(tuple(each)) for _, each in groupby(passes, lambda x: x.epoch)]
    tightest = max(summaries, key=_clip_fraction, default=None)
    sides = {} if tightest is None else tightest.values
    first = passes[0].values if passes else {}
    later = [each.values for each in passes[1:]]
    return {
        "policy_clip_fraction": sides.get("policy_clip_fraction"),
        "policy_clip_fraction_high": sides.get("policy_clip_fraction_high"),
        "policy_clip_fraction_low": sides.get("policy_clip_fraction_low"),
        "clipped_advantage_mass": _largest([x.values["clipped_advantage_mass"] for x in summaries]),
        "update_kl_k3": _largest([x["update_kl_k3"] for x in later]),
        "log_ratio_abs_max": _largest([x["log_ratio_abs_max"] for x in later]),
        "zero_advantage_fraction": _zero_advantage_fraction(passes),
        "noise_policy_clip_fraction": first.get("policy_clip_fraction"),
        "noise_log_ratio_abs_max": first.get("log_ratio_abs_max"),
        "noise_update_kl_k3": first.get("update_kl_k3"),
    }


def _clip_fraction(summary: PassSummary) -> float:
    return summary.values["policy_clip_fraction"] or 0.0


def _largest(values: Sequence[float | None]) -> float | None:
    """The largest known value; None where none is."""
    return max((x for x in values if x is not None), default=None)


def _zero_advantage_fraction(passes: Sequence[PassReport]) -> float | None:
    tokens = sum(sum(each.counts.values()) for each in passes)
    zero = sum(each.counts[TokenClass.ZERO_ADVANTAGE] for each in passes)
    return zero / tokens if tokens else None


def _exceeds(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def _construction(
    *, passes_planned: int, learning_rate: float, is_adapter_frozen: bool
) -> Cause | None:
    """Why every ratio is 1 whatever the data, if so."""
    if passes_planned == 1:
        return "one_pass"
    if is_adapter_frozen:
        return "frozen_adapter"
    return "zero_learning_rate" if learning_rate == 0 else None


def _is_dead(passes: Sequence[PassReport], numbers: dict[str, float | None]) -> bool:
    """Whether no later pass was clipped or had moved; what is unknown may have moved."""
    floor = max(numbers["noise_policy_clip_fraction"] or 0.0, CUT_OFFS.dead_clip_fraction)
    later = [each.values for each in passes[1:]]
    return bool(later) and all(
        (clipped := values["policy_clip_fraction"]) is not None
        and clipped <= floor
        and (drift := values["update_kl_k3"]) is not None
        and drift < CUT_OFFS.dead_update_kl
        for values in later
    )


def _cause_of_death(passes: Sequence[PassReport], numbers: dict[str, float | None]) -> Cause:
    """The likeliest reason why the policy stood still."""
    if all(each.skipped for each in passes[:-1]):
        return "skipped_passes"
    if numbers["zero_advantage_fraction"] == 1:
        return "zero_advantages"
    moved, noise = numbers["log_ratio_abs_max"], numbers["noise_log_ratio_abs_max"]
    if moved is not None and moved <= (noise or 0.0):
        return "untrained_adapter"
    return "small_learning_rate"


class _Words(NamedTuple):
    """What the user reads."""

    sentence: str
    suggestion: str


_REASONS: dict[Cause, _Words] = {
    "one_pass": _Words(
        sentence=(
            "Clipping cannot act: with epochs × minibatches = 1 there is one pass per step, "
            "measured before its own optimizer step, so every ratio is 1."
        ),
        suggestion="If clipping should act, raise epochs or minibatches; else change nothing.",
    ),
    "zero_learning_rate": _Words(
        sentence=(
            "Clipping cannot act: the learning rate of this step is 0, so the policy does not move "
            "and every ratio stays 1."
        ),
        suggestion="Raise learning_rate; at the end of an lr_schedule this is normal.",
    ),
    "frozen_adapter": _Words(
        sentence=(
            "Clipping cannot act yet: only the critic learns during critic_warmup_steps, so the "
            "policy does not move and every ratio stays 1."
        ),
        suggestion="Nothing needs to change; clipping can act once the warm-up is over.",
    ),
    "zero_advantages": _Words(
        sentence=(
            "Clipping is dead: every advantage is 0, so there is nothing to learn from and the "
            "policy stood still."
        ),
        suggestion="Check that the reward tells answers apart; raise group_size or temperature.",
    ),
    "skipped_passes": _Words(
        sentence=(
            "Clipping is dead: every pass that could have moved the policy was skipped, by a guard "
            "or because loss, gradient or ratio was not finite."
        ),
        suggestion="Lower learning_rate or max_grad_norm, or try precision fp32.",
    ),
    "untrained_adapter": _Words(
        sentence=(
            "Clipping is dead: after its optimizer steps the policy is exactly where it was, so "
            "the adapter seems not to be trained."
        ),
        suggestion="Check lora.target_modules against the model; then raise learning_rate.",
    ),
    "small_learning_rate": _Words(
        sentence=(
            "Clipping is dead: the policy hardly moved within the step; the learning rate of this "
            "step, {learning_rate:.3g}, is likely too small."
        ),
        suggestion="Raise learning_rate (or wait for its warm-up to end), or raise epochs.",
    ),
}


def _because(verdict: VerdictName, cause: Cause, numbers: dict[str, float | None]) -> ClipVerdict:
    """A verdict that nothing is clipped, and why."""
    words = _REASONS[cause]
    return ClipVerdict(
        verdict=verdict,
        one_sided=False,
        sentence=words.sentence.format(**numbers),
        suggestion=words.suggestion,
        numbers=numbers,
        cause=cause,
    )


def _numeric_noise(
    noise: float, limit: float, precision: str, numbers: dict[str, float | None]
) -> ClipVerdict:
    advice = (
        "Use precision fp32 to tell rounding from training."
        if precision == "bf16"
        else "In fp32 this is too much for rounding: please report it with the job's numbers."
    )
    return ClipVerdict(
        verdict="numeric_noise",
        one_sided=False,
        sentence=(
            "Part of the clipping is numeric noise: before any optimizer step a token's log ratio "
            f"was already {noise:.2g}, above {limit:.2g}, where it should be 0."
        ),
        suggestion=advice,
        numbers=numbers,
    )


def _tight(numbers: dict[str, float | None]) -> ClipVerdict:
    return ClipVerdict(
        verdict="tight",
        one_sided=_side(numbers) is not None,
        sentence=(
            f"Clipping is tight: it removed the gradient of {_percent(numbers)} of the tokens, "
            f"with {numbers['clipped_advantage_mass'] or 0.0:.1%} of all advantage."
            f"{_side_sentence(numbers)}"
        ),
        suggestion=(
            "Lower learning_rate or epochs, or set a lower target_kl; widening clip_range instead "
            "lets each step go further."
        ),
        numbers=numbers,
    )


def _ok(numbers: dict[str, float | None], *, passes_measured: int) -> ClipVerdict:
    words = _ok_words(numbers, passes_measured)
    return ClipVerdict(
        verdict="ok",
        one_sided=_side(numbers) is not None,
        sentence=words.sentence + _side_sentence(numbers),
        suggestion=words.suggestion + _side_suggestion(numbers),
        numbers=numbers,
    )


def _ok_words(numbers: dict[str, float | None], passes_measured: int) -> _Words:
    """By how much is clipped."""
    fraction = numbers["policy_clip_fraction"]
    if fraction is None:
        return _Words("There was nothing to judge: no token was measured.", "Nothing to change.")
    if passes_measured == 1:
        return _Words(
            "There was nothing to judge: the step ended before the policy moved.",
            "Nothing to change, unless this happens in every step.",
        )
    removed = f"it removed the gradient of {_percent(numbers)} of the tokens."
    if fraction < CUT_OFFS.usual_clip_fraction:
        return _Words(
            f"Clipping is quiet: {removed}",
            "Nothing to change; if learning is slow, try a higher learning_rate or more epochs.",
        )
    if fraction < CUT_OFFS.busy_clip_fraction:
        return _Words(f"Clipping is usual: {removed}", "Nothing to change.")
    return _Words(
        f"Clipping is busy: {removed}",
        "Nothing to change if the reward rises steadily; otherwise lower learning_rate or epochs.",
    )


def _percent(numbers: dict[str, float | None]) -> str:
    return f"{numbers['policy_clip_fraction'] or 0.0:.1%}"


def _side(numbers: dict[str, float | None]) -> Literal["upper", "lower"] | None:
    """The bound that binds far more often than the other, if much is clipped at all."""
    if not _exceeds(numbers["policy_clip_fraction"], CUT_OFFS.one_sided_clip_fraction):
        return None
    high = numbers["policy_clip_fraction_high"] or 0.0
    low = numbers["policy_clip_fraction_low"] or 0.0
    if high > CUT_OFFS.one_sided_ratio * low:
        return "upper"
    return "lower" if low > CUT_OFFS.one_sided_ratio * high else None


def _side_sentence(numbers: dict[str, float | None]) -> str:
    side = _side(numbers)
    return "" if side is None else f" Nearly all of it is at the {side} bound."


def _side_suggestion(numbers: dict[str, float | None]) -> str:
    match _side(numbers):
        case "upper":
            return (
                " Consider unequal bounds: a higher clip_range_high (0.28) lets rare good tokens "
                "rise more."
            )
        case "lower":
            return (
                " Consider unequal bounds: a wider clip_range, with clip_range_high kept where it "
                "is, lets bad tokens fall more."
            )
        case None:
            return ""
