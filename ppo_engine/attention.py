"""Attention over packed rows, forward and backward.

Products of matrices do it anywhere; fused kernels do it faster: on a CPU in fp32, and in half
precision on a CUDA device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ppo_engine.native import (
    MOST_HEAD_NUMBERS,
    MOST_KEYS,
    MOST_SEEN,
    Sequences,
    kernels_for,
    product_kernels_for,
)
from ppo_engine.packing import Packed, Rectangle
from ppo_engine.products import wide_format

_FUSED_TYPES = (torch.bfloat16, torch.float16)
_FUSED_HEAD_STEP = 8
_FUSED_HEAD_LIMIT = 256
_SHORT_KEYS = 256
"""In bf16 plain products beat the blockwise kernel, which is none in bf16, up to about here."""
_KEY_STEP = 16
"""A CPU's vectors of fp32 hold no more; what is left of a row's keys would round differently."""


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
    log_normalizers: tuple[Tensor | None, ...] = ()
    """Of the softmax, for each call of a kernel; None where a kernel needs none."""


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
    return SpanwiseAttention(packed, shape, like)


class _Span(NamedTuple):
    """Some rows of one length, and what they see."""

    rectangle: Rectangle
    prefix: int
    """Shared tokens before the rows' own."""
    mask: Tensor
    """[S, L+S]; 0 where a token may look, −∞ ahead of it."""

    @property
    def keys(self) -> int:
        """L+S; what the last token of a row sees."""
        return self.prefix + self.rectangle.columns


def _spans(packed: Packed, like: Tensor) -> list[_Span]:
    """The shared beginning, if there is one, and then every rectangle of rows."""

    def span(rectangle: Rectangle, prefix: int) -> _Span:
        ahead = like.new_full((rectangle.columns, rectangle.columns), -torch.inf).triu(diagonal=1)
        return _Span(rectangle, prefix, nn.functional.pad(ahead, (prefix, 0)))

    beginning = [span(Rectangle(0, 1, packed.prefix), 0)] if packed.prefix else []
    return [*beginning, *(span(each, packed.prefix) for each in packed.rectangles)]


def _with_beginning(flat: Tensor, span: _Span, heads: int) -> Tensor:
    """A span of keys or values [N, heads·d], the shared ones first; [G, heads, L+S, d]."""
    (start, rows, columns), prefix = span.rectangle, span.prefix
    own = flat[start : span.rectangle.end].view(rows, columns, heads, -1).transpose(1, 2)
    if not prefix:
        return own
    first = flat[:prefix].view(prefix, heads, -1).transpose(0, 1)
    return torch.cat([first.expand(rows, -1, -1, -1), own], dim=2)


def _add_by_key(flat: Tensor, found: Tensor, span: _Span) -> None:
    """Adds gradients [G, heads, L+S, d] to a span of [N, heads·d], and to the shared beginning."""
    (start, rows, columns), prefix = span.rectangle, span.prefix
    heads = found.shape[1]
    by_row = found.transpose(1, 2)
    flat[start : span.rectangle.end].view(rows, columns, heads, -1).add_(by_row[:, prefix:])
    if prefix:
        flat[:prefix].view(prefix, heads, -1).add_(by_row[:, :prefix].sum(dim=0))


class _Heads(NamedTuple):
    """Queries, keys and values of one rectangle, the heads that share keys below each other."""

    queries: Tensor
    """[G·kv, rep·S, d]."""
    keys: Tensor
    """[G·kv, L+S, d]; those of the shared beginning first."""
    values: Tensor
    """[G·kv, L+S, d]."""


class SpanKernel(Protocol):
    """Attention of one span of rows; writes into tensors that it shares with the other spans."""

    def __init__(self, span: _Span, shape: HeadShape, like: Tensor) -> None: ...

    def forward(self, qkv: Tensor, result: Tensor) -> Tensor | None:
        """Sets the span's part of `result` [N, queries·d]; what its backward pass needs besides."""

    def backward(
        self, qkv: Tensor, attended: Attended, number: int, of_result: Tensor, of_qkv: Tensor
    ) -> None:
        """Adds the span's part of ∂/∂qkv to `of_qkv` [N, Σ widths]; it is span `number`."""


