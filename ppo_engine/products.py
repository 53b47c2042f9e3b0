"""Products of matrices: in more digits than their factors have, in shapes and layouts that suit."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

_COLUMNS = 192
"""Per thread, in a strip of an fp32 product on a CPU: wide results cost MKL up to a third more."""
_ROWS = 1536
"""In a strip of a high product: parts that stay in the caches."""
# oneDNN, which makes the products in bf16 and of packed weights, keeps half a megabyte or more for
# every shape it has met, of up to 1,024 unless it is told otherwise before the first one; and so
# does the layer between PyTorch and it (ideep), in a cache of its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")

_PACKED_FOR = 16
"""Rows; the layout serves other numbers of them as well."""
_TRIED_ROWS = 512
_TRIED_PARTS = (slice(0, 32), slice(7, 107), slice(100, 357), slice(200, 512))
"""Rows that are tried alone: few and many, at even and at odd places."""


def row_depends_on_others(weights: Sequence[Tensor]) -> bool:
    """Whether a row's product with one of the weights [out, in] depends on the rows beside it.

    In its last bits, and as tried out here and now: another machine may use other kernels.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        rows = torch.randn(_TRIED_ROWS, weight.shape[1], generator=generator).to(weight)
        together = rows @ weight.t()
        if any(not torch.equal(rows[part] @ weight.t(), together[part]) for part in _TRIED_PARTS):
            return True
    return False


def is_packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `PackedWeight` takes such weights: on x86 processors that compute in the format."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - no public name
    return dtype == torch.float32


class PackedWeight:
    """A weight in oneDNN's own layout, read in the order in which products need it.

    That is worth most with few rows, whose products take as long as reading the weight; a row's
    result does not depend on the rows beside it.  PyTorch's compiler packs weights so for
    inference; there is no public function for it.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight` [out, in], copied."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
            weight.contiguous(), _PACKED_FOR
        )

    def product(
        self, rows: Tensor, *, bias: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """rows·Wᵀ + bias + onto, [N, out]; rows are [N, in], the bias [out], `onto` [N, out]."""
        multiply, rows = torch.ops.mkldnn._linear_pointwise, rows.contiguous()  # noqa: SLF001
        if onto is not None:
            added: Tensor = multiply.binary(rows, onto.contiguous(), self._weight, bias, "add")
            return added
        result: Tensor = multiply(rows, self._weight, bias, "none", [], "")
        return result


def wide_format(dtype: torch.dtype) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, summed up and given in fp32 or wider."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = wide_format(torch.promote_types(left.dtype, right.dtype))
    return product(left.to(wide), right.to(wide))


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, on a CPU in fp32 in strips of a wide or a high result."""
    if left.device.type != "cpu" or left.dtype != torch.float32:
        return left @ right
    rows, columns = len(left), right.shape[1]
    width = _COLUMNS * torch.get_num_threads()
    if columns >= 2 * width:
        result = left.new_empty(rows, columns)
        for strip, part in zip(result.split(width, dim=1), right.split(width, dim=1), strict=True):
            torch.mm(left, part, out=strip)
        return result
    if rows >= 2 * _ROWS:
        result = left.new_empty(rows, columns)
        for strip, part in zip(result.split(_ROWS), left.split(_ROWS), strict=True):
            torch.mm(part, right, out=strip)
        return result
    return left @ right
