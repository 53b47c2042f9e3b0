"""Attention on a CPU by its definition, and which keys the kernel of a GPU is given."""

from itertools import accumulate

import pytest
import torch

from ppo_engine.attention import (
    BlockwiseKernel,
    HeadShape,
    NativeKernel,
    PlainKernel,
    SharedKeys,
    SpanwiseAttention,
    attention_over,
    is_fused,
    row_ends,
)
from ppo_engine.native import product_kernels_for
from ppo_engine.packing import pack

PREFIX = 4
LENGTHS = [5, 5, 3, 1]
"""Own tokens of each row, behind the beginning."""


def shared_keys():
    query_ends = row_ends([PREFIX, *LENGTHS], torch.device("cpu"))
    key_ends = row_ends([PREFIX, *(PREFIX + n for n in LENGTHS)], torch.device("cpu"))
    return SharedKeys(query_ends, key_ends, PREFIX)


def expected_sources():
    starts = accumulate([PREFIX, *LENGTHS[:-1]])
    rows = [[*range(PREFIX), *range(s, s + n)] for s, n in zip(starts, LENGTHS, strict=True)]
    return [*range(PREFIX), *(token for row in rows for token in row)]


def test_every_row_sees_the_beginning_and_its_own_tokens():
    assert shared_keys().sources.tolist() == expected_sources()


