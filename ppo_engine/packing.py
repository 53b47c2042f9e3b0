"""Rows laid end to end for one forward pass: no padding between prompt and start, little after.

A padded batch spends much of its time on tokens that nobody reads.  Here the real tokens of all
rows stand in one flat sequence: first the beginning that all rows share, once; then rectangles of
rows of about equal length, each row from its first own token to the last one whose state is read.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

COLUMN_STEP = 4
"""Rows are filled up to a multiple of so many tokens, so that a few rectangles hold them all."""
FEWEST_TOKENS = 32
"""Products of fewer than about a dozen tokens take other kernels, which round differently."""
_FEWEST_COLUMNS = 16
"""The same for one row in attention."""


class Rectangle(NamedTuple):
    """Some rows of one length in the flat sequence."""

    start: int
    """Place of the first token."""
    rows: int
    columns: int
    """Own tokens of each row, filled up."""

    @property
    def end(self) -> int:
        """Place after the last token."""
        return self.start + self.rows * self.columns


class CommonShape(NamedTuple):
    """What every micro-batch of a rollout is brought to where products or attention mind."""

    tokens: int
    """Of the flat sequence, the beginning and filler included; at least so many."""
    prefix: int
    """Leading tokens that all rows of the rollout share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows of a micro-batch as one flat sequence of N tokens."""

    sources: Tensor
    """[N] int64; where each token stands in the flattened [B, S] batch."""
    is_real: Tensor
    """[N] bool; False = filler, a copy of some token that nobody reads."""
    positions: Tensor
    """[N] int64; place of each token in its row, from 0."""
    prefix: int
    """Leading tokens of the sequence that belong to every row."""
    rectangles: tuple[Rectangle, ...]
    """The rows' own tokens."""
    filler: int
    """Tokens behind the last row, which belong to none."""
    kept: Tensor
    """[n] int64; places whose states are read, row by row, column by column; then filler."""
    num_kept: int
    """How many of these are no filler."""
    beginnings: Tensor
    """[R] int64; where each row's first token stands in the flattened batch."""

    def unpacked(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values [N, H] at their tokens' places in the batch, [B, S, H]; zeros elsewhere."""
        result: Tensor = values.new_zeros(shape.numel(), values.shape[1])
        result[self.sources[self.is_real]] = values[self.is_real]
        places = self.beginnings[:, None] + torch.arange(self.prefix, device=values.device)
        result[places] = values[: self.prefix]
        return result.view(*shape, -1)


def common_prefix(tokens: Tensor, attention_mask: Tensor, read: Tensor) -> int:
    """Number of leading tokens that all rows share and that stand before any state read.

    A multiple of `COLUMN_STEP`; 0 where there is nothing to save.
    """
    used = read.any(dim=1)
    if int(used.sum()) < 2:
        return 0
    tokens, attention_mask, read = tokens[used], attention_mask[used], read[used]
    first = attention_mask.long().argmax(dim=1)
    limit = int((read.long().argmax(dim=1) - first).min())
    places = first[:, None] + torch.arange(limit, device=tokens.device)
    leading = tokens.gather(1, places)
    shared = int((leading == leading[0]).all(dim=0).long().cumprod(dim=0).sum())
    last = attention_mask.shape[1] - read.flip(1).long().argmax(dim=1)
    shared = min(shared, int((last - first).min()) - _FEWEST_COLUMNS)
    shared -= shared % COLUMN_STEP
    return shared if shared >= _FEWEST_COLUMNS else 0


def filled_length(tokens: int) -> int:
    """Columns that a row of so many tokens takes, its filler included."""
    return max(_FEWEST_COLUMNS, -(-tokens // COLUMN_STEP) * COLUMN_STEP)


def pack(attention_mask: Tensor, read: Tensor, *, prefix: int, pad_to: int = 0) -> Packed:
    """The flat layout of rows [B, S]; rows of which no state is read are left out.

    `read` [B, S] is True where a state is wanted.  Each row goes from its first real token to the
    last such place, with no gap.  There are at least `pad_to` tokens and states: a fixed number
    makes products round the same, whatever rows come together.  `prefix`: `common_prefix`.
    """
    columns = attention_mask.shape[1]
    first = attention_mask.long().argmax(dim=1).tolist()
    reads = [row.nonzero().squeeze(1).tolist() for row in read.cpu()]
    used = [row for row, places in enumerate(reads) if places]
    lengths = {row: reads[row][-1] + 1 - first[row] for row in used}
    # Counted with the beginning, so that a row's attention has the same width wherever it ends.
    widths = {row: filled_length(lengths[row]) - prefix for row in used}
    sources = [used[0] * columns + first[used[0]] + place for place in range(prefix)]
    is_real = [True] * prefix
    positions = list(range(prefix))
    rectangles: list[Rectangle] = []
    starts = {}
    for row in sorted(used, key=lambda row: -widths[row]):
        width = widths[row]
        starts[row] = len(sources) - first[row] - prefix
        if rectangles and rectangles[-1].columns == width:
            rectangles[-1] = rectangles[-1]._replace(rows=rectangles[-1].rows + 1)
        else:
            rectangles.append(Rectangle(len(sources), 1, width))
        begin = row * columns + first[row]
        own = range(begin + prefix, begin + lengths[row])
        filler = width - len(own)
        sources += [*own, *[own[-1]] * filler]
        is_real += [True] * len(own) + [False] * filler
        positions += range(prefix, prefix + width)
    missing = max(0, max(pad_to, FEWEST_TOKENS) - len(sources))
    sources += [sources[-1]] * missing
    is_real += [False] * missing
    positions += [prefix] * missing
    kept = [starts[row] + place for row in used for place in reads[row]]
    num_kept = len(kept)
    kept += [kept[-1]] * (max(pad_to, FEWEST_TOKENS) - num_kept)
    device = attention_mask.device
    return Packed(
        sources=torch.tensor(sources, device=device),
        is_real=torch.tensor(is_real, device=device),
        positions=torch.tensor(positions, device=device),
        prefix=prefix,
        rectangles=tuple(rectangles),
        filler=missing,
        kept=torch.tensor(kept, device=device),
        num_kept=num_kept,
        beginnings=torch.tensor([row * columns + first[row] for row in used], device=device),
    )
