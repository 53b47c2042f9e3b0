"""What holds for every input of the formulas: derivatives, invariances, written-out sums."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_engine.advantages import gae
from ppo_engine.config import LossAggregation
from ppo_engine.losses import clipped_surrogate, clipped_value_error, surrogate_terms
from ppo_engine.masking import row_weights, standardize, weighted_sum
from ppo_engine.rewards import token_rewards

EXACT = 1e-12
DERIVATIVE = 1e-6
STEP = 1e-6
KINK_DISTANCE = 1e-3

DOUBLE = torch.float64

quick = settings(max_examples=60, deadline=None)
number = st.floats(-3, 3, allow_nan=False)
advantage = st.floats(0.01, 5) | st.floats(-5, -0.01)
clip_rules = st.fixed_dictionaries(
    {
        "clip_low": st.floats(0.05, 0.6),
        "clip_high": st.floats(0.05, 0.9),
        "dual_clip": st.none() | st.floats(2.0, 5.0),
    }
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Two [B, T] tensors, zero outside a mask with holes, and the mask."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    size = rows * columns
    flags = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(flags).reshape(rows, columns)
    first, second = (
        torch.tensor(draw(st.lists(number, min_size=size, max_size=size)), dtype=DOUBLE)
        for _ in range(2)
    )
    return first.reshape_as(mask) * mask, second.reshape_as(mask) * mask, mask


def objective_at(drift: float, advantage: float, **rule: Any) -> float:
    """J as a function of the log-probability, the old one being 0."""
    terms = surrogate_terms(
        torch.tensor([[drift]], dtype=DOUBLE), torch.tensor([[advantage]], dtype=DOUBLE), **rule
    )
    return terms.objective.item()


def gradient_at(drift: float, advantage: float, **rule: Any) -> float:
    """∂J/∂l by autograd."""
    logprobs = torch.tensor([[drift]], dtype=DOUBLE).requires_grad_()
    terms = surrogate_terms(logprobs, torch.tensor([[advantage]], dtype=DOUBLE), **rule)
    return torch.autograd.grad(terms.objective.sum(), logprobs)[0].item()


def formula_gradient(ratio: float, advantage: float, **rule: Any) -> float:
    """ρ·A·g of F6."""
    is_removed = (
        (advantage > 0 and ratio > 1 + rule["clip_high"])
        or (advantage < 0 and ratio < 1 - rule["clip_low"])
        or (advantage < 0 and rule["dual_clip"] is not None and ratio > rule["dual_clip"])
    )
    return 0.0 if is_removed else ratio * advantage


@quick
@given(drift=st.floats(-2, 2), advantage=advantage, rule=clip_rules)
def test_the_gradient_is_the_finite_difference_and_the_formula(
    drift: float, advantage: float, rule: dict[str, Any]
) -> None:
    bounds = (1 - rule["clip_low"], 1 + rule["clip_high"], rule["dual_clip"] or 1e9)
    if any(abs(drift - math.log(bound)) < KINK_DISTANCE for bound in bounds):
        drift += 2 * KINK_DISTANCE

    difference = objective_at(drift + STEP, advantage, **rule) - objective_at(
        drift - STEP, advantage, **rule
    )
    found = gradient_at(drift, advantage, **rule)

    assert found == pytest.approx(difference / (2 * STEP), rel=DERIVATIVE, abs=1e-5)
    assert found == pytest.approx(
        formula_gradient(math.exp(drift), advantage, **rule), rel=EXACT, abs=EXACT
    )


@pytest.mark.parametrize(
    ("drift", "advantage", "inner", "rule"),
    [
        # At a bound the token is still inside: the derivative is that of the inner side.
        (0.2, 1.5, -STEP, {"clip_low": 0.2, "clip_high": math.exp(0.2) - 1, "dual_clip": None}),
        (-0.3, -1.5, STEP, {"clip_low": 1 - math.exp(-0.3), "clip_high": 0.2, "dual_clip": None}),
        (1.1, -1.5, -STEP, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": math.exp(1.1)}),
    ],
)
def test_at_a_kink_the_gradient_is_the_inner_derivative(
    drift: float, advantage: float, inner: float, rule: dict[str, Any]
) -> None:
    at = objective_at(drift, advantage, **rule)

    inside = (objective_at(drift + inner, advantage, **rule) - at) / inner
    outside = (objective_at(drift - inner, advantage, **rule) - at) / -inner

    assert gradient_at(drift, advantage, **rule) == pytest.approx(inside, rel=1e-4)
    assert outside == pytest.approx(0, abs=1e-4)


@quick
@given(value=number, old=number, target=number, reach=st.floats(0.05, 1))
def test_the_critics_gradient_is_the_finite_difference(
    value: float, old: float, target: float, reach: float
) -> None:
    def error(x: Tensor) -> Tensor:
        fixed = torch.tensor([[old]], dtype=DOUBLE), torch.tensor([[target]], dtype=DOUBLE)
        return clipped_value_error(x, *fixed, clip_range=reach).error.sum()

    values = torch.tensor([[value]], dtype=DOUBLE).requires_grad_()
    bounds = torch.tensor([old - reach, old + reach])
    mirrored = 2 * target - bounds  # where both errors are equal
    kinks = torch.cat([bounds, mirrored])
    if bool(((values.detach() - kinks).abs() < KINK_DISTANCE).any()):
        return

    difference = error(values.detach() + STEP) - error(values.detach() - STEP)

    (found,) = torch.autograd.grad(error(values), values)
    assert found.item() == pytest.approx(difference.item() / (2 * STEP), rel=1e-5, abs=1e-5)


def written_out_gae(
    rewards: list[float], values: list[float], *, gamma: float, lam: float
) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l} of one unpadded response."""
    following = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