class SpanwiseAttention:
    """Attention span by span, each with the kernel that suits it."""

    def __init__(
        self,
        packed: Packed,
        shape: HeadShape,
        like: Tensor,
        kind: type[SpanKernel] | None = None,
    ) -> None:
        """All spans take the kernel `kind` if it is given."""
        self._shape = shape
        self._kernels = [
            (kind or _kernel_for(span, shape, like))(span, shape, like)
            for span in _spans(packed, like)
        ]
        self._end = len(packed.sources) - packed.filler

    def forward(self, qkv: Tensor) -> Attended:
        """What rotated queries, keys and values [N, Σ widths] give."""
        result = qkv.new_empty(len(qkv), self._shape.widths[0])
        result[self._end :] = 0
        return Attended(result, tuple(kernel.forward(qkv, result) for kernel in self._kernels))

    def backward(self, qkv: Tensor, attended: Attended, of_result: Tensor) -> Tensor:
        """∂/∂qkv, [N, Σ widths]."""
        of_qkv = torch.zeros_like(qkv)
        for number, kernel in enumerate(self._kernels):
            kernel.backward(qkv, attended, number, of_result, of_qkv)
        return of_qkv


def depends_on_beginning(like: Tensor, longest: int) -> bool:
    """Whether a row's last bits may depend on how long a beginning its micro-batch shares.

    With rows of up to `longest` tokens, in tensors such as `like`: a beginning is attended to as a
    row of its own, and the length of a row decides on its kernel.
    """
    return like.device.type == "cpu" and like.dtype == torch.bfloat16 and longest > _SHORT_KEYS


def _kernel_for(span: _Span, shape: HeadShape, like: Tensor) -> type[SpanKernel]:
    """By number format, heads and the length of the span's rows alone.

    A row must get the same kernel in every micro-batch; see `depends_on_beginning`.
    """
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.bfloat16):
        return PlainKernel
    if like.dtype == torch.float32 or span.keys > _SHORT_KEYS:
        return BlockwiseKernel
    return NativeKernel if NativeKernel.takes(span, shape, like) else PlainKernel


