"""A world small enough to write out: three tokens, two steps, all nine answers.

Each answer counts with its exact probability under the policy that samples, so there is no noise:
what the losses give must be the derivative of what they stand for, to the last digit of float64.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ppo_engine.advantages import gae, rloo
from ppo_engine.errors import InvalidConfig
from ppo_engine.kl import k1, k3, loss_kl
from ppo_engine.losses import clipped_surrogate, importance_weights
from ppo_engine.masking import weighted_sum
from ppo_engine.rewards import token_rewards

EXACT = 1e-12
"""Room for float64 rounding."""
FAR = 1e-3
"""Gradients that differ, differ by more."""

DOUBLE = torch.float64
SEEDS = range(5)
ANSWERS = torch.tensor(list(itertools.product(range(3), repeat=2)))
SCORES = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, 0.5, -0.5, 0.7, 1.5], dtype=DOUBLE)
WHOLE = torch.ones(9, 2).bool()
WIDE_OPEN = {"clip_low": 0.99, "clip_high": 1e9, "dual_clip": None}


class World(NamedTuple):
    """Logits [4, 3] of three policies: row 0 before the first token, row 1 + a after token a."""

    current: Tensor
    old: Tensor
    reference: Tensor


def world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)
    current, old, reference = torch.randn(3, 4, 3, generator=generator, dtype=DOUBLE)
    return World(current.requires_grad_(), old, reference)


def logprobs(logits: Tensor) -> Tensor:
    """Log-probability of both tokens of each answer, [9, 2]."""
    table = torch.log_softmax(logits, dim=-1)
    first, second = ANSWERS.T
    return torch.stack([table[0, first], table[1 + first, second]], dim=1)


def probability(logits: Tensor) -> Tensor:
    """Of each answer, [9]."""
    return logprobs(logits).sum(dim=1).exp()


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL between the next-token distributions at each of the four states, [4]."""
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(other, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def visits(logits: Tensor) -> Tensor:
    """How likely each of the four states is to be met, [4]."""
    return torch.cat([torch.ones(1, dtype=DOUBLE), torch.softmax(logits[0], dim=-1)])


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, logits)
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=EXACT, atol=EXACT)


def far(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() > FAR)


