"""Clip statistics of parts of a pass: by place in the response, and by old probability.

The upper bound binds on rare tokens first, which is why DAPO raises it (arXiv:2503.14476,
sec. 3.1); these tables show whether it does in a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES, TokenClass

POSITION_EDGES = (8, 32, 128, 512)
POSITION_LABELS = ("0-7", "8-31", "32-127", "128-511", "512+")
"""Place of the token in its response, from 0."""
PROBABILITY_EDGES = (0.01, 0.1, 0.5)
PROBABILITY_LABELS = ("0-0.01", "0.01-0.1", "0.1-0.5", "0.5-1")
"""Probability of the token under the old policy; a border belongs to the higher part."""
WORST_SEQUENCES = 4
"""So many responses with the most clipped tokens are named per pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSums:
    """Sums over the tokens of one bucket; they merge without loss."""

    counts: tuple[int, ...] = (0,) * len(TOKEN_CLASSES)
    """Tokens by class, in the order of `TOKEN_CLASSES`."""
    abs_advantage: float = 0.0
    """Σ|A|."""
    abs_advantage_clipped: float = 0.0
    """Σ|A| of the tokens in clipped classes."""
    ratio: float = 0.0
    """Σρ."""
    kl_k3: float = 0.0
    """Σ(ρ − 1 − d)."""

    def merged(self, other: "BucketSums") -> "BucketSums":
        """The sums of both together."""
        return BucketSums(
            counts=tuple(map(sum, zip(self.counts, other.counts, strict=True))),
            abs_advantage=self.abs_advantage + other.abs_advantage,
            abs_advantage_clipped=self.abs_advantage_clipped + other.abs_advantage_clipped,
            ratio=self.ratio + other.ratio,
            kl_k3=self.kl_k3 + other.kl_k3,
        )

    def to_row(self) -> list[float]:
        """The sums as one flat row; `from_row` reads it."""
        return [
            *self.counts,
            self.abs_advantage,
            self.abs_advantage_clipped,
            self.ratio,
            self.kl_k3,
        ]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> Self:
        """The sums that `to_row` wrote."""
        classes = len(TOKEN_CLASSES)
        size, clipped, ratio, drift = row[classes:]
        return cls(
            counts=tuple(int(count) for count in row[:classes]),
            abs_advantage=size,
            abs_advantage_clipped=clipped,
            ratio=ratio,
            kl_k3=drift,
        )

    def values(self) -> dict[str, Any]:
        """What users see of the bucket; names as in `reports.METRICS`, None without tokens."""
        tokens = sum(self.counts)
        by_class = dict(zip(TOKEN_CLASSES, self.counts, strict=True))
        clipped = sum(by_class[each] for each in CLIPPED_CLASSES)
        return {
            "tokens": tokens,
            "counts": by_class,
            "policy_clip_fraction": _share(clipped, tokens),
            "policy_clip_fraction_high": _share(by_class[TokenClass.CLIPPED_HIGH], tokens),
            "policy_clip_fraction_low": _share(by_class[TokenClass.CLIPPED_LOW], tokens),
            "policy_clip_fraction_dual": _share(by_class[TokenClass.DUAL_CLIPPED], tokens),
            "clipped_advantage_mass": _share(self.abs_advantage_clipped, self.abs_advantage),
            "ratio_mean": _share(self.ratio, tokens),
            "update_kl_k3": _share(self.kl_k3, tokens),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Both tables of one pass, or of several."""

    position: tuple[BucketSums, ...] = (BucketSums(),) * len(POSITION_LABELS)
    """In the order of `POSITION_LABELS`."""
    old_probability: tuple[BucketSums, ...] = (BucketSums(),) * len(PROBABILITY_LABELS)
    """In the order of `PROBABILITY_LABELS`."""

    def merged(self, other: "Buckets") -> "Buckets":
        """The tables of both together."""
        return Buckets(
            position=_merged(self.position, other.position),
            old_probability=_merged(self.old_probability, other.old_probability),
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """What users see, by table and label."""
        tables = {
            "position": (POSITION_LABELS, self.position),
            "old_probability": (PROBABILITY_LABELS, self.old_probability),
        }
        return {
            name: {label: each.values() for label, each in zip(labels, sums, strict=True)}
            for name, (labels, sums) in tables.items()
        }

    def to_rows(self) -> dict[str, list[list[float]]]:
        """The sums, for storing."""
        return {
            "position": [each.to_row() for each in self.position],
            "old_probability": [each.to_row() for each in self.old_probability],
        }

    @classmethod
    def from_rows(cls, rows: Mapping[str, Sequence[Sequence[float]]]) -> Self:
        """The tables that `to_rows` wrote."""
        return cls(
            position=tuple(map(BucketSums.from_row, rows["position"])),
            old_probability=tuple(map(BucketSums.from_row, rows["old_probability"])),
        )


def _merged(first: Sequence[BucketSums], second: Sequence[BucketSums]) -> tuple[BucketSums, ...]:
    return tuple(mine.merged(theirs) for mine, theirs in zip(first, second, strict=True))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
