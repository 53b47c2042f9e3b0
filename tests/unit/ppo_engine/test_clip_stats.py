"""Clip statistics against their definitions, merged and swept."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.clip_stats import PassStatistics, classify
from ppo_engine.explain import TOKEN_CLASSES, sweep
from ppo_engine.histogram import histogram_edges
from ppo_engine.metrics import METRICS
from ppo_engine.reports import PassReport, merge_passes, summarize

EXACT = 1e-12
SINGLE = 1e-5
"""Room for the fp32 of ratios and stored histograms."""
BIN_WIDTH = 0.03
"""Merged quantiles are as good as the bins, whose ratios differ by 2.5%."""

RULE: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
quick = settings(max_examples=40, deadline=None)

clip_rules = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.02, 0.1, 0.2, 0.5]) | st.floats(0.01, 0.95),
        "clip_high": st.sampled_from([0.02, 0.1, 0.28, 0.5]) | st.floats(0.01, 0.95),
        "dual_clip": st.none() | st.sampled_from([2.0, 3.0, 5.0]) | st.floats(2.0, 20.0),
    }
)


def tokens(
    seed: int = 0, *, rows: int = 12, columns: int = 9, spread: float = 0.5
) -> dict[str, Tensor]:
    """A batch of fp32 tensors as the trainer has them, zero outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[0] = False
    old, noise, advantages, values, shift, returns = (
        torch.randn(rows, columns, generator=generator) * mask for _ in range(6)
    )
    advantages[1] = 0
    return {
        "logprobs": old + spread * noise,
        "old_logprobs": old,
        "advantages": advantages,
        "response_mask": mask,
        "values": values + 0.3 * shift,
        "old_values": values,
        "returns": returns,
    }


def known(report: PassReport) -> dict[str, float]:
    """The values that have a number."""
    return {name: value for name, value in report.values.items() if value is not None}


def measured(
    *batches: dict[str, Tensor], rule: dict[str, Any] = RULE, **changes: Any
) -> PassReport:
    """The report over some micro-batches."""
    statistics = PassStatistics(**rule, value_clip_range=0.2)
    for batch in batches:
        statistics.add(**batch)
    gradient: dict[str, Any] = {"grad_norm": 0.5, "max_grad_norm": 1.0, "skipped": False}
    return statistics.report(epoch=0, minibatch=0, **{**gradient, **changes})


def of_ratios(ratios: list[float], advantages: list[float]) -> dict[str, Tensor]:
    """One row with these ratios and advantages."""
    old = torch.full((1, len(ratios)), -1.0, dtype=torch.float64)
    zeros = torch.zeros_like(old)
    return {
        "logprobs": old + torch.tensor([ratios], dtype=torch.float64).log(),
        "old_logprobs": old,
        "advantages": torch.tensor([advantages], dtype=torch.float64),
        "response_mask": torch.ones_like(old).bool(),
        "values": zeros,
        "old_values": zeros,
        "returns": zeros,
    }


def class_by_definition(
    ratio: float, advantage: float, *, low: float, high: float, dual: float | None
) -> str:
    """The table of classes, first match from the top."""
    conditions = {
        "zero_advantage": advantage == 0,
        "dual_clipped": advantage < 0 and dual is not None and ratio > dual,
        "clipped_high": advantage > 0 and ratio > high,
        "clipped_low": advantage < 0 and ratio < low,
        "unclipped_out_low": advantage > 0 and ratio < low,
        "unclipped_out_high": advantage < 0 and ratio > high,
        "in_range_positive": advantage > 0,
        "in_range_negative": advantage < 0,
    }
    return next(name for name, holds in conditions.items() if holds)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("advantage", [-2.5, -1e-8, 0.0, 1e-8, 1.0])
def test_classes_are_those_of_the_table(advantage: float, dual: float | None) -> None:
    log_ratios = torch.cat([torch.linspace(-3, 3, 601), torch.tensor([-20.0, 20.0])])
    low, high = (np.float32(bound) for bound in (1 - 0.2, 1 + 0.28))

    numbers = classify(
        log_ratios,
        torch.full_like(log_ratios, advantage),
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual,
    )

    assert numbers.dtype == torch.int8
    assert [TOKEN_CLASSES[number] for number in numbers.tolist()] == [
        class_by_definition(ratio, advantage, low=low, high=high, dual=dual)
        for ratio in torch.exp(log_ratios).numpy()
    ]


