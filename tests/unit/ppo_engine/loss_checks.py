"""What the formulas must satisfy, as checks that run on the engine and on mutants of it.

Expected values are from the definitions, by hand or in float64.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_engine.config import LossAggregation

HAND = 1e-6
"""Numbers by hand carry six digits."""
EXACT = 1e-12
"""Room for float64 rounding."""

NAN = math.nan


class Formulas(NamedTuple):
    """The modules under check; some of them may be mutants."""

    losses: ModuleType
    masking: ModuleType
    advantages: ModuleType
    rewards: ModuleType


class Token(NamedTuple):
    """A golden token: ratio, advantage, clip rule, and what must come out."""

    advantage: float
    ratio: float
    low: float
    high: float
    dual: float | None
    unclipped: float
    clipped: float
    objective: float
    gradient: float


GOLDEN_TOKENS = (
    Token(1, 3.0, 0.2, 0.2, None, 3.0, 1.2, 1.2, 0.0),
    Token(2, 3.0, 0.2, 0.2, None, 6.0, 2.4, 2.4, 0.0),
    Token(-2.5, 0.5, 0.2, 0.2, None, -1.25, -2.0, -2.0, 0.0),
    Token(1, 0.5, 0.2, 0.2, None, 0.5, 0.8, 0.5, 0.5),
    Token(-2.5, 1.5, 0.2, 0.2, None, -3.75, -3.0, -3.75, -3.75),
    Token(-1, 5.0, 0.2, 0.2, 3.0, -5.0, -1.2, -3.0, 0.0),
    Token(-1, 5.0, 0.2, 0.2, None, -5.0, -1.2, -5.0, -5.0),
    Token(-1, 2.5, 0.2, 0.2, 3.0, -2.5, -1.2, -2.5, -2.5),
    Token(1, 5.0, 0.2, 0.2, 3.0, 5.0, 1.2, 1.2, 0.0),
    Token(1, 0.5, 0.2, 0.2, 3.0, 0.5, 0.8, 0.5, 0.5),
    Token(1, 1.1, 0.2, 0.2, None, 1.1, 1.1, 1.1, 1.1),
    Token(1, 1.5, 0.2, 0.2, None, 1.5, 1.2, 1.2, 0.0),
    Token(-1, 1.5, 0.2, 0.2, None, -1.5, -1.2, -1.5, -1.5),
    Token(-1, 0.5, 0.2, 0.2, None, -0.5, -0.8, -0.8, 0.0),
    Token(-0.7, 1.0, 0.2, 0.2, None, -0.7, -0.7, -0.7, -0.7),
    Token(0.7, 1.0, 0.2, 0.2, 3.0, 0.7, 0.7, 0.7, 0.7),
    # Unequal bounds [0.8, 1.28]: swapped, both would give other numbers.
    Token(1, 1.25, 0.2, 0.28, None, 1.25, 1.25, 1.25, 1.25),
    Token(-1, 0.75, 0.2, 0.28, None, -0.75, -0.8, -0.8, 0.0),
)

GOLDEN_VALUES = (  # V, G -> error, gradient, clipped; V_old 1, range 0.2
    (2.0, 1.5, 0.125, 0.5, False),
    (2.0, 3.0, 1.62, 0.0, True),
    (0.5, 0.0, 0.32, 0.0, True),
    (0.5, 3.0, 3.125, -2.5, False),
)


def row(*numbers: float) -> Tensor:
    """A [1, T] float64 tensor."""
    return torch.tensor([numbers], dtype=torch.float64)


def mask(*flags: int) -> Tensor:
    """A [1, T] mask."""
    return torch.tensor([flags], dtype=torch.bool)


def close(found: Tensor | float, expected: Tensor | float, tolerance: float = HAND) -> None:
    """Fails unless the numbers agree."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape, (found, expected)
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance), (
        found,
        expected,
    )


def check_golden_tokens(f: Formulas) -> None:
    """Values and gradients of the table, one token at a time."""
    for token in GOLDEN_TOKENS:
        logprobs = row(math.log(token.ratio) - 1).requires_grad_()
        terms = f.losses.surrogate_terms(
            f.losses.log_ratio(logprobs, row(-1.0)),
            row(token.advantage),
            clip_low=token.low,
            clip_high=token.high,
            dual_clip=token.dual,
        )
        close(terms.unclipped, row(token.unclipped))
        close(terms.clipped, row(token.clipped))
        close(terms.objective, row(token.objective))
        (gradient,) = torch.autograd.grad(terms.objective.sum(), logprobs)
        close(gradient, row(token.gradient))


