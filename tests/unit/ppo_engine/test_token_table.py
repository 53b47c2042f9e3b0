"""The tokens of a step one by one: they must tell what its passes counted."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from ppo_engine.explain import explain, sweep
from ppo_engine.measurements import _kept_rows
from ppo_engine.reports import StepReport, summarize
from tests.clipping_run import (
    CLIPPED,
    CONFIG,
    ROWS,
    counts_of,
    counts_of_passes,
    step_of,
    trainer_of,
)

SINGLE = 1e-6
"""Of products in fp32, relative."""
EXACT = 1e-12


@pytest.fixture(scope="module")
def report(tiny_model) -> StepReport:
    """One epoch, everything stored."""
    return step_of(tiny_model, CONFIG)


def test_in_one_epoch_the_tokens_are_those_that_the_passes_counted(report) -> None:
    assert counts_of(report.tokens) == counts_of_passes(report.passes)
    for each in report.passes:
        mine = [t for t in report.tokens if t["minibatch"] == each.minibatch]
        assert counts_of(mine) == each.counts
    # A run in which nothing happens would prove nothing.
    assert {"clipped_high", "clipped_low", "dual_clipped"} <= {t["class"] for t in report.tokens}


def test_the_tokens_sums_are_those_of_the_passes(report) -> None:
    values, tokens = report.values, report.tokens
    mean = {
        name: math.fsum(token[column] for token in tokens) / len(tokens)
        for name, column in {
            "ratio_mean": "ratio",
            "surrogate_unclipped": "unclipped",
            "surrogate_clipped": "clipped",
            "surrogate_objective": "objective",
        }.items()
    }

    assert {name: values[name] for name in mean} == pytest.approx(mean, rel=SINGLE)
    assert values["ratio_max"] == max(token["ratio"] for token in tokens)
    assert values["ratio_min"] == min(token["ratio"] for token in tokens)


def test_each_token_is_what_the_clip_rule_says_of_its_ratio_and_advantage(report) -> None:
    for token in report.tokens:
        told = explain(
            token["ratio"], token["advantage"], clip_range=0.1, clip_range_high=0.15, dual_clip=1.3
        ).to_dict()
        assert token["class"] == told["class"]
        assert token["gradient_kept"] == told["gradient_kept"]
        for name in ("unclipped", "clipped", "objective", "d_objective_d_logprob"):
            assert token[name] == pytest.approx(told[name], rel=SINGLE, abs=SINGLE)


def test_a_tokens_ratio_follows_from_its_log_probabilities(report) -> None:
    for token in report.tokens:
        drift = token["logprob"] - token["old_logprob"]
        assert token["log_ratio"] == pytest.approx(drift, abs=SINGLE)
        assert token["ratio"] == pytest.approx(math.exp(drift), rel=1e-5)


def test_the_numbers_of_a_response_fit_its_sample(tiny_model, report) -> None:
    tokenizer = trainer_of(tiny_model, CONFIG).policy.base.tokenizer

    assert [sample["row"] for sample in report.samples] == list(range(ROWS))
    assert {sample["finish_reason"] for sample in report.samples} == {"length", "stop"}
    for sample in report.samples:
        tokens = [token for token in report.tokens if token["row"] == sample["row"]]
        assert [token["position"] for token in tokens] == list(range(sample["tokens"]))
        assert sample["clipped_tokens"] == sum(token["class"] in CLIPPED for token in tokens)
        assert sample["ratio_max"] == max(token["ratio"] for token in tokens)
        ids = [token["token_id"] for token in tokens]
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample["completion"]
        assert [token["text"] for token in tokens] == [tokenizer.decode([each]) for each in ids]
        distance = [token["old_logprob"] - token["kl_reference_logprob"] for token in tokens]
        assert sample["kl_reference"] == pytest.approx(math.fsum(distance), abs=1e-5)


def test_rewards_values_and_returns_are_those_of_the_estimator(report) -> None:
    """With γ = 1 the returns obey G_t = A_t + V_t and the recursion of GAE."""
    for row in range(ROWS):
        tokens = [token for token in report.tokens if token["row"] == row]
        following = advantage = 0.0
        for token in reversed(tokens):
            delta = token["reward"] + following - token["value"]
            advantage = delta + 0.95 * advantage
            following = token["value"]
            assert token["return"] == pytest.approx(advantage + token["value"], abs=1e-5)


def direct_sweep(
    tokens: Any, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> dict[str, float]:
    """What the range would have done, token by token; bounds as fp32, like the ratios."""
    low, high = float(np.float32(1 - clip_low)), float(np.float32(1 + clip_high))
    dual = math.inf if dual_clip is None else float(np.float32(dual_clip))
    removed: dict[str, list[Any]] = {"high": [], "low": [], "dual": []}
    gap = 0.0
    for token in tokens:
        ratio, advantage = token["ratio"], token["advantage"]
        if advantage > 0 and ratio > high:
            removed["high"].append(token)
            gap += (ratio - (1 + clip_high)) * advantage
        elif advantage < 0 and ratio > dual:
            removed["dual"].append(token)
            gap += (ratio - dual_clip) * advantage
        elif advantage < 0 and ratio < low:
            removed["low"].append(token)
            gap += (ratio - (1 - clip_low)) * advantage
    gone = [token for each in removed.values() for token in each]
    size = math.fsum(abs(token["advantage"]) for token in tokens)
    weight = math.fsum(token["ratio"] * abs(token["advantage"]) for token in tokens)
    return {
        "policy_clip_fraction": len(gone) / len(tokens),
        "policy_clip_fraction_high": len(removed["high"]) / len(tokens),
        "policy_clip_fraction_low": len(removed["low"]) / len(tokens),
        "policy_clip_fraction_dual": len(removed["dual"]) / len(tokens),
        "clipped_advantage_mass": math.fsum(abs(t["advantage"]) for t in gone) / size,
        "policy_gradient_kept": 1
        - math.fsum(t["ratio"] * abs(t["advantage"]) for t in gone) / weight,
        "objective_gap": gap / len(tokens),
    }


OWN = {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.3}
ON_EDGES = [
    OWN,
    {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    {"clip_low": 0.02, "clip_high": 0.05, "dual_clip": 1.3},
    {"clip_low": 0.5, "clip_high": 0.28, "dual_clip": 2.0},
    {"clip_low": 1 - math.exp(4 / 161 * 7 - 2), "clip_high": 0.4, "dual_clip": None},
]


@pytest.mark.parametrize("rule", ON_EDGES)
def test_a_sweep_to_edges_of_bins_is_what_the_tokens_say(report, rule: dict[str, Any]) -> None:
    point = sweep(summarize(report.passes).ratios, **rule)

    expected = direct_sweep(report.tokens, **rule)
    assert point.exact
    assert point.values == pytest.approx(expected, abs=EXACT, rel=1e-9)
    assert expected["policy_clip_fraction"] > 0


def test_a_sweep_to_the_runs_own_range_is_what_the_run_reports(report) -> None:
    point = sweep(summarize(report.passes).ratios, **OWN)

    for name, value in point.values.items():
        tolerance = 1e-5 if name == "objective_gap" else EXACT  # fp32 terms against sums
        assert value == pytest.approx(report.values[name], abs=tolerance)


def test_a_sweep_to_the_inside_of_a_bin_gives_limits_that_hold(report) -> None:
    ratios = summarize(report.passes).ratios
    numbers = np.random.default_rng(0).uniform([0.02, 0.02, 0.02], [0.4, 0.4, 0.5], (100, 3))

    inexact = 0
    for clip_low, clip_high, beyond in numbers.tolist():
        rule = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": 1 + clip_high + beyond}
        point = sweep(ratios, **rule)
        inexact += not point.exact
        for name, value in direct_sweep(report.tokens, **rule).items():
            low, high = point.bounds[name]
            assert low - EXACT <= value <= high + EXACT
            assert point.values[name] == (low if low == high else None)

    assert inexact > 50


def test_half_of_the_stored_responses_are_the_most_clipped(tiny_model, report) -> None:
    some = step_of(tiny_model, dataclasses.replace(CONFIG, stored_samples=5))

    clipped = {sample["row"]: sample["clipped_tokens"] for sample in report.samples}
    most = sorted(clipped, key=lambda row: (-clipped[row], row))[:2]
    rows = [sample["row"] for sample in some.samples]
    assert set(most) < set(rows)
    assert len(set(rows)) == 5
    assert rows == sorted(rows)
    assert {token["row"] for token in some.tokens} == set(rows)
    stored = {sample["row"]: sample for sample in report.samples}
    assert all(sample == stored[sample["row"]] for sample in some.samples)


def test_the_other_stored_responses_are_drawn_by_the_seed() -> None:
    clipped = [0, 5, 1, 5, 2, 0, 0]

    drawn = [_kept_rows(clipped, 5, torch.Generator().manual_seed(seed)) for seed in range(20)]
    again = [_kept_rows(clipped, 5, torch.Generator().manual_seed(seed)) for seed in range(20)]

    assert drawn == again
    assert all({1, 3} < set(rows) and len(set(rows)) == 5 for rows in drawn)
    assert {row for rows in drawn for row in rows} == set(range(7))
    assert len({tuple(rows) for rows in drawn}) > 5


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_never_more_responses_are_stored_than_asked_for(count: int, rows: int) -> None:
    assert len(_kept_rows([0, 2, 0, 1], count, torch.Generator().manual_seed(0))) == rows
