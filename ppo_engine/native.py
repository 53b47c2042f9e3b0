"""Kernels of our own for CPUs (`native.c`): the work of a layer between its matrix products.

PyTorch takes several walks over the memory for each of these steps, and starts each from Python;
a kernel takes one.  They are compiled when the package is installed, where there is a C compiler;
without them, and for other number formats, the callers take PyTorch's operators.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_HEAD_NUMBERS = 256
"""The longest head that attention takes."""
MOST_KEYS = 1024
"""The most keys that `causal_softmax` takes."""
MOST_SEEN = 256
"""The most keys that `attend_rows` takes."""
MOST_RANKS = 1536
MOST_PARTS = 8
"""The most rows of `LowRank.down` and the most parts that a group's kernels take."""
_FOLDER = Path(__file__).parent
_VARIANTS = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
"""By what PyTorch takes the processor to be capable of, best first; others have one for all."""
_BF16_VARIANT = "avx512_bf16"
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_POINTER, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "convert": (*[_POINTER] * 4, _COUNT),
    "rms_norm": (_POINTER, _POINTER, _REAL, _POINTER, _POINTER, _COUNT, _COUNT),
    "rms_norm_backward": (*[_POINTER] * 6, _COUNT, _COUNT),
    "gated": (_POINTER, _POINTER, _COUNT, _COUNT),
    "gated_backward": (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT),
    "rotate": (_POINTER, _POINTER, _POINTER, _REAL, *[_COUNT] * 4),
    "attend_next": (*[_POINTER] * 7, _REAL, *[_COUNT] * 6),
    "causal_softmax": (_POINTER, _REAL, *[_COUNT] * 4),
    "take_in": (*[_POINTER] * 7, *[_COUNT] * 3),
    "attend_rows": (*[_POINTER] * 2, _REAL, *[_COUNT] * 7),
    "attend_rows_backward": (*[_POINTER] * 4, _REAL, *[_COUNT] * 7),
    "product": (*[_POINTER] * 6, _REAL, *[_POINTER] * 2, *[_COUNT] * 6),
    "large_product": (*[_POINTER] * 4, _REAL, *[_POINTER] * 2, *[_COUNT] * 6),
    "gradient": (*[_POINTER] * 3, *[_COUNT] * 6),
    "group_forward": (*[_POINTER] * 9, *[_COUNT] * 5),
    "group_backward": (*[_POINTER] * 12, *[_COUNT] * 5),
}
"""The last seven in bf16 alone, where the processor has instructions for it."""


def kernels_for(tensor: Tensor) -> "Kernels | None":
    """The kernels for such tensors, if there are any."""
    if tensor.device.type != "cpu":
        return None
    return _kernels().get(tensor.dtype)


def product_kernels_for(tensor: Tensor) -> "Kernels | None":
    """The kernels for such tensors, if they have `product`."""
    kernels = kernels_for(tensor)
    return kernels if kernels is not None and kernels.has_product else None


def large_product_kernels_for(tensor: Tensor) -> "Kernels | None":
    """The kernels for such tensors, if they have a `large_product` worth taking.

    A processor with AMX makes such products many times as fast, by oneDNN.
    """
    has_amx = torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - no public name
    return None if has_amx else product_kernels_for(tensor)


def variant() -> str | None:
    """The instruction set that the kernels were compiled for; None where there are none."""
    found = _library()
    return None if found is None else found[0]


@functools.cache
def _kernels() -> "dict[torch.dtype, Kernels]":
    found = _library()
    if found is None:
        return {}
    return {dtype: Kernels(found[1], suffix) for dtype, suffix in _FORMATS.items()}


@functools.cache
def _library() -> tuple[str, ctypes.CDLL] | None:
    """The best variant that was compiled and that this processor runs."""
    for name in usable_variants():
        path = _FOLDER / f"_native_{name}.so"
        if path.exists():
            try:
                return name, ctypes.CDLL(str(path))
            except OSError:  # no OpenMP in this PyTorch, or another platform's file
                continue
    return None


def usable_variants() -> tuple[str, ...]:
    """Names of those that this processor runs, compiled or not, best first."""
    names = _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ("any",))
    has_bf16 = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - no public name
    return (_BF16_VARIANT, *names) if has_bf16 else names