def check_dual_clip_tie(f: Formulas) -> None:
    """At ρ = c the gradient is whole, not half."""
    logprobs = row(1.1).requires_grad_()
    terms = f.losses.surrogate_terms(
        logprobs, row(-1.0), clip_low=0.2, clip_high=0.2, dual_clip=math.exp(1.1)
    )
    (gradient,) = torch.autograd.grad(terms.objective.sum(), logprobs)
    close(terms.objective, row(-math.exp(1.1)), EXACT)
    close(gradient, row(-math.exp(1.1)), EXACT)


def check_golden_values(f: Formulas) -> None:
    """The critic's error, gradient and flags."""
    for value, target, error, gradient, is_clipped in GOLDEN_VALUES:
        values = row(value).requires_grad_()
        terms = f.losses.clipped_value_error(values, row(1.0), row(target), clip_range=0.2)
        close(terms.error, row(error))
        close(torch.autograd.grad(terms.error.sum(), values)[0], row(gradient))
        assert terms.is_clipped.item() is is_clipped
        assert terms.is_out_of_range.item() is True
    inside = f.losses.clipped_value_error(row(1.1), row(1.0), row(3.0), clip_range=0.2)
    close(inside.error, row(1.9**2 / 2))
    assert not inside.is_clipped.item()
    assert not inside.is_out_of_range.item()
    free = f.losses.clipped_value_error(row(2.0), row(1.0), row(3.0), clip_range=None)
    close(free.error, row(0.5))
    assert not free.is_clipped.item()


def check_garbage_outside_the_mask(f: Formulas) -> None:
    """NaN and infinities in masked slots reach neither the loss nor a gradient."""
    response_mask = mask(1, 0, 0, 0, 1)
    logprobs = row(-1.0, NAN, math.inf, -3.0, -2.0).requires_grad_()
    objective = f.losses.clipped_surrogate(
        logprobs,
        row(-1.1, -math.inf, NAN, -3.0, -2.0),
        row(1.0, 2.0, math.inf, NAN, -1.0),
        response_mask,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
    )
    close(objective.detach(), row(math.exp(0.1), 0, 0, 0, -1), EXACT)
    loss = -f.masking.weighted_sum(objective, response_mask, torch.tensor([0.5]).double())
    loss.backward()
    close(loss, -0.5 * (math.exp(0.1) - 1.0), EXACT)
    assert logprobs.grad is not None
    close(logprobs.grad, row(-0.5 * math.exp(0.1), 0, 0, 0, 0.5), EXACT)
    raw = f.masking.weighted_sum(row(2.0, NAN), mask(1, 0), torch.tensor([1.0]).double())
    close(raw, 2.0, EXACT)


def check_overflow(f: Formulas) -> None:
    """However far the policy ran, the ratio stays finite."""
    far = f.losses.log_ratio(row(-1.0, -5000.0), row(-5000.0, -1.0))
    close(far, row(20.0, -20.0), EXACT)


def check_aggregations(f: Formulas) -> None:
    """Losses [4] and [1, 1, 1], an empty row between them, two columns of padding."""
    losses = torch.tensor([[4.0, 9, 9, 9, 9], [9, 9, 9, 9, 9], [1, 1, 1, 9, 9]]).double()
    response_mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    expected = {
        LossAggregation.TOKEN_MEAN: 1.75,
        LossAggregation.SEQUENCE_MEAN_TOKEN_MEAN: 2.5,
        LossAggregation.SEQUENCE_MEAN_TOKEN_SUM: 3.5,
        LossAggregation.SEQUENCE_MEAN_TOKEN_SUM_NORM: 0.875,
    }
    for mode, total in expected.items():
        weights = f.masking.row_weights(response_mask, mode, max_response_tokens=4)
        assert weights[1].item() == 0
        close(f.masking.weighted_sum(losses, response_mask, weights), total, EXACT)


