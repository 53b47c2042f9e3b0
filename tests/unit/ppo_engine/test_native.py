"""The compiled kernels against their formulas in fp64."""

import ctypes
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ppo_engine import native

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Of the largest element: a few roundings."""
EPSILON = 1e-5

pytestmark = pytest.mark.skipif(
    native.variant() is None and (shutil.which("cc") is None or sys.platform == "darwin"),
    reason="no C compiler that knows OpenMP, so no kernels were compiled",
)


@pytest.fixture(params=TOLERANCES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=native.usable_variants())
def kernels(request, dtype):
    path = Path(native.__file__).parent / f"_native_{request.param}.so"
    assert path.exists(), "there is a C compiler, but the kernels were not compiled"
    return native.Kernels(ctypes.CDLL(str(path)), "fp32" if dtype == torch.float32 else "bf16")


def drawn(dtype, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape
    apart = (found.double() - expected).abs().max()
    assert apart <= TOLERANCES[dtype] * expected.abs().max()


def normed(hidden, weight):
    return hidden * (hidden.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt() * weight


def silu_times_up(gate_up):
    gate, up = gate_up.chunk(2, dim=1)
    return gate / (1 + (-gate).exp()) * up


def test_many_matrices_are_converted_at_once(kernels, dtype):
    shapes = [(1, 7), (16, 65), (40, 3), (5, 1), (1, 1)] * 5
    sources = [drawn(torch.float32, *shape, seed=i) for i, shape in enumerate(shapes)]
    conversions = tuple(
        native.Conversion(shape, 0.5 + i, is_transposed=i % 2 == 0)
        for i, shape in enumerate(shapes)
    )
    sizes = [source.numel() for source in sources]
    target = torch.zeros(sum(sizes) + 1, dtype=dtype)

    kernels.convert(sources, conversions, target)

    assert target[-1] == 0
    for source, (_, factor, is_transposed), found in zip(
        sources, conversions, target[:-1].split(sizes), strict=True
    ):
        expected = (source * factor).to(dtype)
        assert torch.equal(found, (expected.t() if is_transposed else expected).flatten())


@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (40, 577)])
def test_norm_and_its_gradient(kernels, dtype, shape):
    hidden, weight = drawn(dtype, *shape), drawn(dtype, shape[1], seed=1)
    of_normed, onto = drawn(dtype, *shape, seed=2), drawn(dtype, *shape, seed=3)
    wide = hidden.double().requires_grad_()
    expected = normed(wide, weight.double())
    (gradient,) = torch.autograd.grad(expected, wide, of_normed.double())

    found, inverse = kernels.rms_norm(hidden, weight, EPSILON)
    alone = kernels.rms_norm_backward(of_normed, hidden, weight, inverse, None)
    added = kernels.rms_norm_backward(of_normed, hidden, weight, inverse, onto)

    assert_near(found, expected.detach(), dtype)
    assert_near(alone, gradient, dtype)
    assert_near(added, gradient + onto.double(), dtype)


@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (40, 577)])
def test_gated_activation_and_its_gradient(kernels, dtype, shape):
    gate_up = 4 * drawn(dtype, shape[0], 2 * shape[1])
    of_result = drawn(dtype, *shape, seed=1)
    wide = gate_up.double().requires_grad_()
    expected = silu_times_up(wide)
    (gradient,) = torch.autograd.grad(expected, wide, of_result.double())

    assert_near(kernels.gated(gate_up), expected.detach(), dtype)
    assert_near(kernels.gated_backward(of_result, gate_up), gradient, dtype)


def test_gates_far_from_zero(kernels, dtype):
    gates = torch.tensor([-1e4, -90.0, -87.0, 0.0, 87.0, 90.0, 1e4, torch.nan, torch.inf])
    found = kernels.gated(torch.cat([gates, torch.ones(9)])[None].to(dtype))[0].float()
    assert found[:3].abs().max() < 1e-30
    assert torch.equal(found[3:7], gates[3:7].to(dtype).float())
    assert found[7].isnan()
    assert found[8] == torch.inf


@pytest.mark.parametrize("direction", [1, -1])
def test_rotation_turns_queries_and_keys_alone(kernels, dtype, direction):
    rows, heads, size = 30, 5, 8
    values = drawn(dtype, rows, heads * size + 24)
    angle = drawn(torch.float64, rows, 1, size // 2, seed=1)
    cos, sin = (f(torch.cat([angle, angle], dim=2)).to(dtype) for f in (torch.cos, torch.sin))
    sin[..., : size // 2] *= -1
    before = values.double()[:, : heads * size].view(rows, heads, size)
    swapped = before.roll(size // 2, dims=2)
    expected = before * cos.double() + direction * swapped * sin.double()

    found = values.clone()
    kernels.rotate(found, cos, sin, heads=heads, direction=direction)

    assert_near(found[:, : heads * size], expected.flatten(1), dtype)
    assert torch.equal(found[:, heads * size :], values[:, heads * size :])


@pytest.mark.parametrize("prefix", [0, 3, 130])
@pytest.mark.parametrize(("each", "size"), [(1, 8), (3, 24), (6, 100)])
def test_attention_of_the_next_token(kernels, dtype, prefix, each, size):
    groups, room = 2, 150
    lengths = torch.tensor([0, 5, 63, 64, 140])
    heads = drawn(dtype, 5, groups * each + 2 * groups, size)
    shared = drawn(dtype, 2, groups, prefix, size, seed=1)
    own = drawn(dtype, 2, 5, groups, room, size, seed=2)
    before = own.clone()

    found = kernels.attend_next(heads, tuple(shared), tuple(own), lengths)

    queries, *new = heads.split([groups * each, groups, groups], dim=1)
    for row, length in enumerate(lengths.tolist()):
        kept = own[:, row, :, : length + 1]
        assert torch.equal(kept[:, :, length], torch.stack([new[0][row], new[1][row]]))
        assert torch.equal(kept[:, :, :length], before[:, row, :, :length])
        keys, values = torch.cat([shared, kept], dim=2).double().repeat_interleave(each, dim=1)
        scores = keys @ queries[row].double()[:, :, None] / size**0.5
        expected = (torch.softmax(scores, dim=1) * values).sum(dim=1)
        assert_near(found[row].view(-1, size), expected, dtype)


def test_a_row_does_not_depend_on_those_beside_it(kernels, dtype):
    hidden, weight = drawn(dtype, 200, 96), drawn(dtype, 96, seed=1)
    together, inverse = kernels.rms_norm(hidden, weight, EPSILON)
    backward = kernels.rms_norm_backward(hidden, hidden, weight, inverse, None)
    for part in (slice(3, 4), slice(90, 121)):
        some, scale = kernels.rms_norm(hidden[part], weight, EPSILON)
        assert torch.equal(some, together[part])
        assert torch.equal(
            kernels.rms_norm_backward(hidden[part], hidden[part], weight, scale, None),
            backward[part],
        )
        assert torch.equal(kernels.gated(hidden[part]), kernels.gated(hidden)[part])


@pytest.mark.parametrize(("prefix", "columns"), [(0, 1), (3, 40), (130, 7)])
def test_softmax_over_what_a_query_may_see(kernels, dtype, prefix, columns):
    scores, scale = 4 * drawn(dtype, 2, 3 * columns, prefix + columns), 0.37
    seen = torch.ones(columns, prefix + columns, dtype=torch.bool).tril(diagonal=prefix)
    wide = (scale * scores.double()).masked_fill(~seen.repeat(3, 1), -torch.inf)

    kernels.causal_softmax(scores, scale=scale, columns=columns, prefix=prefix)

    assert_near(scores, torch.softmax(wide, dim=-1), dtype)
    assert (scores[:, ~seen.repeat(3, 1)] == 0).all()


TOKENS, ENTRIES, BLOCK = 5, 700, 300


def walk(kernels, dtype, scores, *, others=None, plain=False, weighted=False):
    """The sums after all blocks, and of each block what is asked for."""
    chosen = torch.tensor([0, 299, 300, 450, 699])
    sums = torch.zeros(5, TOKENS)
    sums[0] = -torch.inf
    parts = []
    for start in range(0, ENTRIES, BLOCK):
        block = scores[:, start : start + BLOCK].contiguous()
        other = None if others is None else others[:, start : start + BLOCK].contiguous()
        weights = [
            torch.empty_like(block, dtype=dtype) if each else None for each in (plain, weighted)
        ]
        before = sums[0].clone()
        shift = kernels.take_in(block, other, chosen, start, sums, *weights)
        assert torch.equal(shift, before - sums[0] if start else torch.zeros(TOKENS))
        parts.append((sums[0].clone(), *weights))
    return chosen, sums, parts


def test_running_sums_over_the_vocabulary(kernels, dtype):
    scores, others = (5 * drawn(torch.float32, TOKENS, ENTRIES, seed=seed) for seed in (0, 1))
    scores[2] += torch.linspace(0, 200, ENTRIES)  # the highest one grows from block to block
    scores[3] -= torch.linspace(0, 200, ENTRIES)

    chosen, sums, parts = walk(kernels, dtype, scores, others=others, plain=True, weighted=True)

    top = scores.max(dim=1).values
    below = (scores - top[:, None]).double()
    weights = below.exp()
    assert torch.equal(sums[0], top)
    assert torch.equal(sums[3], scores[torch.arange(TOKENS), chosen])
    for found, expected in (
        (sums[1], weights.sum(dim=1)),
        (sums[2], (weights * below).sum(dim=1)),
        (sums[4], (weights * (scores - others)).sum(dim=1)),
    ):
        assert_near(found, expected, torch.float32)
    for number, (so_far, plain, weighted) in enumerate(parts):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        below = (scores[:, block] - so_far[:, None]).double()
        is_chosen = torch.arange(ENTRIES)[block] == chosen[:, None]
        expected = below.exp().masked_fill(is_chosen, 0)
        assert_near(plain, expected, dtype)
        assert_near(weighted, expected * below, dtype)


def test_running_sums_do_not_depend_on_what_else_is_asked_for(kernels, dtype):
    scores, others = (5 * drawn(torch.float32, TOKENS, ENTRIES, seed=seed) for seed in (0, 1))
    _, alone, _ = walk(kernels, dtype, scores)
    for asked in ({"plain": True}, {"plain": True, "weighted": True}, {"others": others}):
        _, sums, _ = walk(kernels, dtype, scores, **asked)
        assert torch.equal(sums[:4], alone[:4]), asked


def test_scores_that_are_no_numbers_stay_so(kernels, dtype):
    scores = torch.zeros(TOKENS, ENTRIES)
    scores[1, 650] = torch.nan
    _, sums, _ = walk(kernels, dtype, scores)
    assert sums[1].isnan().tolist() == [False, True, False, False, False]


@pytest.fixture
def products():
    found = native.product_kernels_for(torch.empty(0, dtype=torch.bfloat16))
    if found is None:
        pytest.skip("no processor with AVX512-BF16")
    return found


@pytest.mark.parametrize("rows", [1, 4, 21])
@pytest.mark.parametrize(("outputs", "width", "rank"), [(5, 7, 3), (64, 96, 16), (1030, 577, 33)])
def test_product_with_all_that_may_be_added(products, rows, outputs, width, rank):
    x, weight = drawn(torch.bfloat16, rows, width), drawn(torch.bfloat16, outputs, width, seed=1)
    inner, up = (
        drawn(torch.bfloat16, rows, rank, seed=2),
        drawn(torch.bfloat16, outputs, rank, seed=3),
    )
    bias, onto = drawn(torch.float32, outputs, seed=4), drawn(torch.bfloat16, rows, outputs, seed=5)
    base = x.double() @ weight.double().t()
    low = inner.double() @ up.double().t()

    wide = products.product(x, weight, dtype=torch.float32)
    scaled = products.product(x, weight, bias=bias, divisor=0.7, dtype=torch.float32)
    narrow = products.product(x, weight, low_rank=(inner, up), bias=bias, onto=onto)

    assert_near(wide, base, torch.float32)
    assert_near(scaled, (base + bias) / 0.7, torch.float32)
    assert_near(narrow, base + low + bias + onto, torch.bfloat16)


def test_a_products_row_does_not_depend_on_those_beside_it(products):
    x, weight = drawn(torch.bfloat16, 50, 100), drawn(torch.bfloat16, 700, 100, seed=1)
    together = products.product(x, weight, dtype=torch.float32)
    for part in (slice(3, 4), slice(17, 43)):
        alone = products.product(x[part], weight, dtype=torch.float32)
        assert torch.equal(alone, together[part])
    some = products.product(x, weight[130:133].contiguous(), dtype=torch.float32)
    assert torch.equal(some, together[:, 130:133])


def test_product_of_rows_that_stand_apart(products):
    """Columns of a matrix; many rows and few outputs."""
    x, weight = drawn(torch.bfloat16, 150, 100), drawn(torch.bfloat16, 6, 40, seed=1)

    found = products.product(x[:, 30:70], weight)

    assert_near(found, x[:, 30:70].double() @ weight.double().t(), torch.bfloat16)


LARGE = [
    (1, 3, 2),
    (4, 33, 7),
    (13, 96, 575),
    (40, 131, 64),
    (7, 45, 3101),
    (2050, 17, 31),
    (1100, 40, 1600),
]
"""Rows, columns, depth: tails of tiles and panels, sums in parts, rows in several shares; both."""


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), LARGE)
def test_large_product_with_all_that_may_be_added(products, rows, columns, depth, is_transposed):
    left, right = drawn(torch.bfloat16, rows, depth), drawn(torch.bfloat16, depth, columns, seed=1)
    bias, onto = drawn(torch.float32, columns, seed=2), drawn(torch.bfloat16, rows, columns, seed=3)
    base = left.double() @ right.double()
    factor = right.t().contiguous().t() if is_transposed else right

    wide = products.large_product(left, factor, dtype=torch.float32)
    scaled = products.large_product(left, factor, bias=bias, divisor=0.7, dtype=torch.float32)
    narrow = products.large_product(left, factor, bias=bias, onto=onto)

    assert_near(wide, base, torch.float32)
    assert_near(scaled, (base + bias) / 0.7, torch.float32)
    assert_near(narrow, base + bias + onto, torch.bfloat16)


class Group:
    """Layers of one input, two of which carry additions, and what they give by their formulas."""

    def __init__(self, rows, columns, depth):
        first, second = columns // 3, columns // 2
        self.parts = (native.Part(0, first, 0, 4), native.Part(second, columns, 4, 23))
        self.scales = (0.5, 3.0)
        self.rows, self.weight = (
            drawn(torch.bfloat16, count, depth, seed=seed)
            for seed, count in enumerate((rows, columns))
        )
        self.downs = [drawn(torch.bfloat16, r, depth, seed=10 + r) for r in (4, 19)]
        self.ups = [
            drawn(torch.bfloat16, out, r, seed=30 + r)
            for out, r in ((first, 4), (columns - second, 19))
        ]
        self.low_rank = native.LowRank(
            torch.cat(self.downs), torch.cat([up.t().flatten() for up in self.ups]), self.parts
        )

    @property
    def inner(self):
        return (self.rows.double() @ self.low_rank.down.double().t()).bfloat16()

    def outputs(self):
        found = self.rows.double() @ self.weight.double().t()
        for (first, end, rank, end_rank), up in zip(self.parts, self.ups, strict=True):
            found[:, first:end] += self.inner[:, rank:end_rank].double() @ up.double().t()
        return found


@pytest.mark.parametrize(("rows", "columns", "depth"), LARGE)
def test_a_groups_product_with_low_rank_additions(products, rows, columns, depth):
    group = Group(rows, columns, depth)
    bias, onto = drawn(torch.float32, columns, seed=2), drawn(torch.bfloat16, rows, columns, seed=3)
    wanted = group.outputs()

    plain, inner = products.group_forward(group.rows, group.weight, group.low_rank)
    lifted, _ = products.group_forward(
        group.rows, group.weight, group.low_rank, bias=bias, onto=onto
    )

    assert_near(inner, group.inner.double(), torch.bfloat16)
    for found, exact in ((plain, wanted), (lifted, wanted + bias + onto)):
        assert_near(found, exact, torch.bfloat16)
        # Everything is added up before it is rounded, once.
        assert (found == exact.bfloat16()).double().mean() > 0.98


@pytest.mark.parametrize(("rows", "columns", "depth"), LARGE)
def test_a_groups_gradients(products, rows, columns, depth):
    group = Group(rows, columns, depth)
    of_outputs = drawn(torch.bfloat16, rows, columns, seed=4)
    # Upside down and apart from each other, between numbers that must stay.
    starts, room = [], 5
    for down, up in reversed(list(zip(group.downs, group.ups, strict=True))):
        starts.append((room, room + down.numel() + 2))
        room += down.numel() + up.numel() + 7
    starts.reverse()
    together = torch.full((room,), 77.0)

    of_rows = products.group_backward(
        of_outputs,
        group.rows,
        group.inner,
        group.weight,
        group.low_rank,
        native.GradientRoom(together, torch.tensor(starts), torch.tensor(group.scales)),
    )

    above, x = of_outputs.double(), group.rows.double()
    wanted, touched = above @ group.weight.double(), 0
    for part, scale, down, up, (of_down, of_up) in zip(
        group.parts, group.scales, group.downs, group.ups, starts, strict=True
    ):
        of_part = above[:, part.first : part.end]
        of_inner = (of_part @ up.double()).bfloat16().double()
        wanted += of_inner @ down.double()
        inner = group.inner[:, part.first_rank : part.end_rank].double()
        for start, exact, precision in (
            # of_inner is rounded, and a sum in another order may round to its neighbour.
            (of_down, of_inner.t() @ x, torch.bfloat16),
            (of_up, scale * of_part.t() @ inner, torch.float32),
        ):
            found = together[start : start + exact.numel()].view(exact.shape)
            assert_near(found, exact, precision)
            touched += exact.numel()
    assert_near(of_rows, wanted, torch.bfloat16)
    assert int((together == 77).sum()) == room - touched


def test_a_group_of_no_rows(products):
    group = Group(0, 40, 12)
    together = torch.full((23 * 12 + 4 * 13 + 19 * 20,), 77.0)
    starts = torch.tensor([(0, 4 * 12), (4 * 25, 4 * 25 + 19 * 12)])

    outputs, inner = products.group_forward(group.rows, group.weight, group.low_rank)
    of_rows = products.group_backward(
        outputs,
        group.rows,
        inner,
        group.weight,
        group.low_rank,
        native.GradientRoom(together, starts, torch.tensor(group.scales)),
    )

    assert outputs.shape == (0, 40)
    assert of_rows.shape == (0, 12)
    assert not together.any()


def test_a_large_product_of_no_rows(products):
    nothing, right = drawn(torch.bfloat16, 0, 8), drawn(torch.bfloat16, 8, 40)
    assert products.large_product(nothing, right).shape == (0, 40)


def test_large_product_of_rows_that_stand_apart(products):
    x, right = drawn(torch.bfloat16, 50, 100), drawn(torch.bfloat16, 40, 70, seed=1)
    expected = x[:, 30:70].double() @ right.double()
    found = products.large_product(x[:, 30:70], right, dtype=torch.float32)
    assert_near(found, expected, torch.float32)
    by_column = x[:, 30:70].t().contiguous().t()
    assert torch.equal(products.large_product(by_column, right, dtype=torch.float32), found)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_large_product_reads_nothing_beside_its_factors(products, is_transposed):
    left, right = (torch.full((n, 50), torch.nan, dtype=torch.bfloat16) for n in (13, 50))
    left[:, :7], right[:7, :5] = drawn(torch.bfloat16, 13, 7), drawn(torch.bfloat16, 7, 5, seed=1)
    factor = (right.t().contiguous().t() if is_transposed else right)[:7, :5]
    found = products.large_product(left[:, :7], factor, dtype=torch.float32)
    assert_near(found, left[:, :7].double() @ right[:7, :5].double(), torch.float32)


def test_a_large_products_row_does_not_depend_on_those_beside_it(products):
    left, right = drawn(torch.bfloat16, 1100, 100), drawn(torch.bfloat16, 100, 700, seed=1)
    together = products.large_product(left, right, dtype=torch.float32)
    for part in (slice(3, 4), slice(17, 43), slice(900, 1010)):
        alone = products.large_product(left[part], right, dtype=torch.float32)
        assert torch.equal(alone, together[part])
    turned = products.large_product(left, right.t().contiguous().t(), dtype=torch.float32)
    assert torch.equal(turned, together)


@pytest.mark.parametrize(("rows", "narrow", "wide"), [(1, 1, 1), (41, 19, 130), (1101, 16, 64)])
def test_gradient_of_a_narrow_layer(products, rows, narrow, wide):
    left = drawn(torch.bfloat16, rows, narrow + 5)[:, 3 : narrow + 3]
    right = drawn(torch.bfloat16, rows, wide + 5, seed=1)[:, 2 : wide + 2]
    expected = left.double().t() @ right.double()
    assert_near(products.gradient(left, right), expected, torch.float32)
    assert_near(products.gradient(right, left), expected.t(), torch.float32)


@pytest.mark.parametrize("prefix", [0, 5, 100])
@pytest.mark.parametrize(("columns", "size"), [(1, 8), (14, 40), (61, 100), (150, 24)])
def test_attention_of_rows_and_its_gradient(products, prefix, columns, size):
    rows, groups, each = 3, 2, 3
    queries, tokens = groups * each, 7 + max(prefix, 100) + rows * columns
    first = tokens - rows * columns
    qkv = 2 * drawn(torch.bfloat16, tokens, (queries + 2 * groups) * size)
    of_result = drawn(torch.bfloat16, tokens, queries * size, seed=1)
    exact = qkv.double().requires_grad_()
    heads = exact.view(tokens, -1, size).transpose(0, 1)
    rotated, keys, values = heads.split([queries, groups, groups])
    seen = torch.ones(columns, prefix + columns, dtype=torch.bool).tril(diagonal=prefix)
    expected = []
    for start in range(first, tokens, columns):
        own = slice(start, start + columns)
        near = [torch.cat([x[:, :prefix], x[:, own]], dim=1) for x in (keys, values)]
        k, v = (x.repeat_interleave(each, dim=0) for x in near)
        scores = rotated[:, own] @ k.transpose(1, 2) / size**0.5
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=2)
        expected.append((weights @ v).transpose(0, 1).flatten(1))
    wanted = torch.cat(expected)
    (gradient,) = torch.autograd.grad(wanted, exact, of_result[first:].double())
    sequences = native.Sequences(first, rows, columns, prefix, queries, groups)
    result = torch.full((tokens, queries * size), 7.0, dtype=torch.bfloat16)
    before = drawn(torch.bfloat16, *qkv.shape, seed=2)
    of_qkv = before.clone()

    products.attend_rows(qkv, result, sequences)
    products.attend_rows_backward(qkv, of_result, of_qkv, sequences)

    assert_near(result[first:], wanted.detach(), torch.bfloat16)
    assert (result[:first] == 7).all()
    # Weights and their gradients are rounded before they are added up.
    apart = (of_qkv.double() - before.double() - gradient).abs().max()
    assert apart <= 3 * TOLERANCES[torch.bfloat16] * gradient.abs().max()


def test_a_processor_with_amx_makes_large_products_itself(products, monkeypatch):
    tensor = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert native.large_product_kernels_for(tensor) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert native.large_product_kernels_for(tensor) is products


def test_the_best_variant_is_taken():
    assert native.variant() == native.usable_variants()[0]


def test_other_formats_have_no_kernels():
    assert native.kernels_for(torch.empty(0, dtype=torch.float64)) is None
    assert native.kernels_for(torch.empty(0, dtype=torch.float16)) is None