class Part(NamedTuple):
    """Where one of several low-rank additions reads and adds."""

    first: int
    end: int
    """Columns of the result."""
    first_rank: int
    end_rank: int
    """Columns of the inner values."""

    @property
    def numbers(self) -> int:
        """In its matrix."""
        return (self.end - self.first) * (self.end_rank - self.first_rank)


class LowRank(NamedTuple):
    """Low-rank additions to the products of layers that read the same input.

    Each takes some columns of the inner values, rows·Downᵀ, times a matrix, onto some columns of
    the result.
    """

    down: Tensor
    """[Σ r, in]."""
    ups: Tensor
    """The matrices [r, columns] one after the other."""
    parts: tuple[Part, ...]
    """Of each matrix; they follow one upon the other."""

    @property
    def is_small(self) -> bool:
        """Whether a group's kernels take it."""
        return len(self.down) <= MOST_RANKS and len(self.parts) <= MOST_PARTS


@functools.lru_cache(maxsize=64)
def _numbers_of(parts: tuple[Part, ...]) -> Tensor:
    return torch.tensor(parts, dtype=torch.int64)


class GradientRoom(NamedTuple):
    """Where the gradients of low-rank additions go, among others."""

    together: Tensor
    """[·] fp32."""
    starts: Tensor
    """Where that of a part's rows of `down` begins, and of its matrix, transposed; [parts, 2]."""
    scales: Tensor
    """Factors on the latter, [parts] fp32."""


class Conversion(NamedTuple):
    """What becomes of one matrix among many."""

    shape: tuple[int, int]
    factor: float
    """On its numbers."""
    is_transposed: bool


@functools.lru_cache(maxsize=16)
def _table_of(conversions: tuple[Conversion, ...]) -> tuple[Tensor, Tensor]:
    """Factors; and rows, columns, place in the target and whether it is transposed."""
    numbers, place = [], 0
    for (rows, columns), _, is_transposed in conversions:
        numbers.append((rows, columns, place, is_transposed))
        place += rows * columns
    factors = torch.tensor([each.factor for each in conversions])
    return factors, torch.tensor(numbers, dtype=torch.int64)


class Sequences(NamedTuple):
    """Sequences of one length among N tokens, which all see a beginning too."""

    first: int
    """Place of their first token; they follow one upon the other."""
    rows: int
    columns: int
    """Tokens of each."""
    prefix: int
    """Tokens of the beginning, the first of the N."""
    queries: int
    """Heads of the queries."""
    groups: int
    """Heads of the keys."""