def test_the_bounds_themselves_are_inside() -> None:
    drift = torch.tensor([0.2, -0.3, 1.1], dtype=torch.float64)
    rule = {
        "clip_low": 1 - math.exp(-0.3),
        "clip_high": math.exp(0.2) - 1,
        "dual_clip": math.exp(1.1),
    }

    good = classify(drift, torch.ones(3), **rule)
    bad = classify(drift, -torch.ones(3), **rule)

    assert [TOKEN_CLASSES[n] for n in good[:2].tolist()] == ["in_range_positive"] * 2
    assert [TOKEN_CLASSES[n] for n in bad.tolist()] == [
        "in_range_negative",
        "in_range_negative",
        "unclipped_out_high",
    ]


def test_at_the_bounds_nothing_is_out_of_range() -> None:
    rule = {"clip_low": 1 - math.exp(-0.3), "clip_high": math.exp(0.2) - 1, "dual_clip": None}
    batch = of_ratios([1.0, 1.0], [1.0, -1.0])
    batch["old_logprobs"] = torch.zeros(1, 2).double()
    batch["logprobs"] = torch.tensor([[0.2, -0.3]], dtype=torch.float64)

    report = measured(batch, rule=rule, grad_norm=1.0)

    assert report.values["ratio_above_range_fraction"] == 0.0
    assert report.values["ratio_below_range_fraction"] == 0.0
    assert report.values["policy_clip_fraction"] == 0.0
    assert report.values["grad_norm_clipped"] == 0.0
    assert sweep(report.ratios, **rule).values["policy_clip_fraction"] == 0.0


