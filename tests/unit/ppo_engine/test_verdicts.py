"""The verdict on one update's clipping, from passes whose sums are written by hand."""

import json
import math
from typing import Any

import pytest

from ppo_engine.histogram import Histogram, histogram_edges
from ppo_engine.reports import PassReport, PassSums
from ppo_engine.verdicts import CUT_OFFS, ClipVerdict, clip_verdict

TOKENS = 10_000
EDGES = tuple(histogram_edges(0.2, 0.2, None))
NO_RATIOS = Histogram(edges=EDGES, sums=(0.0,) * (6 * (len(EDGES) + 1)), zero_advantage_count=0)
RULE = {
    "epochs": 2,
    "minibatches": 2,
    "learning_rate": 1e-4,
    "precision": "fp32",
    "is_adapter_frozen": False,
    "noise_limit": 1e-4,
}


def measured(
    epoch: int,
    minibatch: int,
    *,
    high: int = 0,
    low: int = 0,
    zero: int = 0,
    tokens: int = TOKENS,
    mass: float = 0.0,
    log_ratio: float = 0.0,
    drift: float = 0.0,
    skipped: bool = False,
) -> PassReport:
    """A pass of so many tokens, of which `high` and `low` are clipped; drift is its k3."""
    counts = (zero, 0, high, low, 0, 0, tokens - zero - high - low, 0)
    return PassReport(
        epoch=epoch,
        minibatch=minibatch,
        skipped=skipped,
        sums=PassSums(
            sequences=1,
            counts=counts,
            ratio=float(tokens),
            ratio_square=float(tokens),
            ratio_min=1.0,
            ratio_max=1.0,
            abs_advantage=1.0,
            abs_advantage_clipped=mass,
            log_ratio_abs_max=log_ratio,
            kl_k3=drift * tokens,
        ),
        ratio_quantiles={},
        ratios=NO_RATIOS,
    )


def update(*later: dict[str, Any], first: dict[str, Any] | None = None) -> list[PassReport]:
    """The passes [0][0], [0][1], [1][0], [1][1], as many as are given."""
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return [measured(*at, **what) for at, what in zip(places, [first or {}, *later], strict=False)]


MOVING = {"log_ratio": 0.1, "drift": 1e-3}


def judge(passes: list[PassReport], **changes: Any) -> ClipVerdict:
    return clip_verdict(passes, **{**RULE, **changes})


@pytest.mark.parametrize(
    ("changes", "cause", "says"),
    [
        ({"epochs": 1, "minibatches": 1}, "one_pass", "one pass per step"),
        ({"learning_rate": 0.0}, "zero_learning_rate", "learning rate of this step is 0"),
        ({"is_adapter_frozen": True}, "frozen_adapter", "only the critic learns"),
    ],
)
def test_clipping_that_cannot_act_says_why(changes: dict[str, Any], cause: str, says: str) -> None:
    verdict = judge(update(MOVING, MOVING, MOVING), **changes)

    assert (verdict.verdict, verdict.cause) == ("inactive_by_construction", cause)
    assert says in verdict.sentence


def test_construction_is_judged_before_noise() -> None:
    assert judge(update(first={"log_ratio": 1.0}), epochs=1, minibatches=1).cause == "one_pass"


@pytest.mark.parametrize(("log_ratio", "expected"), [(1e-4, "ok"), (1.1e-4, "numeric_noise")])
def test_noise_is_a_log_ratio_above_its_limit_before_any_step(
    log_ratio: float, expected: str
) -> None:
    passes = update(MOVING, MOVING, MOVING, first={"log_ratio": log_ratio})

    assert judge(passes).verdict == expected


def test_the_limit_of_noise_is_the_callers() -> None:
    passes = update(MOVING, first={"log_ratio": 0.2})

    assert judge(passes, noise_limit=0.3).verdict == "ok"


def test_noise_in_bf16_suggests_fp32() -> None:
    passes = update(MOVING, first={"log_ratio": 0.2})

    assert "Use precision fp32" in judge(passes, precision="bf16").suggestion
    assert "report it" in judge(passes, precision="fp32").suggestion


@pytest.mark.parametrize(
    ("clipped", "drift", "expected"),
    [
        (1, 9e-6, "dead"),
        (2, 9e-6, "ok"),
        (1, 1e-5, "ok"),
    ],
)
def test_dead_needs_few_clipped_tokens_and_little_drift(
    clipped: int, drift: float, expected: str
) -> None:
    """1 of 10 000 tokens is the cut-off itself, a drift of 1e-5 is no longer below its own."""
    late = {"high": clipped, "drift": drift, "log_ratio": 0.01}

    assert judge(update(late, late, late)).verdict == expected


def test_one_moving_pass_is_enough_to_live() -> None:
    still = {"log_ratio": 1e-3, "drift": 1e-8}

    assert judge(update(still, still, still)).verdict == "dead"
    assert judge(update(still, MOVING, still)).verdict == "ok"


def test_the_noise_of_the_first_pass_raises_the_floor_of_the_dead() -> None:
    noisy = {"high": 50, "log_ratio": 5e-5, "drift": 1e-9}

    assert judge(update(noisy, noisy, first=noisy)).verdict == "dead"


def test_an_unknown_drift_is_not_called_dead() -> None:
    assert judge(update({"drift": math.nan})).verdict == "ok"