def test_a_tokens_gradient_is_the_sum_over_its_keys():
    of_keys = torch.randn(len(expected_sources()), 3, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(PREFIX + sum(LENGTHS), 3)
    for token, of_key in zip(expected_sources(), of_keys, strict=True):
        expected[token] += of_key

    torch.testing.assert_close(shared_keys().gathered_back(of_keys), expected)


@pytest.mark.parametrize("size", [8, 64, 256])
def test_a_cpu_has_no_fused_kernel(size):
    assert not is_fused(torch.zeros(1, dtype=torch.bfloat16), HeadShape(2, 1, size))


BF16_ROUNDING = 2**-7
SHAPE = HeadShape(queries=6, keys=2, size=16)


def packed_rows(prefix):
    """Rows of several lengths, some of one, some read late, and filler behind them."""
    tokens = torch.ones(5, 40, dtype=torch.bool)
    read = torch.zeros_like(tokens)
    for row, (start, end) in enumerate([(20, 40), (20, 38), (30, 33), (20, 38), (25, 36)]):
        read[row, start:end] = True
    return pack(tokens, read, prefix=prefix, pad_to=256)


def attention_by_definition(packed, qkv):
    """Each token over itself and what stands before it in its row; [N, queries·d]."""
    queries, keys, values = (
        each.unflatten(1, (-1, SHAPE.size)) for each in qkv.split(SHAPE.widths, dim=1)
    )
    rows = [range(packed.prefix)]
    for start, count, columns in packed.rectangles:
        rows += [range(start + i * columns, start + (i + 1) * columns) for i in range(count)]
    result = torch.zeros(len(qkv), SHAPE.queries, SHAPE.size, dtype=qkv.dtype)
    for number, row in enumerate(rows):
        for token in row:
            seen = [*(range(packed.prefix) if number else ()), *range(row.start, token + 1)]
            for head in range(SHAPE.queries):
                of = head // (SHAPE.queries // SHAPE.keys)
                scores = keys[seen, of] @ queries[token, head] / SHAPE.size**0.5
                result[token, head] = torch.softmax(scores, dim=0) @ values[seen, of]
    return result.flatten(1)


WAYS = [
    (PlainKernel, torch.float32, 1e-5),
    (BlockwiseKernel, torch.float32, 1e-5),
    (PlainKernel, torch.bfloat16, BF16_ROUNDING),
]
if product_kernels_for(torch.empty(0, dtype=torch.bfloat16)) is not None:
    WAYS.append((NativeKernel, torch.bfloat16, BF16_ROUNDING))
"""Kernel, number format, and what it may round by."""


@pytest.mark.parametrize("prefix", [0, 16])
@pytest.mark.parametrize(("kind", "dtype", "rounding"), WAYS)
def test_attention_and_its_gradient_are_those_of_the_definition(kind, dtype, rounding, prefix):
    packed = packed_rows(prefix)
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(len(packed.sources), sum(SHAPE.widths), generator=generator).to(dtype)
    of_result = torch.randn(len(qkv), SHAPE.widths[0], generator=generator).to(dtype)
    of_result[len(qkv) - packed.filler :] = 0
    exact = qkv.double().requires_grad_()
    expected = attention_by_definition(packed, exact)
    (of_exact,) = torch.autograd.grad(expected, exact, of_result.double())

    attention = SpanwiseAttention(packed, SHAPE, qkv, kind)
    found = attention.forward(qkv)
    of_qkv = attention.backward(qkv, found, of_result)

    assert packed.filler > 0
    torch.testing.assert_close(found.result.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(of_qkv.double(), of_exact, rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.parametrize(("kind", "dtype", "_rounding"), WAYS[1:])
def test_what_stands_beside_a_row_changes_no_bit_of_it(kind, dtype, _rounding):
    generator = torch.Generator().manual_seed(3)
    three = torch.randn(3, 40, sum(SHAPE.widths), generator=generator).to(dtype)

    def attended(rows):
        tokens = torch.ones(rows, 40, dtype=torch.bool)
        packed = pack(tokens, tokens, prefix=0)
        qkv = three[:rows].flatten(0, 1)
        attention = SpanwiseAttention(packed, SHAPE, qkv, kind)
        found = attention.forward(qkv)
        of_qkv = attention.backward(qkv, found, torch.ones_like(found.result))
        return found.result[:40], of_qkv[:40]

    for alone, beside in zip(attended(1), attended(3), strict=True):
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("length", [32, 36, 44, 72, 200])
@pytest.mark.parametrize(("kind", "dtype", "_rounding"), WAYS[1:])
def test_a_shared_beginning_changes_no_bit_of_a_row(kind, dtype, _rounding, length):
    """A vector's worth of keys must not end elsewhere, which some CPUs would round differently."""
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(length, sum(SHAPE.widths), generator=generator).to(dtype)
    tokens = torch.ones(2, length, dtype=torch.bool)

    def attended(prefix):
        packed = pack(tokens, tokens, prefix=prefix)
        qkv = torch.cat([row[:prefix], row[prefix:], row[prefix:]])
        return SpanwiseAttention(packed, SHAPE, qkv, kind).forward(qkv).result

    whole = attended(0)
    for prefix in (4, 16):
        shared = attended(prefix)
        assert torch.equal(shared[:length], whole[:length])
        assert torch.equal(shared[length:], whole[prefix:length])


@pytest.mark.parametrize("prefix", [0, 16])
def test_in_bf16_long_rows_are_attended_to_in_fp32(prefix):
    tokens = torch.ones(3, 300, dtype=torch.bool)
    read = torch.zeros_like(tokens)
    read[0, :300] = read[1, :200] = read[2, :64] = True
    packed = pack(tokens, read, prefix=prefix)
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(len(packed.sources), sum(SHAPE.widths), generator=generator).bfloat16()
    of_result = torch.randn(len(qkv), SHAPE.widths[0], generator=generator).bfloat16()
    exact, long_row = SpanwiseAttention(packed, SHAPE, qkv.float()), packed.rectangles[0]
    expected = exact.forward(qkv.float())

    attention = attention_over(packed, SHAPE, qkv)
    found = attention.forward(qkv)
    of_qkv = attention.backward(qkv, found, of_result)

    kernels = [each is None for each in found.log_normalizers]
    assert kernels == [True] * (prefix > 0) + [False, True, True]
    place = slice(long_row.start, long_row.end)
    assert torch.equal(found.result[place], expected.result[place].bfloat16())
    torch.testing.assert_close(
        found.result.float(), expected.result, rtol=BF16_ROUNDING, atol=BF16_ROUNDING
    )
    of_exact = exact.backward(qkv.float(), expected, of_result.float())
    torch.testing.assert_close(
        of_qkv.float(), of_exact, rtol=4 * BF16_ROUNDING, atol=4 * BF16_ROUNDING
    )


@pytest.mark.parametrize(("dtype", "is_blockwise"), [(torch.float32, True), (torch.float64, False)])
def test_a_cpu_takes_the_kernel_in_fp32_whatever_the_length(dtype, is_blockwise):
    packed = packed_rows(0)
    qkv = torch.zeros(len(packed.sources), sum(SHAPE.widths), dtype=dtype)

    found = attention_over(packed, SHAPE, qkv).forward(qkv)

    assert {each is not None for each in found.log_normalizers} == {is_blockwise}