@quick
@given(batch=batches(), gamma=st.floats(0.5, 1), lam=st.floats(0, 1))
def test_gae_is_the_written_out_sum_over_the_responses_tokens(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float
) -> None:
    rewards, values, mask = batch
    expected = torch.zeros_like(values)
    for i in range(mask.shape[0]):
        expected[i, mask[i]] = torch.tensor(
            written_out_gae(
                rewards[i, mask[i]].tolist(), values[i, mask[i]].tolist(), gamma=gamma, lam=lam
            ),
            dtype=DOUBLE,
        )

    found = gae(rewards, values, mask, gamma=gamma, lam=lam)

    assert torch.allclose(found, expected, rtol=EXACT, atol=EXACT)


@quick
@given(batch=batches(), gamma=st.floats(0.5, 1))
def test_with_lambda_1_the_advantage_is_return_minus_value(
    batch: tuple[Tensor, Tensor, Tensor], gamma: float
) -> None:
    rewards, values, _ = batch
    whole = torch.ones_like(rewards).bool()
    steps = torch.arange(rewards.shape[1]).double()
    returns = torch.stack(
        [(rewards[:, t:] * gamma ** steps[: len(steps) - t]).sum(1) for t in range(len(steps))], 1
    )

    found = gae(rewards, values, whole, gamma=gamma, lam=1.0)

    assert torch.allclose(found, returns - values, rtol=EXACT, atol=EXACT)


def test_lambda_may_differ_from_row_to_row() -> None:
    rewards = torch.tensor([[0.0, 0, 1], [0, 0, 1]], dtype=DOUBLE)
    values = torch.full_like(rewards, 0.5)

    found = gae(rewards, values, torch.ones(2, 3).bool(), gamma=1.0, lam=torch.tensor([1.0, 0.0]))

    assert found.tolist() == [[0.5, 0.5, 0.5], [0, 0, 0.5]]


def whole_loss(first: Tensor, second: Tensor, mask: Tensor, mode: LossAggregation) -> Tensor:
    """Rewards, advantages, standardizing and the policy loss in one go."""
    scores = torch.linspace(-1, 1, mask.shape[0]).double()
    rewards = token_rewards(scores + first.sum(1), first, mask, kl_coef=0.1)
    advantages = standardize(gae(rewards, second, mask, gamma=0.99, lam=0.9), mask)
    objective = clipped_surrogate(
        second, first, advantages, mask, clip_low=0.2, clip_high=0.3, dual_clip=3.0
    )
    weights = row_weights(mask, mode, max_response_tokens=9)
    return weighted_sum(objective, mask, weights)