def policy_gradient(logits: Tensor, advantages: Tensor) -> Tensor:
    """Expected gradient of the objective where the sampling policy is the current one."""
    current = logprobs(logits)
    objective = clipped_surrogate(
        current, current.detach(), advantages, WHOLE, clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    return gradient(weighted_sum(objective, WHOLE, probability(logits).detach()), logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_the_critic_says_the_expected_gradient_is_exact(seed: int) -> None:
    logits = world(seed).current
    critic = torch.randn(4, generator=torch.Generator().manual_seed(seed + 100), dtype=DOUBLE)
    values = torch.stack([critic[0].expand(9), critic[1 + ANSWERS[:, 0]]], dim=1)
    rewards = token_rewards(SCORES, torch.zeros(9, 2, dtype=DOUBLE), WHOLE, kl_coef=0.0)

    found = policy_gradient(logits, gae(rewards, values, WHOLE, gamma=1.0, lam=1.0))

    assert close(found, gradient((probability(logits) * SCORES).sum(), logits))


@pytest.mark.parametrize("seed", SEEDS)
def test_with_the_exact_critic_any_lambda_gives_the_exact_gradient(seed: int) -> None:
    logits = world(seed).current
    after_first = (torch.softmax(logits[1:].detach(), dim=-1) * SCORES.reshape(3, 3)).sum(dim=-1)
    start = (torch.softmax(logits[0].detach(), dim=-1) * after_first).sum()
    values = torch.stack([start.expand(9), after_first[ANSWERS[:, 0]]], dim=1)
    rewards = token_rewards(SCORES, torch.zeros(9, 2, dtype=DOUBLE), WHOLE, kl_coef=0.0)
    expected = gradient((probability(logits) * SCORES).sum(), logits)

    for lam in (0.0, 0.3, 0.95):
        found = policy_gradient(logits, gae(rewards, values, WHOLE, gamma=1.0, lam=lam))

        assert close(found, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_reward_gives_the_gradient_of_the_score_less_the_divergence(seed: int) -> None:
    logits, _, reference = world(seed)
    beta = 0.3
    distance = (logprobs(logits) - logprobs(reference)).detach()
    rewards = token_rewards(SCORES, k1(distance), WHOLE, kl_coef=beta)

    found = policy_gradient(
        logits, gae(rewards, torch.zeros(9, 2, dtype=DOUBLE), WHOLE, gamma=1.0, lam=1.0)
    )

    answers = probability(logits)
    whole = (answers * (logprobs(logits) - logprobs(reference)).sum(dim=1)).sum()
    assert close(found, gradient((answers * SCORES).sum() - beta * whole, logits))


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_over_all_pairs_of_answers_gives_the_exact_gradient(seed: int) -> None:
    logits = world(seed).current
    left, right = torch.tensor(list(itertools.product(range(9), repeat=2))).T
    rows = torch.stack([left, right], dim=1).flatten()  # two answers per pair, side by side
    pairs = torch.arange(81).repeat_interleave(2)
    advantages = rloo(SCORES[rows], pairs)[:, None].expand(-1, 2)
    mask = torch.ones(162, 2).bool()
    answers = probability(logits).detach()
    weights = (answers[left] * answers[right]).repeat_interleave(2) / 2

    current = logprobs(logits)[rows]
    objective = clipped_surrogate(current, current.detach(), advantages, mask, **WIDE_OPEN)
    found = gradient(weighted_sum(objective, mask, weights), logits)

    assert close(found, gradient((probability(logits) * SCORES).sum(), logits))


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights_make_a_foreign_samplers_gradient_exact(seed: int) -> None:
    logits, behavior, _ = world(seed)
    logits = torch.cat([logits[:1].detach().expand(4, 3)]).requires_grad_()
    current, sampled = logprobs(logits)[:, 1:], logprobs(behavior)
    answers = sampled.sum(dim=1).exp()
    mask = torch.ones(9, 1).bool()
    advantages = SCORES[:, None]
    old = current.detach()

    # Only the second token is trained here: each token's weight corrects that token alone.
    weights = importance_weights(old, sampled[:, 1:], mask, cap=1e9)
    objective = clipped_surrogate(current, old, advantages, mask, **WIDE_OPEN)
    found = gradient(weighted_sum(weights * objective, mask, answers), logits)

    expected = (
        visits(behavior)[1:] * (torch.softmax(logits[1:], -1) * SCORES.reshape(3, 3)).sum(-1)
    ).sum()
    assert close(found, gradient(expected, logits))


def expected_loss_kl(estimator: str, w: World) -> Tensor:
    """Gradient of the KL loss per answer, averaged over answers of the old policy."""
    current = logprobs(w.current)
    per_token = loss_kl(estimator, current - logprobs(w.reference), current - logprobs(w.old))
    return gradient(weighted_sum(per_token, WHOLE, probability(w.old)), w.current)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_loss_has_the_divergences_gradient_however_old_the_answers(
    seed: int, estimator: str
) -> None:
    w = world(seed)

    found = expected_loss_kl(estimator, w)

    expected = (visits(w.old) * divergence(w.current, w.reference)).sum()
    assert close(found, gradient(expected, w.current))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_loss_has_the_divergences_gradient_in_the_first_pass(
    seed: int, estimator: str
) -> None:
    w = world(seed)
    w = w._replace(old=w.current.detach())

    found = expected_loss_kl(estimator, w)

    expected = (visits(w.old) * divergence(w.current, w.reference)).sum()
    assert close(found, gradient(expected, w.current))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_k3_loss_is_the_divergence_itself_in_expectation(seed: int) -> None:
    w = world(seed)
    current = logprobs(w.current)

    per_token = loss_kl("k3", current - logprobs(w.reference), current - logprobs(w.old))
    found = weighted_sum(per_token, WHOLE, probability(w.old))

    expected = (visits(w.old) * divergence(w.current, w.reference)).sum()
    assert close(found, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_k1_and_k3_as_losses_would_have_other_gradients(seed: int) -> None:
    """Why `loss_kl` refuses them: in the first pass, and worse after it."""
    w = world(seed)
    distance = logprobs(w.current) - logprobs(w.reference)
    sampled = probability(w.current).detach()
    states = visits(w.current).detach()
    wanted = gradient((states * divergence(w.current, w.reference)).sum(), w.current)
    other_way = gradient((states * divergence(w.reference, w.current)).sum(), w.current)

    of_k1 = gradient(weighted_sum(k1(distance), WHOLE, sampled), w.current)
    distance = logprobs(w.current) - logprobs(w.reference)
    of_k3 = gradient(weighted_sum(k3(distance), WHOLE, sampled), w.current)

    assert close(of_k1, torch.zeros(4, 3, dtype=DOUBLE))
    assert close(of_k3, other_way)
    assert far(of_k3, wanted)


@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_an_estimator_without_a_right_gradient_is_refused_as_a_loss(estimator: str) -> None:
    with pytest.raises(InvalidConfig, match="take k2 or k3"):
        loss_kl(estimator, torch.zeros(1, 1), torch.zeros(1, 1))