def check_micro_batches(f: Formulas) -> None:
    """Any uneven split of a pass gives the gradient of the whole."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([1, 7, 3, 0, 5, 2])
    response_mask = torch.arange(7) < lengths[:, None]
    old, noise, advantages = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    for mode in LossAggregation:
        weights = f.masking.row_weights(response_mask, mode, max_response_tokens=9)
        gradients = []
        for sizes in ([6], [1, 5], [2, 1, 3], [1] * 6):
            logprobs = (old + 0.3 * noise).requires_grad_()
            for rows in torch.arange(6).split(sizes):
                objective = f.losses.clipped_surrogate(
                    logprobs[rows],
                    old[rows],
                    advantages[rows],
                    response_mask[rows],
                    clip_low=0.2,
                    clip_high=0.28,
                    dual_clip=None,
                )
                (-f.masking.weighted_sum(objective, response_mask[rows], weights[rows])).backward()
            gradients.append(logprobs.grad)
        for gradient in gradients[1:]:
            close(gradient, gradients[0], EXACT)


def check_standardize(f: Formulas) -> None:
    """Mean 0, variance 1 over the mask, whatever stands outside."""
    values = row(1, NAN, 2, 3, 99, 4)
    found = f.masking.standardize(values, mask(1, 0, 1, 1, 0, 1))
    close(found, row(-1.161895, 0, -0.387298, 0.387298, 0, 1.161895))
    close(f.masking.standardize(row(7, 5), mask(1, 0)), row(0, 0), EXACT)
    close(f.masking.standardize(row(*[0.1] * 10), mask(*[1] * 10)), row(*[0] * 10), EXACT)
    close(f.masking.standardize(row(7), mask(0)), row(0), EXACT)


def check_token_mean(f: Formulas) -> None:
    """The mean of what the mask selects."""
    close(f.masking.token_mean(row(1, NAN, 3), mask(1, 0, 1)), 2.0, EXACT)
    close(f.masking.token_mean(row(5.0), mask(0)), 0.0, EXACT)


def check_gae(f: Formulas) -> None:
    """Hand-computed advantages, a skipped column, a delayed reward."""
    rewards, values, whole = row(-0.1, 0.2, 1), row(0.5, 0.4, 0.3), mask(1, 1, 1)
    close(f.advantages.gae(rewards, values, whole, gamma=1, lam=0.95), row(0.52675, 0.765, 0.7))
    close(f.advantages.gae(rewards, values, whole, gamma=0.9, lam=0.8), row(0.17328, 0.574, 0.7))
    skipped = f.advantages.gae(
        row(-0.1, 99, 0.2, 1, 99),
        row(0.5, 99, 0.4, 0.3, NAN),
        mask(1, 0, 1, 1, 0),
        gamma=1,
        lam=0.95,
    )
    close(skipped, row(0.52675, 0, 0.765, 0.7, 0))
    late, flat = row(0, 0, 1), row(0.5, 0.5, 0.5)
    close(f.advantages.gae(late, flat, whole, gamma=1, lam=1), row(0.5, 0.5, 0.5), EXACT)
    close(f.advantages.gae(late, flat, whole, gamma=1, lam=0), row(0, 0, 0.5), EXACT)


def check_token_rewards(f: Formulas) -> None:
    """KL on every token, the score on the last real one."""
    kl = row(-1 - -1.5, -2 - -1)
    found = f.rewards.token_rewards(torch.tensor([1.0]).double(), kl, mask(1, 1), kl_coef=0.1)
    close(found, row(-0.05, 1.1))
    padded = f.rewards.token_rewards(
        torch.tensor([-1.0, 0.0, 5.0]).double(),
        torch.tensor([[1, NAN, 2, NAN], [3, 1, 1, 1], [NAN, 1, 1, 1]]).double(),
        torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool(),
        kl_coef=0.5,
    )
    expected = [[-0.5, 0, -2.0, 0], [-1.5, -0.5, -0.5, -0.5], [0, 0, 0, 0]]
    close(padded, torch.tensor(expected).double(), EXACT)


def check_shaped_scores(f: Formulas) -> None:
    """The penalty hits truncated rows only."""
    shaped = f.rewards.shape_scores(
        torch.tensor([1.0, 1.0]).double(), torch.tensor([True, False]), missing_stop_penalty=0.25
    )
    close(shaped, torch.tensor([0.75, 1.0]), EXACT)


def check_running_std(f: Formulas) -> None:
    """Population deviation over batches; mean kept; bounded; 1 while nothing varies."""
    running = f.rewards.RunningStd()
    running.update(torch.tensor([0.1, 0.1, 0.1]))
    close(running.scale(torch.tensor([0.1])), torch.tensor([0.1]))
    running = f.rewards.RunningStd()
    running.update(torch.tensor([1.0, 2.0]))
    running.update(torch.tensor([3.0, 4.0, 5.0]))
    close(running.std, math.sqrt(2))
    close(
        running.scale(torch.tensor([2.0, -2.0, 100.0, -100.0]).double()),
        torch.tensor([math.sqrt(2), -math.sqrt(2), 10, -10]).double(),
    )


CHECKS: dict[str, Callable[[Formulas], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
