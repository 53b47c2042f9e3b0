"""Products in strips and of packed weights equal plain ones."""

import pytest
import torch

from ppo_engine.products import (
    PackedWeight,
    is_packable,
    product,
    row_depends_on_others,
    wide_product,
)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        pytest.param(3, 5, 2 * 192 * 2 + 7, id="wide"),
        pytest.param(2 * 1536 + 7, 5, 3, id="high"),
        pytest.param(3, 5, 4, id="small"),
        pytest.param(0, 5, 2000, id="no rows"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_that_of_numpy(
    rows: int, inner: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator, dtype=dtype)
    right = torch.randn(columns, inner, generator=generator, dtype=dtype).t()

    found = product(left, right)

    assert found.dtype == dtype
    expected = torch.from_numpy(left.double().numpy() @ right.double().numpy())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_wide_product_adds_up_in_fp32() -> None:
    ones = torch.ones(1, 4097, dtype=torch.bfloat16)  # a sum that bf16 would round

    assert wide_product(ones, ones.t()).item() == 4097


CPU = torch.device("cpu")
PACKABLE = [each for each in (torch.float32, torch.bfloat16) if is_packable(CPU, each)]


@pytest.mark.parametrize("has_onto", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", PACKABLE)
def test_a_packed_weight_gives_the_product_of_numpy(
    dtype: torch.dtype, *, has_bias: bool, has_onto: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 70, generator=generator).to(dtype)
    weight = torch.randn(131, 70, generator=generator).to(dtype)
    bias = torch.randn(131, generator=generator).to(dtype) if has_bias else None

    onto = torch.randn(9, 131, generator=generator).to(dtype) if has_onto else None

    found = PackedWeight(weight).product(rows, bias=bias, onto=onto)

    expected = rows.double().numpy() @ weight.double().numpy().T
    if bias is not None:
        expected += bias.double().numpy()
    if onto is not None:
        expected += onto.double().numpy()
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.double(), torch.from_numpy(expected), rtol=max(rounding, 1e-5), atol=1e-5
    )


@pytest.mark.parametrize("dtype", PACKABLE)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = PackedWeight(torch.randn(384, 96, generator=generator).to(dtype))
    rows = torch.randn(300, 96, generator=generator).to(dtype)

    together = packed.product(rows)

    for first in range(0, 300, 23):
        for count in (1, 3, 20, 77):
            part = slice(first, first + count)
            assert torch.equal(packed.product(rows[part]), together[part])


def test_only_a_cpus_own_formats_are_packed() -> None:
    assert not is_packable(CPU, torch.float64)
    assert not is_packable(torch.device("cuda"), torch.float32)


class ByCount(torch.Tensor):
    """A weight whose products round by the number of their rows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result + len(args[0]) if func.__name__.strip("_") == "matmul" else result


def test_whether_a_row_depends_on_others_is_tried_out():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))

    assert not row_depends_on_others([weight])
    assert row_depends_on_others([weight, weight.as_subclass(ByCount)])
