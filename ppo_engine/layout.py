"""How rows are cut into micro-batches: always the same number of rows, filled up where needed.

The old log-probabilities and every pass go through the same [rows, P+T] shape.  Matrix products of
another shape round differently, and the first ratio would not be exactly 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass."""

    rows: Tensor
    """[size] int64; row numbers in the rollout."""
    is_real: Tensor
    """[size] bool; False = a filler that must count nowhere."""


def micro_batches(rows: Tensor, size: int) -> list[MicroBatch]:
    """`rows` in order, `size` at a time; the last one is filled up with the first row."""
    missing = -len(rows) % size
    filled = torch.cat([rows, rows[:1].expand(missing)])
    is_real = torch.arange(len(filled), device=rows.device) < len(rows)
    return [
        MicroBatch(rows=part, is_real=real)
        for part, real in zip(filled.split(size), is_real.split(size), strict=True)
    ]