@quick
@given(batch=batches(), mode=st.sampled_from(LossAggregation), columns=st.integers(1, 3))
def test_padding_changes_nothing(
    batch: tuple[Tensor, Tensor, Tensor], mode: LossAggregation, columns: int
) -> None:
    first, second, mask = batch
    padded = [torch.nn.functional.pad(x, (0, columns)) for x in (first, second)]
    padded_mask = torch.nn.functional.pad(mask, (0, columns))
    scores = torch.linspace(-1, 1, mask.shape[0]).double()

    before = token_rewards(scores, first, mask, kl_coef=0.1)
    after = token_rewards(scores, padded[0], padded_mask, kl_coef=0.1)

    assert torch.equal(after[:, : mask.shape[1]], before)
    assert whole_loss(*padded, padded_mask, mode).item() == pytest.approx(
        whole_loss(first, second, mask, mode).item(), rel=1e-9, abs=1e-9
    )


@quick
@given(batch=batches(), mode=st.sampled_from(LossAggregation), order=st.randoms())
def test_the_order_of_rows_changes_nothing(
    batch: tuple[Tensor, Tensor, Tensor], mode: LossAggregation, order: Any
) -> None:
    first, second, mask = batch
    rows = list(range(mask.shape[0]))
    order.shuffle(rows)
    weights = row_weights(mask, mode, max_response_tokens=9)

    assert torch.equal(row_weights(mask[rows], mode, max_response_tokens=9), weights[rows])
    assert torch.equal(
        gae(first[rows], second[rows], mask[rows], gamma=0.9, lam=0.9),
        gae(first, second, mask, gamma=0.9, lam=0.9)[rows],
    )
    assert weighted_sum(first[rows], mask[rows], weights[rows]).item() == pytest.approx(
        weighted_sum(first, mask, weights).item(), rel=EXACT, abs=EXACT
    )


@quick
@given(batch=batches())
def test_standardized_values_have_mean_0_and_variance_1(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    values, _, mask = batch
    chosen = values[mask]
    if len(chosen) < 2 or chosen.max() - chosen.min() < 0.1:
        return

    found = standardize(values, mask)

    assert found[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert found[mask].var(correction=1).item() == pytest.approx(1, rel=1e-4)
    assert not found[~mask].any()


def test_the_expected_gradient_in_a_small_world_is_that_of_the_expected_reward() -> None:
    """All 9 responses of a 3-token, 2-step world, weighted with their probabilities."""
    theta = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    responses = torch.tensor(list(itertools.product(range(3), repeat=2)))
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, 0.5, -0.5, 0.7, 1.5], dtype=DOUBLE)
    table = torch.log_softmax(theta, dim=-1)  # row 0: first token; rows 1-3: second, after it
    logprobs = torch.stack(
        [table[0, responses[:, 0]], table[1 + responses[:, 0], responses[:, 1]]], dim=1
    )
    probability = logprobs.sum(dim=1).exp()
    (expected,) = torch.autograd.grad((probability * scores).sum(), theta, retain_graph=True)
    mask = torch.ones_like(responses).bool()
    old = logprobs.detach()

    rewards = token_rewards(scores, torch.zeros_like(old), mask, kl_coef=0.0)
    advantages = gae(rewards, torch.zeros_like(old), mask, gamma=1.0, lam=1.0)
    objective = clipped_surrogate(
        logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    loss = -weighted_sum(objective, mask, probability.detach())
    (found,) = torch.autograd.grad(loss, theta)

    assert torch.allclose(found, -expected, rtol=EXACT, atol=EXACT)


def test_a_constant_reward_gives_no_policy_gradient() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    old = torch.tensor([[-1.0, -2, 0], [-0.5, -1, -3]])
    logprobs = old.clone().requires_grad_()

    rewards = token_rewards(torch.ones(2), torch.zeros(2, 3), mask, kl_coef=0.0)
    advantages = standardize(gae(rewards, torch.zeros(2, 3), mask, gamma=1.0, lam=1.0), mask)
    objective = clipped_surrogate(
        logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    weights = row_weights(mask, LossAggregation.TOKEN_MEAN, max_response_tokens=3)
    weighted_sum(objective, mask, weights).backward()

    assert logprobs.grad is not None
    assert not logprobs.grad.any()
