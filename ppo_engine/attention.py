"""Attention over packed rows, forward and backward.

Products of matrices do it anywhere; on a CUDA device in half precision, one fused kernel.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ppo_engine.packing import Packed, Rectangle

_FUSED_TYPES = (torch.bfloat16, torch.float16)
_FUSED_HEAD_STEP = 8
_FUSED_HEAD_LIMIT = 256


class HeadShape(NamedTuple):
    """How a layer's queries, keys and values stand beside each other."""

    queries: int
    """Heads of the queries."""
    keys: int
    """Heads of the keys, and of the values; each serves as many query heads as the other."""
    size: int
    """Numbers of one head."""

    @property
    def widths(self) -> list[int]:
        """Columns of queries, keys and values."""
        return [self.queries * self.size, self.keys * self.size, self.keys * self.size]


class Attended(NamedTuple):
    """What one layer's attention found, and what its backward pass needs."""

    result: Tensor
    """[N, queries·size]."""
    log_normalizer: Tensor | None = None
    """Of the fused kernel's softmax."""


class Attention(Protocol):
    """Attention over one layout; every layer uses it."""

    def forward(self, qkv: Tensor) -> Attended:
        """What rotated queries, keys and values [N, Σ widths] give."""

    def backward(self, qkv: Tensor, attended: Attended, of_result: Tensor) -> Tensor:
        """∂/∂qkv, [N, Σ widths]."""


def is_fused(like: Tensor, shape: HeadShape) -> bool:
    """Whether the fused kernel knows tensors such as this one."""
    return (
        like.is_cuda
        and like.dtype in _FUSED_TYPES
        and shape.size % _FUSED_HEAD_STEP == 0
        and shape.size <= _FUSED_HEAD_LIMIT
    )


def attention_over(packed: Packed, shape: HeadShape, like: Tensor) -> Attention:
    """For tensors such as `like`."""
    if is_fused(like, shape):
        return FusedAttention(packed, shape)
    return PlainAttention(packed, shape, like)


class _Span(NamedTuple):
    """Some rows of one length, and what they see."""

    rectangle: Rectangle
    prefix: int
    """Shared tokens before the rows' own."""
    mask: Tensor
    """[1, rep·S, L+S]; 0 where a token may look, −∞ ahead of it."""


class _Heads(NamedTuple):
    """Queries, keys and values of one rectangle, the heads that share keys below each other."""

    queries: Tensor
    """[G·kv, rep·S, d]."""
    keys: Tensor
    """[G·kv, L+S, d]; those of the shared beginning first."""
    values: Tensor
    """[G·kv, L+S, d]."""


class PlainAttention:
    """Products of matrices, rectangle by rectangle."""

    def __init__(self, packed: Packed, shape: HeadShape, like: Tensor) -> None:
        self._shape = shape
        self._repeats = shape.queries // shape.keys
        beginning = [(Rectangle(0, 1, packed.prefix), 0)] if packed.prefix else []
        rest = [(each, packed.prefix) for each in packed.rectangles]
        self._spans = [self._span(*each, like) for each in [*beginning, *rest]]
        self._end = len(packed.sources) - packed.filler

    def _span(self, rectangle: Rectangle, prefix: int, like: Tensor) -> _Span:
        ahead = like.new_full((rectangle.columns, rectangle.columns), -torch.inf).triu(diagonal=1)
        mask = nn.functional.pad(ahead, (prefix, 0)).repeat(self._repeats, 1)[None]
        return _Span(rectangle, prefix, mask)

    def forward(self, qkv: Tensor) -> Attended:
        """What rotated queries, keys and values [N, Σ widths] give."""
        result = qkv.new_empty(len(qkv), self._shape.widths[0])
        result[self._end :] = 0
        for span in self._spans:
            heads = self._heads(qkv, span)
            mixed = self._probabilities(heads, span) @ heads.values
            by_query = self._by_query(result, span.rectangle)
            by_query.copy_(mixed.view(by_query.shape))
        return Attended(result)

    def backward(self, qkv: Tensor, attended: Attended, of_result: Tensor) -> Tensor:  # noqa: ARG002
        """∂/∂qkv, [N, Σ widths]; the attention weights are made again."""
        result = torch.zeros_like(qkv)
        of_queries, of_keys, of_values = result.split(self._shape.widths, dim=1)
        for span in self._spans:
            heads = self._heads(qkv, span)
            weights = self._probabilities(heads, span)
            of_mixed = self._by_query(of_result, span.rectangle).reshape(heads.queries.shape)
            of_weights = of_mixed @ heads.values.transpose(1, 2)
            # The public way to this fused kernel leads through autograd.
            of_scores = torch._softmax_backward_data(  # noqa: SLF001
                of_weights, weights, -1, weights.dtype
            ).mul_(self._shape.size**-0.5)
            by_query = self._by_query(of_queries, span.rectangle)
            by_query.copy_((of_scores @ heads.keys).view(by_query.shape))
            self._add_by_key(of_keys, of_scores.transpose(1, 2) @ heads.queries, span)
            self._add_by_key(of_values, weights.transpose(1, 2) @ of_mixed, span)
        return result

    def _heads(self, qkv: Tensor, span: _Span) -> _Heads:
        (start, rows, columns), prefix = span.rectangle, span.prefix
        kv, size = self._shape.keys, self._shape.size
        parts = qkv[start : span.rectangle.end].split(self._shape.widths, dim=1)
        queries = parts[0].reshape(rows, columns, kv, self._repeats, size).permute(0, 2, 3, 1, 4)
        shared = qkv[:prefix].split(self._shape.widths, dim=1)
        widened = []
        for own, beginning in zip(parts[1:], shared[1:], strict=True):
            each = own.reshape(rows, columns, kv, size).transpose(1, 2)
            if prefix:
                first = beginning.reshape(1, prefix, kv, size).transpose(1, 2)
                each = torch.cat([first.expand(rows, -1, -1, -1), each], dim=2)
            widened.append(each.reshape(rows * kv, prefix + columns, size))
        return _Heads(queries.reshape(rows * kv, self._repeats * columns, size), *widened)

    def _probabilities(self, heads: _Heads, span: _Span) -> Tensor:
        """Attention weights, [G·kv, rep·S, L+S]."""
        scores = torch.baddbmm(
            span.mask, heads.queries, heads.keys.transpose(1, 2), alpha=self._shape.size**-0.5
        )
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)

    def _by_query(self, flat: Tensor, rectangle: Rectangle) -> Tensor:
        """A rectangle of [N, queries·d] as [G, kv, rep, S, d]; a view."""
        part = flat[rectangle.start : rectangle.end].view(
            rectangle.rows, rectangle.columns, self._shape.keys, -1, self._shape.size
        )
        return part.permute(0, 2, 3, 1, 4)

    def _add_by_key(self, flat: Tensor, found: Tensor, span: _Span) -> None:
        """Adds gradients [G·kv, L+S, d] to a span of [N, kv·d], and to the shared beginning."""
        (start, rows, columns), prefix = span.rectangle, span.prefix
        kv = self._shape.keys
        by_row = found.unflatten(0, (rows, kv)).transpose(1, 2)
        own = flat[start : span.rectangle.end].view(rows, columns, kv, -1)
        own.add_(by_row[:, prefix:])
        if prefix:
            flat[:prefix].view(prefix, kv, -1).add_(by_row[:, :prefix].sum(dim=0))