@pytest.mark.parametrize(
    ("first", "later", "cause", "says"),
    [
        ({}, {"log_ratio": 1e-4}, "small_learning_rate", "0.0001, is likely too small"),
        ({}, {"log_ratio": 0.0}, "untrained_adapter", "not to be trained"),
        ({"zero": TOKENS}, {"zero": TOKENS}, "zero_advantages", "every advantage is 0"),
        ({"skipped": True}, {"skipped": True}, "skipped_passes", "was skipped"),
    ],
)
def test_the_dead_have_a_likely_cause(
    first: dict[str, Any], later: dict[str, Any], cause: str, says: str
) -> None:
    verdict = judge(update(later, later, first=first))

    assert (verdict.verdict, verdict.cause) == ("dead", cause)
    assert says in verdict.sentence


def test_a_single_advantage_that_is_not_zero_clears_the_advantages() -> None:
    almost = {"zero": TOKENS - 1}

    assert judge(update(almost, almost, first=almost)).cause == "untrained_adapter"


@pytest.mark.parametrize(
    ("high", "mass", "expected"),
    [(3000, 0.0, "ok"), (3001, 0.0, "tight"), (0, 0.5, "ok"), (0, 0.51, "tight")],
)
def test_tight_is_above_30_percent_of_tokens_or_half_of_the_advantage(
    high: int, mass: float, expected: str
) -> None:
    late = {**MOVING, "high": high, "low": 0, "mass": mass}

    assert judge([measured(0, 0), measured(1, 0, **late)]).verdict == expected


def test_the_tightest_epoch_is_judged_and_its_passes_are_taken_together() -> None:
    """Epoch 0 clips 1000 of 20 000 tokens, epoch 1 clips 8000 of 20 000."""
    verdict = judge(
        update({**MOVING, "high": 1000}, {**MOVING, "high": 7000}, {**MOVING, "high": 1000})
    )

    assert verdict.verdict == "tight"
    assert verdict.numbers["policy_clip_fraction"] == pytest.approx(0.4)


def test_a_skipped_pass_was_measured_too() -> None:
    verdict = judge([measured(0, 0), measured(1, 0, **MOVING, high=4000, skipped=True)])

    assert verdict.verdict == "tight"


@pytest.mark.parametrize(
    ("high", "word"),
    [(99, "quiet"), (100, "usual"), (999, "usual"), (1000, "busy"), (3000, "busy")],
)
def test_what_is_fine_has_three_names(high: int, word: str) -> None:
    verdict = judge([measured(0, 0), measured(1, 0, **MOVING, high=high)])

    assert verdict.verdict == "ok"
    assert f"Clipping is {word}" in verdict.sentence


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        (100, 0, False),
        (101, 0, True),
        (500, 100, False),
        (501, 100, True),
        (100, 500, False),
        (100, 501, True),
    ],
)
def test_one_sided_is_above_five_to_one_where_enough_is_clipped(
    high: int, low: int, *, expected: bool
) -> None:
    verdict = judge([measured(0, 0), measured(1, 0, **MOVING, high=high, low=low)])

    assert verdict.one_sided is expected
    assert ("unequal bounds" in verdict.suggestion) is expected


@pytest.mark.parametrize(("high", "low", "side"), [(500, 0, "upper"), (0, 500, "lower")])
def test_one_sided_clipping_names_its_bound(high: int, low: int, side: str) -> None:
    verdict = judge([measured(0, 0), measured(1, 0, **MOVING, high=high, low=low)])

    assert f"at the {side} bound" in verdict.sentence


def test_a_step_that_ended_before_the_policy_moved_is_not_judged() -> None:
    verdict = judge(update())

    assert verdict.verdict == "ok"
    assert "nothing to judge" in verdict.sentence


@pytest.mark.parametrize("passes", [[], [measured(0, 0, tokens=0), measured(0, 1, tokens=0)]])
def test_without_tokens_there_is_nothing_to_judge(passes: list[PassReport]) -> None:
    verdict = judge(passes)

    assert verdict.verdict == "ok"
    assert "no token" in verdict.sentence


def test_a_verdict_is_json_with_the_numbers_it_was_judged_on() -> None:
    verdict = judge(update({**MOVING, "high": 200, "low": 100}, first={"log_ratio": 1e-5}))

    told = json.loads(json.dumps(verdict.to_dict()))

    assert told["numbers"] == {
        "policy_clip_fraction": pytest.approx(300 / 20_000),
        "policy_clip_fraction_high": pytest.approx(200 / 20_000),
        "policy_clip_fraction_low": pytest.approx(100 / 20_000),
        "clipped_advantage_mass": 0.0,
        "update_kl_k3": pytest.approx(1e-3),
        "log_ratio_abs_max": pytest.approx(0.1),
        "zero_advantage_fraction": 0.0,
        "noise_policy_clip_fraction": 0.0,
        "noise_log_ratio_abs_max": pytest.approx(1e-5),
        "noise_update_kl_k3": 0.0,
        "learning_rate": 1e-4,
        "noise_limit": 1e-4,
    }
    assert told["cause"] is None


def test_the_cut_offs_can_be_stored() -> None:
    assert json.loads(json.dumps(CUT_OFFS.to_dict())) == {
        "noise_log_ratio": 1e-4,
        "dead_clip_fraction": 1e-4,
        "dead_update_kl": 1e-5,
        "tight_clip_fraction": 0.3,
        "tight_advantage_mass": 0.5,
        "usual_clip_fraction": 0.01,
        "busy_clip_fraction": 0.1,
        "one_sided_clip_fraction": 0.01,
        "one_sided_ratio": 5.0,
    }
