"""Formulas of groups, lengths and of a sampler with numbers of its own, by hand and as laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.advantages import grpo, length_adaptive_lam, rloo
from ppo_engine.losses import clipped_surrogate, importance_weights
from ppo_engine.rewards import overlong_penalty

EXACT = 1e-12
"""Room for float64 rounding."""
GROUP_EPSILON = 1e-5
"""grpo adds a millionth to the deviation, so numbers by hand are off by a few of them."""

DOUBLE = torch.float64
quick = settings(max_examples=60, deadline=None)
score = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 2))


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=DOUBLE)


def mask_of_lengths(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_one_good_answer_of_four() -> None:
    scores, group = doubles(1, 0, 0, 0), torch.zeros(4, dtype=torch.int64)

    others = rloo(scores, group).tolist()
    deviations = grpo(scores, group).tolist()

    assert others == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], rel=EXACT)
    assert deviations == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=GROUP_EPSILON)


def test_groups_are_found_by_their_number_wherever_they_stand() -> None:
    # Group 7 has scores 1, 0, 0, 0; group -3 has 2, 4; the largest number has 5, 6, 7.
    large = 2**62
    ids = torch.tensor([7, -3, large, 7, large, 7, -3, 7, large])
    scores = doubles(0, 4, 5, 1, 7, 0, 2, 0, 6)

    others = rloo(scores, ids).tolist()
    deviations = grpo(scores, ids).tolist()

    third, root = 1 / 3, math.sqrt(0.5)
    assert others == pytest.approx([-third, 2, -1.5, 1, 1.5, -third, -2, -third, 0], abs=EXACT)
    assert deviations == pytest.approx(
        [-0.5, root, -1, 1.5, 1, -0.5, -root, -0.5, 0], rel=GROUP_EPSILON, abs=EXACT
    )


@quick
@given(
    rows=st.lists(st.tuples(score, st.integers(0, 3)), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_rows_only_moves_the_advantages(
    rows: list[tuple[float, int]], order: object
) -> None:
    scores = doubles(*(s for s, _ in rows))
    ids = torch.tensor([group for _, group in rows])
    moved = list(range(len(rows)))
    order.shuffle(moved)  # type: ignore[attr-defined]

    for formula in (rloo, grpo):
        shuffled = formula(scores[moved], ids[moved])

        assert torch.allclose(shuffled, formula(scores, ids)[moved], rtol=1e-9, atol=1e-9)


@quick
@given(st.lists(st.tuples(score, st.integers(0, 3)), min_size=1, max_size=12))
def test_rloo_compares_with_the_mean_of_the_others(rows: list[tuple[float, int]]) -> None:
    expected = []
    for i, (own, group) in enumerate(rows):
        others = [s for j, (s, g) in enumerate(rows) if g == group and j != i]
        expected.append(own - sum(others) / len(others) if others else 0.0)

    found = rloo(doubles(*(s for s, _ in rows)), torch.tensor([g for _, g in rows]))

    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("formula", [rloo, grpo])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_scores_teaches_nothing(formula, dtype) -> None:
    # Sums of 0.1 round, so their mean is not 0.1; a rounding error over 1e-6 would be a signal.
    scores = torch.tensor([0.1, 1.0, 0.1, 0.1, 3.0, -1e6, 0.1, 0.1, 0.1, -1e6], dtype=dtype)
    ids = torch.tensor([5, 9, 5, 5, 9, 2, 5, 5, 5, 2])

    found = formula(scores, ids)

    assert found.dtype == dtype
    assert not found[(ids == 5) | (ids == 2)].any()
    assert found[ids == 9].all()


@pytest.mark.parametrize("formula", [rloo, grpo])
def test_a_lone_answer_gets_0(formula) -> None:
    found = formula(doubles(3.0, 1.0, 2.0), torch.tensor([0, 1, 1]))

    assert found[0].item() == 0.0
    assert found[1].item() == -found[2].item() != 0.0


def test_a_short_answer_has_a_lambda_of_0_and_never_one_below() -> None:
    lengths = range(1, 31)

    found = length_adaptive_lam(mask_of_lengths(*lengths))

    assert found.shape == (30,)
    assert ((found >= 0) & (found < 1)).all()
    # 1/α is 20: up to there the formula as printed would be negative.
    expected = [0.0] * 20 + [1 - 20 / length for length in range(21, 31)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_lambda_grows_with_the_number_of_response_tokens() -> None:
    mask = torch.zeros(3, 250, dtype=torch.bool)
    mask[0, ::5] = True  # 50 tokens with others between them
    mask[1, 50:] = True  # 200 tokens
    # Row 2 is empty.

    found = length_adaptive_lam(mask, alpha=0.1)

    assert found.tolist() == pytest.approx([0.8, 0.95, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0), (1, 0), (15, 0), (16, -0.4), (18, -1.2), (19, -1.6), (20, -2.0), (25, -2.0)],
)
def test_an_overlong_answer_loses_evenly_over_the_buffer(length: int, expected: float) -> None:
    found = overlong_penalty(
        torch.tensor([length]), max_response_tokens=20, buffer_tokens=5, penalty=2.0
    )

    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_each_row_has_its_own_overlong_penalty() -> None:
    rule = {"max_response_tokens": 8, "buffer_tokens": 8, "penalty": 1.0}

    found = overlong_penalty(torch.tensor([0, 2, 8]), **rule)

    assert found.tolist() == [0.0, -0.25, -1.0]


def test_importance_weights_are_the_ratio_of_the_two_policies_up_to_the_cap() -> None:
    old = torch.tensor([[-1.0, -1.0, -2.0, -5.0]], dtype=DOUBLE)
    behavior = torch.tensor([[-1.0, -1.5, -1.0, -2.0]], dtype=DOUBLE)

    found = importance_weights(old, behavior, torch.ones(1, 4).bool(), cap=1.5)

    assert found[0].tolist() == pytest.approx([1, 1.5, math.exp(-1), math.exp(-3)], rel=EXACT)


def test_importance_weights_are_0_outside_the_mask_whatever_stands_there() -> None:
    mask = torch.tensor([[True, False, False, True]])
    old = torch.tensor([[-1.0, math.nan, math.inf, -2.0]], dtype=DOUBLE)
    behavior = torch.tensor([[-1.5, -1.0, -math.inf, -2.0]], dtype=DOUBLE)

    found = importance_weights(old, behavior, mask, cap=2.0)

    assert found[0].tolist() == pytest.approx([math.exp(0.5), 0, 0, 1], rel=EXACT)


def test_importance_weights_stay_finite_however_far_the_sampler_was_off() -> None:
    old = torch.tensor([[-1.0, -4000.0]])
    behavior = torch.tensor([[-4000.0, -1.0]])

    found = importance_weights(old, behavior, torch.ones(1, 2).bool(), cap=2.0)

    assert found[0].tolist() == pytest.approx([2.0, 0.0], abs=1e-8)


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return clipped_surrogate(
        logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None
    )


def test_importance_weights_carry_no_gradient() -> None:
    mask = torch.ones(1, 3).bool()
    old = doubles(-1.0, -2.0, -0.5)[None].requires_grad_()
    behavior = doubles(-1.1, -1.5, -0.7)[None].requires_grad_()

    assert not importance_weights(old, behavior, mask, cap=2.0).requires_grad


def test_importance_weights_scale_the_gradient_of_each_token() -> None:
    mask = torch.ones(1, 3).bool()
    old, advantages = doubles(-1.0, -2.0, -0.5)[None], doubles(1.0, -2.0, 0.5)[None]
    behavior = doubles(-1.1, -1.5, -2.5)[None]
    logprobs = old.clone().requires_grad_()

    weights = importance_weights(old, behavior, mask, cap=2.0)
    (weights * surrogate(logprobs, old, advantages, mask)).sum().backward()

    # At ρ = 1 the gradient of J is A.
    expected = [math.exp(0.1) * 1.0, math.exp(-0.5) * -2.0, 2.0 * 0.5]
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx(expected, rel=EXACT)


def test_equal_numbers_make_importance_weights_do_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    generator = torch.Generator().manual_seed(3)
    old, noise, advantages = torch.randn(3, 2, 3, generator=generator, dtype=DOUBLE) * mask

    gradients = []
    for weights in (importance_weights(old, old, mask, cap=2.0), mask.double()):
        logprobs = (old + 0.3 * noise).requires_grad_()
        (weights * surrogate(logprobs, old, advantages, mask)).sum().backward()
        gradients.append(logprobs.grad)

    assert torch.equal(gradients[0], gradients[1])