def test_four_tokens_by_hand() -> None:
    rule = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    batch = of_ratios([1.5, 0.5, 1.0, 1.5], [1.0, -1.0, 2.0, -1.0])

    report = measured(batch, rule=rule, grad_norm=1.5)

    expected = {
        "tokens": 4,
        "sequences": 1,
        "policy_clip_fraction": 0.5,
        "policy_clip_fraction_high": 0.25,
        "policy_clip_fraction_low": 0.25,
        "policy_clip_fraction_dual": 0.0,
        "policy_clip_fraction_of_positive": 0.5,
        "policy_clip_fraction_of_negative": 0.5,
        "ratio_above_range_fraction": 0.5,
        "ratio_below_range_fraction": 0.25,
        "clipped_advantage_mass": 2 / 5,
        "policy_gradient_kept": 3.5 / 5.5,
        "surrogate_unclipped": 1.5 / 4,
        "surrogate_clipped": 1.2 / 4,
        "surrogate_objective": 0.9 / 4,
        "objective_gap": 0.6 / 4,
        "ratio_mean": 4.5 / 4,
        "ratio_std": math.sqrt(5.75 / 4 - (4.5 / 4) ** 2),
        "ratio_min": 0.5,
        "ratio_max": 1.5,
        "ratio_q50": 1.25,
        "ratio_q25": 0.875,
        "ess_token": 4.5**2 / (4 * 5.75),
        "ess_sequence": 1.0,
        "update_kl_k1": -math.log(1.5 * 0.5 * 1.5) / 4,
        "update_kl_k2": (2 * math.log(1.5) ** 2 + math.log(0.5) ** 2) / 8,
        "update_kl_k3": (0.5 - math.log(1.5 * 0.5 * 1.5)) / 4,
        "update_kl_per_sequence": 0.5 - math.log(1.5 * 0.5 * 1.5),
        "log_ratio_abs_max": math.log(2),
        "log_ratio_clamped_count": 0,
        "grad_norm": 1.5,
        "grad_norm_clipped": 1.0,
    }
    found = {name: report.values[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-9)
    assert report.counts == dict.fromkeys(TOKEN_CLASSES, 0) | {
        "clipped_high": 1,
        "clipped_low": 1,
        "in_range_positive": 1,
        "unclipped_out_high": 1,
    }


def test_the_effective_sample_size_of_one_heavy_token() -> None:
    report = measured(of_ratios([1, 1, 1, 5], [1, 1, 1, 1]))

    assert report.values["ess_token"] == pytest.approx(0.571429, abs=1e-6)


def test_the_effective_sample_size_of_sequences_takes_whole_ratios() -> None:
    batch = of_ratios([2.0, 3.0], [1, 1])
    batch = {name: x.reshape(2, 1) for name, x in batch.items()}
    wide = {name: torch.cat([x, x], dim=1) for name, x in batch.items()}

    report = measured(wide)

    assert report.values["ess_sequence"] == pytest.approx((4 + 9) ** 2 / (2 * (16 + 81)), rel=EXACT)


def test_value_clipping_is_counted_where_it_binds() -> None:
    batch = of_ratios([1] * 5, [1] * 5)
    batch["old_values"] = torch.ones(1, 5).double()
    batch["values"] = torch.tensor([[2.0, 2.0, 0.5, 0.5, 1.1]]).double()
    batch["returns"] = torch.tensor([[1.5, 3.0, 0.0, 3.0, 9.0]]).double()

    report = measured(batch)

    assert report.values["value_clip_fraction"] == pytest.approx(2 / 5)
    assert report.values["value_out_of_range_fraction"] == pytest.approx(4 / 5)


def test_before_the_first_step_nothing_has_moved() -> None:
    batch = tokens(spread=0.0)

    values = measured(batch).values

    for name in ("policy_clip_fraction", "log_ratio_abs_max", "update_kl_k1", "update_kl_k3"):
        assert values[name] == 0.0
    for name in ("ratio_min", "ratio_max", "ratio_mean", "ratio_q01", "ratio_q99", "ess_token"):
        assert values[name] == 1.0
    assert values["policy_gradient_kept"] == 1.0


def test_a_log_ratio_beyond_the_bound_is_counted() -> None:
    batch = tokens()
    row, column = batch["response_mask"].nonzero()[0]
    batch["logprobs"][row, column] = batch["old_logprobs"][row, column] - 25

    report = measured(batch)

    assert report.values["log_ratio_clamped_count"] == 1
    assert report.values["log_ratio_abs_max"] == pytest.approx(25)


def test_a_log_ratio_at_the_bound_is_not_counted() -> None:
    batch = of_ratios([1.0], [1.0])
    batch["logprobs"] = batch["old_logprobs"] + 20

    assert measured(batch).values["log_ratio_clamped_count"] == 0


def test_what_is_not_finite_becomes_null() -> None:
    batch = tokens()
    row, column = batch["response_mask"].nonzero()[0]
    batch["logprobs"][row, column] = math.nan

    report = measured(batch, grad_norm=math.inf, skipped=True)

    assert report.skipped
    assert report.values["update_kl_k3"] is None
    assert report.values["grad_norm"] is None
    assert np.isfinite(np.frombuffer(report.histogram, dtype="<f4")).all()
    json.dumps(report.stored_values(), allow_nan=False)


def test_without_tokens_nothing_is_claimed() -> None:
    batch = {name: torch.zeros_like(x) for name, x in tokens().items()}

    report = measured(batch)

    assert report.values["tokens"] == 0
    assert report.values["policy_clip_fraction"] is None
    assert report.values["ratio_q50"] is None
    stored = json.loads(json.dumps(report.stored_values(), allow_nan=False))
    again = PassReport.from_stored(0, 0, stored, report.histogram, edges=report.ratios.edges)
    assert again.values == report.values


@quick
@given(seed=st.integers(0, 1000), rule=clip_rules, spread=st.sampled_from([0.01, 0.3, 2.0]))
def test_counts_add_up_to_all_tokens(seed: int, rule: dict[str, Any], spread: float) -> None:
    batch = tokens(seed, spread=spread)

    report = measured(batch, rule=rule)

    assert sum(report.counts.values()) == int(batch["response_mask"].sum())
    gap = report.values["objective_gap"]
    assert gap is not None
    assert rule["dual_clip"] is not None or gap >= -SINGLE


@quick
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 11), min_size=1, max_size=4))
def test_micro_batches_are_the_whole(seed: int, sizes: list[int]) -> None:
    batch = tokens(seed)
    cuts = sorted({min(sum(sizes[: i + 1]), 12) for i in range(len(sizes))} | {12})
    parts = [
        {name: x[start:end] for name, x in batch.items()}
        for start, end in zip([0, *cuts], cuts, strict=False)
    ]

    whole, split = measured(batch), measured(*parts)

    assert split.counts == whole.counts
    assert known(split) == pytest.approx(known(whole), rel=EXACT, abs=EXACT)
    assert split.ratios.sums == pytest.approx(whole.ratios.sums, rel=EXACT, abs=EXACT)


