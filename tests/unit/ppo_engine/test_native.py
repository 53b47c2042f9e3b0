"""The compiled kernels against their formulas in fp64."""

import shutil

import pytest
import torch

from ppo_engine import native

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Of the largest element: a few roundings."""
EPSILON = 1e-5

pytestmark = pytest.mark.skipif(
    native.variant() is None and shutil.which("cc") is None,
    reason="no C compiler, so no kernels were compiled",
)


@pytest.fixture(params=TOLERANCES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture
def kernels(dtype):
    found = native.kernels_for(torch.empty(0, dtype=dtype))
    assert found is not None, "there is a C compiler, but the kernels were not compiled"
    return found


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
def test_attention_of_the_next_token(kernels, dtype, prefix):
    groups, each, size, room = 2, 3, 24, 150
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


def test_other_formats_have_no_kernels():
    assert native.kernels_for(torch.empty(0, dtype=torch.float64)) is None
    assert native.kernels_for(torch.empty(0, dtype=torch.float16)) is None