class FusedAttention:
    """FlashAttention over rows of any length (arXiv:2307.08691), PyTorch's own kernel.

    Its public function differs from release to release and does not hand out what a backward pass
    of our own needs, so the operators below it are called.
    """

    def __init__(self, packed: Packed, shape: HeadShape) -> None:
        self._shape = shape
        prefix, device = packed.prefix, packed.sources.device
        own = [each.columns for each in packed.rectangles for _ in range(each.rows)]
        # Filler needs finite results: rows of it, no longer than others.
        whole, rest = divmod(packed.filler, own[0])
        own += [own[0]] * whole + [rest] * (rest > 0)
        first = [prefix] if prefix else []
        seen = [*first, *(prefix + length for length in own)]
        self._query_ends = row_ends([*first, *own], device)
        self._key_ends = row_ends(seen, device)
        self._longest_query, self._longest_key = max([*first, *own]), max(seen)
        self._keys: SharedKeys | None = None
        if prefix:
            self._keys = SharedKeys(self._query_ends, self._key_ends, prefix)

    def forward(self, qkv: Tensor) -> Attended:
        """What rotated queries, keys and values [N, Σ widths] give."""
        result, log_normalizer, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
            *self._heads(qkv),
            *self._layout,
            0.0,
            True,  # noqa: FBT003 - positions alone
            False,  # noqa: FBT003
        )
        return Attended(result.flatten(1), log_normalizer)

    def backward(self, qkv: Tensor, attended: Attended, of_result: Tensor) -> Tensor:
        """∂/∂qkv, [N, Σ widths]."""
        by_head = (len(qkv), self._shape.queries, self._shape.size)
        no_dropout = torch.empty(0, dtype=torch.uint64, device=qkv.device)
        of_queries, of_keys, of_values = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
            of_result.view(by_head),
            *self._heads(qkv),
            attended.result.view(by_head),
            attended.log_normalizer,
            *self._layout,
            0.0,
            True,  # noqa: FBT003 - positions alone
            no_dropout,
            no_dropout,
        )
        of_pairs = torch.cat([of_keys.flatten(1), of_values.flatten(1)], dim=1)
        if self._keys is not None:
            of_pairs = self._keys.gathered_back(of_pairs)
        return torch.cat([of_queries.flatten(1), of_pairs], dim=1)

    @property
    def _layout(self) -> tuple[Tensor, Tensor, int, int]:
        return self._query_ends, self._key_ends, self._longest_query, self._longest_key

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries [N, heads, d], keys and values [K, kv, d]."""
        queries, pairs = qkv.split([self._shape.widths[0], 2 * self._shape.widths[1]], dim=1)
        if self._keys is not None:
            pairs = pairs[self._keys.sources]
        parts = (queries, *pairs.chunk(2, dim=1))
        return tuple(each.unflatten(1, (-1, self._shape.size)) for each in parts)


class SharedKeys:
    """Which keys each row sees where all rows share a beginning: that, then its own."""

    def __init__(self, query_ends: Tensor, key_ends: Tensor, prefix: int) -> None:
        device = query_ends.device
        places = torch.arange(prefix, device=device)
        tokens = torch.arange(prefix, int(query_ends[-1]), device=device)
        row = torch.searchsorted(query_ends[2:].long(), tokens, right=True)
        self._prefix = prefix
        self._shared = key_ends[1:-1, None] + places
        """[R, L]; where each row's copy of the beginning stands among the keys."""
        self._own = torch.cat([places, tokens + prefix * (row + 1)])
        """[N]; where each token itself stands."""
        self.sources = torch.empty(int(key_ends[-1]), dtype=torch.int64, device=device)
        """[K]; which token each key is of."""
        self.sources[self._shared] = places
        self.sources[self._own] = torch.arange(len(self._own), device=device)

    def gathered_back(self, of_keys: Tensor) -> Tensor:
        """Gradients [N, ·] of the tokens, those [K, ·] of their keys summed up."""
        result = of_keys[self._own]
        result[: self._prefix] += of_keys[self._shared].sum(dim=0)
        return result


def row_ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0 and where each row ends, [R + 1] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