@quick
@given(seed=st.integers(0, 1000))
def test_merged_passes_are_the_whole_even_after_storage(seed: int) -> None:
    first, second = tokens(seed), tokens(seed + 1, spread=1.0)
    whole = measured(first, second)
    stored = []
    for report in (measured(first), measured(second)):
        values = json.loads(json.dumps(report.stored_values(), allow_nan=False))
        edges = histogram_edges(**RULE)
        stored.append(PassReport.from_stored(0, 0, values, report.histogram, edges=edges))

    merged = summarize(stored)

    assert merged.counts == whole.counts
    for name, value in whole.values.items():
        if value is None:
            assert merged.values[name] is None
        elif not name.startswith("ratio_q"):
            assert merged.values[name] == pytest.approx(value, rel=EXACT, abs=EXACT), name
    assert merged.ratios.sums == pytest.approx(whole.ratios.sums, rel=SINGLE, abs=SINGLE)


def test_merged_quantiles_are_as_good_as_the_bins() -> None:
    first, second = tokens(1, rows=300), tokens(2, rows=300, spread=0.2)
    whole = measured(first, second).values

    merged = merge_passes([measured(first), measured(second)])

    for name in ("ratio_q01", "ratio_q05", "ratio_q25", "ratio_q50", "ratio_q75", "ratio_q95"):
        assert merged[name] == pytest.approx(whole[name], rel=BIN_WIDTH), name


def test_one_pass_alone_keeps_its_exact_quantiles() -> None:
    report = measured(tokens())

    assert merge_passes([report]) == report.values
    ratios = torch.exp(tokens()["logprobs"] - tokens()["old_logprobs"])[tokens()["response_mask"]]
    assert report.values["ratio_q05"] == pytest.approx(
        np.quantile(ratios.double(), 0.05), rel=EXACT
    )


def test_skipped_passes_and_gradient_norms_are_merged() -> None:
    batch = tokens()
    passes = [
        measured(batch, grad_norm=0.5),
        measured(batch, grad_norm=1.5),
        measured(batch, grad_norm=math.nan, skipped=True),
    ]

    summary = summarize(passes)

    assert summary.skipped == 1
    assert summary.values["grad_norm"] == 1.0
    assert summary.values["grad_norm_clipped"] == 0.5


def test_every_value_has_a_definition() -> None:
    assert set(measured(tokens()).values) <= set(METRICS)


