"""The histogram of ratios by hand: its edges, quantiles, and limits where a bound splits a bin."""

import math

import pytest

from ppo_engine.explain import sweep
from ppo_engine.histogram import Histogram, histogram_edges

EDGES = tuple(histogram_edges(0.2, 0.28, None))
ROUNDING = 1e-9


def of_tokens(*tokens: tuple[float, float], zeros: int = 0) -> Histogram:
    """The histogram of these ratios and advantages, none of them on an edge."""
    bins = len(EDGES) + 1
    sums = [0.0] * (6 * bins)
    for ratio, advantage in tokens:
        place = sum(edge < ratio for edge in EDGES)
        start = 0 if advantage > 0 else 3 * bins
        weights = (1.0, abs(advantage), ratio * abs(advantage))
        for kind, weight in enumerate(weights):
            sums[start + kind * bins + place] += weight
    return Histogram(edges=EDGES, sums=tuple(sums), zero_advantage_count=zeros)


def gap(histogram: Histogram, *, low: float, high: float, dual: float | None) -> tuple[float, ...]:
    """Limits of the objective gap."""
    point = sweep(histogram, clip_low=low, clip_high=high, dual_clip=dual)
    return point.bounds["objective_gap"]


def test_edges_reach_from_e_to_the_minus_2_to_10() -> None:
    assert EDGES[0] == pytest.approx(math.exp(-2))
    assert math.exp(2) == pytest.approx(EDGES[-2])
    assert EDGES[-1] == 10.0


def test_the_gap_above_a_split_bin_lies_between_mean_and_chord() -> None:
    outer = min(edge for edge in EDGES if edge > 1.3)
    histogram = of_tokens((1.3001, 1.0), (1.3007, 1.0))

    found = gap(histogram, low=0.2, high=0.3002, dual=None)

    mean = (1.3001 + 1.3007) - 2 * 1.3002
    chord = (outer - 1.3002) / (outer - 1.3) * (0.0001 + 0.0007)
    assert found == pytest.approx((mean / 2, chord / 2), abs=ROUNDING)


def test_the_gap_below_a_split_bin_lies_between_mean_and_chord() -> None:
    outer = max(edge for edge in EDGES if edge < 0.7)
    histogram = of_tokens((0.6999, -2.0), (0.6993, -2.0))

    found = gap(histogram, low=0.3002, high=0.2, dual=None)

    mean = 2 * (2 * 0.6998 - (0.6999 + 0.6993))
    chord = 2 * (0.6998 - outer) / (0.7 - outer) * (0.0001 + 0.0007)
    assert found == pytest.approx((mean / 2, chord / 2), abs=ROUNDING)


def test_a_dual_clip_beyond_the_last_edge_has_limits() -> None:
    histogram = of_tokens((11.0, -1.0), (14.0, -1.0))

    found = gap(histogram, low=0.2, high=0.2, dual=12.0)

    # At least the mean's distance, 25 - 2·12; at most that from the last edge, 25 - 2·10.
    assert found == pytest.approx((-5 / 2, -1 / 2))


def test_tokens_on_the_other_side_of_a_split_bins_mean_may_be_none() -> None:
    found = gap(of_tokens((1.3001, 1.0)), low=0.2, high=0.3002, dual=None)

    assert found[0] == 0.0
    assert found[1] > 0.0


@pytest.mark.parametrize(
    ("share", "expected"), [(0.1, 0.85), (0.2, 1.0), (0.5, 1.5), (0.9, 2.5), (1.0, 3.0)]
)
def test_quantiles_are_interpolated_between_edges(share: float, expected: float) -> None:
    positive, negative = (0.0, 1.0, 2.0, 0.0), (0.0, 0.0, 1.0, 1.0)
    rest = (0.0,) * 8
    histogram = Histogram(
        edges=(0.5, 1.0, 2.0), sums=(*positive, *rest, *negative, *rest), zero_advantage_count=0
    )

    assert histogram.quantile(share, low=0.7, high=3.0) == pytest.approx(expected)


def test_without_tokens_there_are_no_quantiles() -> None:
    assert of_tokens(zeros=3).quantile(0.5, low=1.0, high=1.0) is None


def test_merging_adds_everything() -> None:
    merged = of_tokens((1.1, 1.0), zeros=2).merged(of_tokens((0.9, -2.0), zeros=3))

    assert merged == of_tokens((1.1, 1.0), (0.9, -2.0), zeros=5)


def test_histograms_of_different_runs_do_not_mix() -> None:
    with pytest.raises(ValueError, match="different edges"):
        of_tokens().merged(
            Histogram(edges=(1.0,), sums=(0.0,) * 12, zero_advantage_count=0),
        )


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        Histogram.from_bytes(b"\0" * 24, EDGES, zero_advantage_count=0)