def _with_whole_rows(matrix: Tensor) -> Tensor:
    """The same, its rows' numbers side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


class Kernels:
    """For tensors of one number format, but where another is said."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        self._functions: dict[str, Any] = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"{name}_{suffix}", None)
            if function is not None:
                function.argtypes, function.restype = arguments, None
                self._functions[name] = function

    def _call(self, name: str, *arguments: "Tensor | float | ctypes.Array[Any] | None") -> None:
        """By the address of what a tensor holds, without gaps."""
        self._functions[name](
            *[each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        )

    def convert(
        self, sources: Sequence[Tensor], conversions: "tuple[Conversion, ...]", target: Tensor
    ) -> None:
        """Sets the target to the sources, fp32 matrices without gaps, one after the other."""
        count = len(sources)
        self._call(
            "convert",
            (_POINTER * count)(*[each.data_ptr() for each in sources]),
            target,
            *_table_of(conversions),
            count,
        )

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """x/rms(x)·weight [N, H], and 1/rms [N, 1] fp32."""
        hidden = hidden.contiguous()
        normed, inverse = torch.empty_like(hidden), torch.empty(hidden.shape[0], 1)
        self._call("rms_norm", hidden, weight, epsilon, normed, inverse, *hidden.shape)
        return normed, inverse

    def rms_norm_backward(
        self,
        of_normed: Tensor,
        hidden: Tensor,
        weight: Tensor,
        inverse: Tensor,
        onto: Tensor | None,
    ) -> Tensor:
        """∂/∂x of `rms_norm` [N, H], added to `onto`; `inverse` is its 1/rms."""
        of_normed = of_normed.contiguous()
        of_hidden = torch.empty_like(of_normed)
        self._call(
            "rms_norm_backward",
            of_normed,
            hidden.contiguous(),
            weight,
            inverse,
            None if onto is None else onto.contiguous(),
            of_hidden,
            *hidden.shape,
        )
        return of_hidden

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate)·up [N, F] of both side by side [N, 2F]."""
        result = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._call("gated", gate_up, result, *result.shape)
        return result

    def gated_backward(self, of_result: Tensor, gate_up: Tensor) -> Tensor:
        """∂/∂gate_up [N, 2F] of `gated`."""
        of_gate_up = torch.empty_like(gate_up)
        self._call("gated_backward", of_result.contiguous(), gate_up, of_gate_up, *of_result.shape)
        return of_gate_up

    def rotate(
        self, rows: Tensor, cos: Tensor, sin: Tensor, *, heads: int, direction: float
    ) -> None:
        """Rotates the first heads of [N, ·] in place; the angles are [N, 1, d]."""
        self._call("rotate", rows, cos, sin, direction, *rows.shape, heads, cos.shape[-1])

    def attend_next(
        self,
        heads: Tensor,
        shared: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        lengths: Tensor,
    ) -> Tensor:
        """Attention of one more token a sequence, [B, queries·d]; keeps its key and value.

        `heads` [B, queries + 2·kv, d] are rotated; of the keys and values, `shared` [kv, L, d] are
        seen by all, of `own` [B, kv, room, d] each sequence's `lengths` [B] first ones.
        """
        rows, all_heads, size = heads.shape
        groups, prefix, _ = shared[0].shape
        queries = all_heads - 2 * groups
        result = heads.new_empty(rows, queries * size)
        self._call(
            "attend_next",
            heads,
            *shared,
            *own,
            lengths,
            result,
            size**-0.5,
            rows,
            queries,
            groups,
            size,
            prefix,
            own[0].shape[2],
        )
        return result

    def causal_softmax(self, scores: Tensor, *, scale: float, columns: int, prefix: int) -> None:
        """Softmax of scale · scores [..., columns, prefix + columns], in place.

        A query sees the keys of the prefix, and of its own row those up to its own place.
        """
        self._call(
            "causal_softmax",
            scores,
            scale,
            scores.numel() // scores.shape[-1],
            scores.shape[-1],
            columns,
            prefix,
        )

    def take_in(
        self,
        scores: Tensor,
        others: Tensor | None,
        tokens: Tensor,
        start: int,
        sums: Tensor,
        plain: Tensor | None,
        weighted: Tensor | None,
    ) -> Tensor:
        """Adds a block of the vocabulary's scores to running sums; how far the highest moved, [N].

        scores, others [N, V'] fp32 from the entry `start` on, chosen tokens [N], sums [5, N] fp32;
        sets exp(z − top) and exp(z − top)·(z − top), [N, V'].
        """
        shift = torch.empty_like(sums[0])
        self._call(
            "take_in", scores, others, tokens, sums, shift, plain, weighted, *scores.shape, start
        )
        return shift

    def attend_rows(self, qkv: Tensor, result: Tensor, sequences: Sequences) -> None:
        """Causal attention of the sequences; sets their tokens' results [N, queries·d].

        qkv [N, (queries + 2·groups)·d] is rotated.  There where `product` is.
        """
        size = result.shape[1] // sequences.queries
        self._call("attend_rows", qkv, result, size**-0.5, *sequences, size)

    def attend_rows_backward(
        self, qkv: Tensor, of_result: Tensor, of_qkv: Tensor, sequences: Sequences
    ) -> None:
        """Adds ∂/∂qkv of `attend_rows` to `of_qkv` [N, (queries + 2·groups)·d]."""
        size = of_result.shape[1] // sequences.queries
        shared = torch.empty(sequences.rows, 2 * sequences.groups, sequences.prefix, size)
        self._call(
            "attend_rows_backward",
            qkv,
            of_result.contiguous(),
            of_qkv,
            shared,
            size**-0.5,
            *sequences,
            size,
        )

    @property
    def has_product(self) -> bool:
        """Whether there is `product`: in bf16, where the processor has instructions for it."""
        return "product" in self._functions

    def product(
        self,
        rows: Tensor,
        weight: Tensor,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
        divisor: float = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """(rows·Wᵀ + inner·Upᵀ + bias + onto)/divisor, [N, out] bf16 or fp32, summed up in fp32.

        rows [N, in], W [out, in]; `low_rank` is inner [N, r] and Up [out, r]; the bias [out] is
        fp32, `onto` [N, out] bf16. A row's result does not depend on the rows beside it.
        """
        result = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype)
        inner, up = low_rank or (None, None)
        is_wide, rows = dtype == torch.float32, _with_whole_rows(rows)
        self._call(
            "product",
            rows,
            weight,
            inner,
            up,
            bias,
            None if onto is None else onto.contiguous(),
            divisor,
            result if is_wide else None,
            None if is_wide else result,
            *result.shape,
            rows.shape[1],
            0 if inner is None else inner.shape[1],
            rows.stride(0),
            result.stride(0),
        )
        return result

    def large_product(
        self,
        left: Tensor,
        right: Tensor,
        *,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
        divisor: float = 1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """(left·right + bias + onto)/divisor, [N, M] bf16 or fp32.

        left [N, K] and right [K, M], which may be a transpose; the bias [M] is fp32, `onto` [N, M]
        bf16; summed up in fp32.  For many rows: there a part of the right factor is brought into
        order first.  A row's result does not depend on the rows beside it.
        """
        is_transposed = right.stride(0) == 1
        result = torch.empty(left.shape[0], right.shape[1], dtype=dtype)
        is_wide, left = dtype == torch.float32, _with_whole_rows(left)
        self._call(
            "large_product",
            left,
            right,
            bias,
            None if onto is None else onto.contiguous(),
            divisor,
            result if is_wide else None,
            None if is_wide else result,
            *result.shape,
            left.shape[1],
            left.stride(0),
            right.stride(1 if is_transposed else 0),
            is_transposed,
        )
        return result

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ·right in fp32; [N, r] and [N, M], of which one has few columns.

        There where `product` is.
        """
        is_transposed = left.shape[1] > right.shape[1]
        narrow, wide = (right, left) if is_transposed else (left, right)
        result = torch.empty(left.shape[1], right.shape[1])
        self._call(
            "gradient",
            narrow,
            wide,
            result,
            left.shape[0],
            narrow.shape[1],
            wide.shape[1],
            narrow.stride(0),
            wide.stride(0),
            is_transposed,
        )
        return result

    def group_forward(
        self,
        rows: Tensor,
        weight: Tensor,
        low_rank: LowRank,
        *,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """rows·Wᵀ + the low-rank additions + bias + onto, [N, out], and the inner values [N, Σ r].

        rows [N, in], W [out, in]; the bias [out] is fp32, the rest bf16.  For many rows, and
        additions that are small.
        """
        rows, count = rows.contiguous(), rows.shape[0]
        result = torch.empty(count, weight.shape[0], dtype=rows.dtype)
        inner = torch.empty(count, low_rank.down.shape[0], dtype=rows.dtype)
        self._call(
            "group_forward",
            rows,
            weight,
            low_rank.down,
            low_rank.ups,
            _numbers_of(low_rank.parts),
            bias,
            None if onto is None else onto.contiguous(),
            inner,
            result,
            *rows.shape,
            *result.shape[1:],
            *inner.shape[1:],
            len(low_rank.parts),
        )
        return result, inner

    def group_backward(
        self,
        of_outputs: Tensor,
        rows: Tensor,
        inner: Tensor,
        weight: Tensor,
        low_rank: LowRank,
        room: GradientRoom,
    ) -> Tensor:
        """∂/∂rows [N, in] of `group_forward`; sets those of the additions in the room.

        of_outputs [N, out]; `inner` are its inner values.
        """
        of_outputs, rows = of_outputs.contiguous(), rows.contiguous()
        of_inner, of_rows = torch.empty_like(inner), torch.empty_like(rows)
        self._call(
            "group_backward",
            of_outputs,
            rows,
            inner,
            weight,
            low_rank.down,
            low_rank.ups,
            _numbers_of(low_rank.parts),
            room.starts,
            room.scales,
            of_inner,
            of_rows,
            room.together,
            *rows.shape,
            *of_outputs.shape[1:],
            *inner.shape[1:],
            len(low_rank.parts),
        )
        return of_rows