def direct(batch: dict[str, Tensor], rule: dict[str, Any]) -> dict[str, float]:
    """What a clip range does to these tokens, token by token in float64."""
    mask = batch["response_mask"]
    ratios = torch.exp((batch["logprobs"] - batch["old_logprobs"])[mask]).numpy()
    advantages = batch["advantages"][mask].double().numpy()
    low, high = np.float32(1 - rule["clip_low"]), np.float32(1 + rule["clip_high"])
    dual = np.float32(rule["dual_clip"] or math.inf)
    is_high = (advantages > 0) & (ratios > high)
    is_low = (advantages < 0) & (ratios < low)
    is_dual = (advantages < 0) & (ratios > dual)
    is_clipped = is_high | is_low | is_dual
    wide, size = ratios.astype(np.float64), np.abs(advantages)
    unclipped = wide * advantages
    clipped = np.clip(wide, 1 - rule["clip_low"], 1 + rule["clip_high"]) * advantages
    objective = np.minimum(unclipped, clipped)
    if rule["dual_clip"] is not None:
        floor = np.maximum(objective, rule["dual_clip"] * advantages)
        objective = np.where(advantages < 0, floor, objective)
    return {
        "policy_clip_fraction": is_clipped.mean(),
        "policy_clip_fraction_high": is_high.mean(),
        "policy_clip_fraction_low": is_low.mean(),
        "policy_clip_fraction_dual": is_dual.mean(),
        "clipped_advantage_mass": size[is_clipped].sum() / size.sum(),
        "policy_gradient_kept": 1 - (wide * size)[is_clipped].sum() / (wide * size).sum(),
        "objective_gap": (unclipped - objective).mean(),
    }


@quick
@given(seed=st.integers(0, 1000), rule=clip_rules, spread=st.sampled_from([0.05, 0.5, 1.5]))
def test_a_sweep_at_the_runs_own_range_is_what_was_counted(
    seed: int, rule: dict[str, Any], spread: float
) -> None:
    report = measured(tokens(seed, spread=spread), rule=rule)

    point = sweep(report.ratios, **rule)

    assert point.exact
    for name in ("", "_high", "_low", "_dual"):
        full = f"policy_clip_fraction{name}"
        assert point.values[full] == report.values[full]
    for name in ("clipped_advantage_mass", "policy_gradient_kept"):
        assert point.values[name] == pytest.approx(report.values[name], rel=EXACT, abs=EXACT)
    assert point.values["objective_gap"] == pytest.approx(
        report.values["objective_gap"], rel=SINGLE, abs=SINGLE
    )


@quick
@given(
    seed=st.integers(0, 1000),
    low=st.sampled_from([0.02, 0.15, 0.3, 0.5]),
    high=st.sampled_from([0.02, 0.15, 0.3, 0.5]),
    dual=st.sampled_from([None, 2.0, 3.0, 5.0, 10.0]),
)
def test_a_sweep_on_edges_is_the_direct_computation(
    seed: int, low: float, high: float, dual: float | None
) -> None:
    batch = tokens(seed, spread=1.0)
    rule: dict[str, Any] = {"clip_low": low, "clip_high": high, "dual_clip": dual}

    point = sweep(measured(batch).ratios, **rule)

    assert point.exact
    expected = direct(batch, rule)
    gap = expected.pop("objective_gap")
    found = dict(point.values)
    assert found.pop("objective_gap") == pytest.approx(gap, rel=1e-6, abs=1e-7)
    assert found == pytest.approx(expected, rel=1e-13, abs=1e-14)


@quick
@given(seed=st.integers(0, 1000), rule=clip_rules)
def test_between_edges_the_bounds_hold_the_truth(seed: int, rule: dict[str, Any]) -> None:
    batch = tokens(seed, spread=1.0)

    point = sweep(measured(batch).ratios, **rule)

    for name, value in direct(batch, rule).items():
        low, high = point.bounds[name]
        assert low - 1e-6 <= value <= high + 1e-6, name
        assert point.values[name] is None or low == high
    assert point.exact is (None not in point.values.values())


def test_a_bound_inside_a_bin_is_not_invented() -> None:
    report = measured(of_ratios([1.3001, 1.3003], [1.0, 1.0]))

    point = sweep(report.ratios, clip_low=0.2, clip_high=0.3002, dual_clip=None)

    assert point.values["policy_clip_fraction_high"] is None
    assert point.bounds["policy_clip_fraction_high"] == (0.0, 1.0)
    assert point.values["policy_clip_fraction_low"] == 0.0


def test_there_are_about_190_bins() -> None:
    edges = histogram_edges(0.2, 0.28, 3.0)

    assert edges == sorted(set(edges))
    assert 180 < len(edges) + 1 < 200
    assert {0.8, 1.28, 3.0, 1.2, 10.0} <= set(edges)
    assert edges[-1] == 10.0
