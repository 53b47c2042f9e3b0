"""Histogram of ratios, kept per pass, from which any clip range can be judged afterwards.

Per sign of the advantage and per bin it holds three sums: n tokens, Σ|A|, Σρ|A|.  A bin above 1 is
closed on the right and one below 1 on the left, so `ρ > edge` above, and `ρ < edge` below, select
whole bins.  Tokens with A = 0 are counted beside it.
"""

import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

SIGNS = ("positive", "negative")
SUMS = ("count", "abs_advantage", "ratio_abs_advantage")

_LOG_RANGE = 2.0
_EQUAL_BINS = 161
_CUSTOMARY_RANGES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28, 0.3, 0.4, 0.5)
_CUSTOMARY_BOUNDS = (2.0, 3.0, 5.0, 10.0)


def histogram_edges(clip_low: float, clip_high: float, dual_clip: float | None) -> list[float]:
    """Ascending ratios that separate the bins; below the first and above the last lie two more.

    161 equal bins of ln ρ on [−2, 2], split further at the run's own bounds and customary ones.
    """
    steps = (2 * i / _EQUAL_BINS - 1 for i in range(_EQUAL_BINS + 1))
    edges = {math.exp(_LOG_RANGE * step) for step in steps}
    edges |= {1 - x for x in _CUSTOMARY_RANGES} | {1 + x for x in _CUSTOMARY_RANGES}
    edges |= {*_CUSTOMARY_BOUNDS, 1 - clip_low, 1 + clip_high}
    edges |= set() if dual_clip is None else {dual_clip}
    return sorted(edges)


def single(number: float) -> float:
    """The number as fp32 holds it, which is how ratios are compared."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin's sums for one sign of the advantage."""

    low: float
    """Its lower edge; 0 for the first."""
    high: float
    """Its upper edge; infinite for the last."""
    count: float
    abs_advantage: float
    ratio_abs_advantage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """The three sums per sign and bin, as one flat row in the order [sign][sum][bin]."""

    edges: tuple[float, ...]
    """Of `histogram_edges`."""
    sums: tuple[float, ...]
    """2 · 3 · (number of edges + 1) numbers."""
    zero_advantage_count: int
    """Tokens with A = 0; they are in no bin."""

    def __post_init__(self) -> None:
        """Refuse sums that do not belong to these edges."""
        expected = len(SIGNS) * len(SUMS) * self.num_bins
        if len(self.sums) != expected:
            raise ValueError(f"{len(self.sums)} sums, but the edges need {expected}")

    @classmethod
    def from_bytes(cls, data: bytes, edges: Sequence[float], *, zero_advantage_count: int) -> Self:
        """The histogram that `to_bytes` wrote."""
        return cls(
            edges=tuple(edges),
            sums=struct.unpack(f"<{len(data) // 4}f", data),
            zero_advantage_count=zero_advantage_count,
        )

    def to_bytes(self) -> bytes:
        """The sums as little-endian fp32."""
        return struct.pack(f"<{len(self.sums)}f", *self.sums)

    @property
    def num_bins(self) -> int:
        """Bins per sign, the two outer ones included."""
        return len(self.edges) + 1

    def column(self, sign: str, kind: str) -> tuple[float, ...]:
        """One of `SUMS` over all bins, for one of `SIGNS`."""
        start = (SIGNS.index(sign) * len(SUMS) + SUMS.index(kind)) * self.num_bins
        return self.sums[start : start + self.num_bins]

    def bins(self, sign: str) -> Iterator[Bin]:
        """All bins of one of `SIGNS`, ascending."""
        columns = (self.column(sign, kind) for kind in SUMS)
        lows, highs = (0.0, *self.edges), (*self.edges, math.inf)
        return map(Bin, lows, highs, *columns)

    def total(self, kind: str) -> float:
        """One of `SUMS` over all tokens."""
        return math.fsum(x for sign in SIGNS for x in self.column(sign, kind))

    def merged(self, other: "Histogram") -> "Histogram":
        """The histogram of both together."""
        if self.edges != other.edges:
            raise ValueError("histograms with different edges cannot be merged")
        return Histogram(
            edges=self.edges,
            sums=tuple(array("d", map(sum, zip(self.sums, other.sums, strict=True)))),
            zero_advantage_count=self.zero_advantage_count + other.zero_advantage_count,
        )

    def quantile(self, share: float, *, low: float, high: float) -> float | None:
        """Ratio below which this share of the tokens lies, interpolated within its bin.

        `low` and `high` are the smallest and largest ratio, where known; None without tokens.
        """
        positive, negative = (self.column(sign, "count") for sign in SIGNS)
        rank = share * self.total("count")
        lows, highs = (0.0, *self.edges), (*self.edges, math.inf)
        below = 0.0
        for left, right, *counts in zip(lows, highs, positive, negative, strict=True):
            count = sum(counts)
            if count and below + count >= rank:
                left, right = max(left, low), min(right, high)  # noqa: PLW2901 - the part in use
                return left + (right - left) * (rank - below) / count
            below += count
        return None
