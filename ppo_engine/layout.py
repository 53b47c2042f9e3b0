"""How the rows of a rollout are cut into micro-batches.

The old log-probabilities and every pass must round a row in the same way, or the first ratio is not
exactly 1.  Three layouts keep to that, each where it is needed: see `Layout`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_engine.packing import CommonShape, common_prefix, filled_length
from ppo_engine.policy import CausalPolicy, read_states
from ppo_engine.rollout import Samples


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass."""

    rows: Tensor
    """[size] int64; row numbers in the rollout."""
    is_real: Tensor
    """[size] bool; False = a filler that must count nowhere."""
    shape: CommonShape | None = None
    """Of the forward pass, where it must be that of all others."""


class Layout:
    """Micro-batches for the rows of one rollout.

    - Padded rows (models that our decoder does not know): always the same [size, P+T], filled up
      with the first row.
    - Packed rows where products round a row the same whatever stands beside it, as they do in fp32:
      rows of like length together, as many as fit the tokens of `size` longest rows; all share the
      same beginning where attention minds.
    - Packed rows elsewhere: `size` rows at a time, of one shape: the beginning that all rows of the
      rollout share once, and filled up to what the longest rows take.
    """

    def __init__(self, policy: CausalPolicy, samples: Samples, size: int) -> None:
        self._size = size
        self._packs = policy.packs
        lengths = samples.attention_mask.sum(dim=1).tolist()
        self._lengths = torch.tensor([filled_length(length) for length in lengths])
        self._shape = self._beginning = None
        if policy.rounds_by_shape:
            self._shape = self._common_shape(samples)
        elif policy.rounds_by_beginning(max(lengths)):
            self._beginning = CommonShape(tokens=0, prefix=_common_prefix(samples))

    def micro_batches(self, rows: Tensor) -> list[MicroBatch]:
        """The numbered rows, each once."""
        if not self._packs:
            return _filled(rows, self._size)
        if self._shape is not None:
            return [_real(part, self._shape) for part in rows.split(self._size)]
        lengths = self._lengths[rows.cpu()]
        order = lengths.argsort(descending=True, stable=True)
        budget = self._size * int(self._lengths.max())
        ends, tokens = [], 0
        for place, length in enumerate(lengths[order].tolist()):
            if tokens + length > budget:
                ends.append(place)
                tokens = 0
            tokens += length
        parts = rows[order.to(rows.device)].tensor_split(ends)
        return [_real(part, self._beginning) for part in parts]

    def _common_shape(self, samples: Samples) -> CommonShape:
        prefix = _common_prefix(samples)
        longest = self._lengths.sort(descending=True).values[: self._size]
        return CommonShape(prefix + int((longest - prefix).sum()), prefix)


def _common_prefix(samples: Samples) -> int:
    read = read_states(samples.response_mask, samples.tokens)
    return common_prefix(samples.tokens, samples.attention_mask, read)


def _real(rows: Tensor, shape: CommonShape | None = None) -> MicroBatch:
    return MicroBatch(rows, torch.ones_like(rows, dtype=torch.bool), shape)


def _filled(rows: Tensor, size: int) -> list[MicroBatch]:
    missing = -len(rows) % size
    filled = torch.cat([rows, rows[:1].expand(missing)])
    is_real = torch.arange(len(filled), device=rows.device) < len(rows)
    return [
        MicroBatch(rows=part, is_real=real)
        for part, real in zip(filled.split(size), is_real.split(size), strict=True)
    ]