class PlainKernel:
    """Products of matrices."""

    def __init__(self, span: _Span, shape: HeadShape, like: Tensor) -> None:  # noqa: ARG002
        self._shape = shape
        self._span = span
        self._mask = span.mask.repeat(shape.queries // shape.keys, 1)

    def forward(self, qkv: Tensor, result: Tensor) -> None:
        """Sets the span's part of `result` [N, queries·d]."""
        heads = self._heads(qkv)
        mixed = self._probabilities(heads) @ heads.values
        by_query = self._by_query(result)
        by_query.copy_(mixed.view(by_query.shape))

    def backward(
        self,
        qkv: Tensor,
        attended: Attended,  # noqa: ARG002
        number: int,  # noqa: ARG002
        of_result: Tensor,
        of_qkv: Tensor,
    ) -> None:
        """Adds the span's part of ∂/∂qkv; the attention weights are made again."""
        of_queries, of_keys, of_values = of_qkv.split(self._shape.widths, dim=1)
        heads = self._heads(qkv)
        weights = self._probabilities(heads)
        of_mixed = self._by_query(of_result).reshape(heads.queries.shape)
        of_weights = of_mixed @ heads.values.transpose(1, 2)
        # The public way to this fused kernel leads through autograd.
        of_scores = torch._softmax_backward_data(  # noqa: SLF001
            of_weights, weights, -1, weights.dtype
        ).mul_(self._shape.size**-0.5)
        by_query = self._by_query(of_queries)
        by_query.copy_((of_scores @ heads.keys).view(by_query.shape))
        by_key = (
            (of_keys, of_scores.transpose(1, 2) @ heads.queries),
            (of_values, weights.transpose(1, 2) @ of_mixed),
        )
        for flat, found in by_key:
            _add_by_key(flat, found.unflatten(0, (self._span.rectangle.rows, -1)), self._span)

    def _heads(self, qkv: Tensor) -> _Heads:
        flat_queries, *pairs = qkv.split(self._shape.widths, dim=1)
        queries = self._by_query(flat_queries)
        keys, values = (
            _with_beginning(each, self._span, self._shape.keys).flatten(0, 1) for each in pairs
        )
        return _Heads(queries.flatten(0, 1).flatten(1, 2), keys, values)

    def _probabilities(self, heads: _Heads) -> Tensor:
        """Attention weights, [G·kv, rep·S, L+S]."""
        scale = self._shape.size**-0.5
        kernels = kernels_for(heads.queries)
        if kernels is not None and self._span.keys <= MOST_KEYS:
            weights = heads.queries @ heads.keys.transpose(1, 2)
            kernels.causal_softmax(
                weights,
                scale=scale,
                columns=self._span.rectangle.columns,
                prefix=self._span.prefix,
            )
            return weights
        scores = torch.baddbmm(self._mask, heads.queries, heads.keys.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, dim=-1)  # in fp32, but for the result

    def _by_query(self, flat: Tensor) -> Tensor:
        """The span's part of [N, queries·d] as [G, kv, rep, S, d]; a view."""
        start, rows, columns = self._span.rectangle
        part = flat[start : self._span.rectangle.end].view(
            rows, columns, self._shape.keys, -1, self._shape.size
        )
        return part.permute(0, 2, 3, 1, 4)


class NativeKernel:
    """Kernels of our own."""

    def __init__(self, span: _Span, shape: HeadShape, like: Tensor) -> None:
        kernels = product_kernels_for(like)
        assert kernels is not None  # noqa: S101 - or another kind was chosen
        self._kernels = kernels
        self._sequences = Sequences(*span.rectangle, span.prefix, shape.queries, shape.keys)

    @classmethod
    def takes(cls, span: _Span, shape: HeadShape, like: Tensor) -> bool:
        """Whether it knows such heads and so many keys."""
        return (
            product_kernels_for(like) is not None
            and span.keys <= MOST_SEEN
            and shape.size <= MOST_HEAD_NUMBERS
        )

    def forward(self, qkv: Tensor, result: Tensor) -> None:
        """Sets the span's part of `result` [N, queries·d]."""
        self._kernels.attend_rows(qkv, result, self._sequences)

    def backward(
        self,
        qkv: Tensor,
        attended: Attended,  # noqa: ARG002
        number: int,  # noqa: ARG002
        of_result: Tensor,
        of_qkv: Tensor,
    ) -> None:
        """Adds the span's part of ∂/∂qkv; the attention weights are made again."""
        self._kernels.attend_rows_backward(qkv, of_result, of_qkv, self._sequences)


class BlockwiseKernel:
    """FlashAttention on a CPU in fp32, PyTorch's own kernel; other formats are converted.

    Its public function leads through autograd, so the operators below it are called.
    """

    def __init__(self, span: _Span, shape: HeadShape, like: Tensor) -> None:
        self._shape = shape
        self._span = span
        self._missing = -span.keys % _KEY_STEP
        """Filler keys behind a row's own."""
        self._format = wide_format(like.dtype)
        mask = nn.functional.pad(span.mask, (0, self._missing), value=-torch.inf)
        # Itself and all before it; a mask where there is a beginning.
        self._sight: dict[str, Any] = {
            "is_causal": not span.prefix,
            "attn_mask": mask.to(self._format) if span.prefix else None,
        }

    def forward(self, qkv: Tensor, result: Tensor) -> Tensor:
        """Sets the span's part of `result` [N, queries·d]; the softmax's log-normalizers."""
        found, log_normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            *self._heads(qkv), **self._sight
        )
        self._by_head(result).copy_(found)
        return log_normalizer  # type: ignore[no-any-return]

    def backward(
        self, qkv: Tensor, attended: Attended, number: int, of_result: Tensor, of_qkv: Tensor
    ) -> None:
        """Adds the span's part of ∂/∂qkv."""
        of_queries, *of_pairs = of_qkv.split(self._shape.widths, dim=1)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
        by_query, *by_key = backward(
            self._by_head(of_result).to(self._format),
            *self._heads(qkv),
            self._by_head(attended.result).to(self._format),
            attended.log_normalizers[number],
            dropout_p=0.0,
            **self._sight,
        )
        self._by_head(of_queries).copy_(by_query)
        for flat, found in zip(of_pairs, by_key, strict=True):
            _add_by_key(flat, found[:, :, : self._span.keys].to(flat.dtype), self._span)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries [G, heads, S, d], keys and values [G, kv, K, d], those after L+S for no one."""
        queries, *pairs = qkv.split(self._shape.widths, dim=1)
        widened = (_with_beginning(each, self._span, self._shape.keys) for each in pairs)
        filled = (nn.functional.pad(each, (0, 0, 0, self._missing)) for each in widened)
        return tuple(each.to(self._format) for each in (self._by_head(queries), *filled))

    def _by_head(self, flat: Tensor) -> Tensor:
        """The span's part of [N, heads·d] as [G, heads, S, d]; a view."""
        start, rows, columns = self._span.rectangle
        part = flat[start : self._span.rectangle.end].view(
            rows, columns, self._shape.queries, self._shape.size
        )
        return part.transpose(1, 2)


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
        return Attended(result.flatten(1), (log_normalizer,))

    def backward(self, qkv: Tensor, attended: Attended, of_result: Tensor) -> Tensor:
        """∂/∂qkv, [N, Σ widths]."""
        by_head = (len(qkv), self._shape.queries, self._shape.size)
        no_dropout = torch.empty(0, dtype=torch.uint64, device=qkv.device)
        of_queries, of_keys, of_values = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
            of_result.view(by_head),
            *self._heads(qkv),
            attended.result.view(by_head),
            *attended.log_normalizers,
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
