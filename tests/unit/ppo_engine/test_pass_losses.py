"""What one optimizer step minimises, in a world of three tokens and two steps written out.

All nine answers count with their probability, so the loss of the pass must have exactly the
derivative of what its parts stand for.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_engine.policy import Evaluation
from ppo_engine.rollout import Targets
from ppo_engine.update import PassLosses, pass_losses
from tests.tiny_run import tiny_config

EXACT = 1e-12
"""Room for float64 rounding."""

DOUBLE = torch.float64
ANSWERS = torch.tensor(list(itertools.product(range(3), repeat=2)))
SCORES = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, 0.5, -0.5, 0.7, 1.5], dtype=DOUBLE)
MASK = torch.ones(9, 2).bool()
KL_COEF = 0.3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def distributions(logits: Tensor) -> Tensor:
    """Log-probabilities of the next token before the first token and after each, [4, 3]."""
    return torch.log_softmax(logits, dim=-1)


def chosen(table: Tensor) -> Tensor:
    """Of both tokens of each answer, [9, 2], from a [4, 3] table."""
    first, second = ANSWERS.T
    return torch.stack([table[0, first], table[1 + first, second]], dim=1)


def met(per_state: Tensor) -> Tensor:
    """Of the state before each token of each answer, [9, 2], from numbers of the four states."""
    return torch.stack([per_state[0].expand(9), per_state[1 + ANSWERS[:, 0]]], dim=1)


def entropies(table: Tensor) -> Tensor:
    return -(table.exp() * table).sum(dim=-1)


def evaluation(logits: Tensor, values: Tensor) -> Evaluation:
    table = distributions(logits)
    return Evaluation(logprobs=chosen(table), entropy=met(entropies(table)), values=met(values))


def targets(old: Tensor, reference: Tensor, **changes: Any) -> Targets:
    zeros = torch.zeros(9, 2, dtype=DOUBLE)
    fields: dict[str, Any] = {
        "old_logprobs": chosen(distributions(old)),
        "kl_reference_logprobs": chosen(distributions(reference)),
        "old_values": zeros,
        "advantages": zeros,
        "returns": zeros,
        "importance_weights": torch.ones(9, 2, dtype=DOUBLE),
    }
    return Targets(**(fields | changes))


def losses(current: Evaluation, wanted: Targets, weights: Tensor, **changes: Any) -> PassLosses:
    config = tiny_config(**{"value_clip_range": None, **changes})
    return pass_losses(current, wanted, MASK, weights, config, kl_coef=KL_COEF)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, leaf)
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_a_pass_goes_up_in_score_and_entropy_and_down_in_divergence(
    seed: int, estimator: str
) -> None:
    logits, reference = draw(seed, 4, 3).requires_grad_(), draw(seed + 50, 4, 3)
    changes = {"kl_placement": "loss", "kl_estimator": estimator, "entropy_coef": 0.2}
    weights = chosen(distributions(logits)).sum(dim=1).exp().detach()

    found = gradient(
        losses(
            evaluation(logits, draw(seed, 4)),
            targets(logits.detach(), reference, advantages=SCORES[:, None].expand(9, 2)),
            weights,
            **changes,
        ).total(tiny_config(value_coef=0.0, **changes)),
        logits,
    )

    table, other = distributions(logits), distributions(reference)
    visits = torch.cat([torch.ones(1, dtype=DOUBLE), table[0].exp()]).detach()
    divergence = (table.exp() * (table - other)).sum(dim=-1)
    expected = (
        -(chosen(table).sum(dim=1).exp() * SCORES).sum()
        - 0.2 * (visits * entropies(table)).sum()
        + KL_COEF * (visits * divergence).sum()
    )
    assert close(found, gradient(expected, logits))


def test_a_pass_moves_values_to_the_mean_return_of_each_state() -> None:
    logits, values = draw(1, 4, 3), draw(2, 4).requires_grad_()
    returns = SCORES[:, None].expand(9, 2)
    weights = chosen(distributions(logits)).sum(dim=1).exp()

    found = gradient(
        losses(evaluation(logits, values), targets(logits, logits, returns=returns), weights).total(
            tiny_config(value_coef=0.5)
        ),
        values,
    )

    probability = distributions(logits).exp()
    after = (probability[1:] * SCORES.reshape(3, 3)).sum(dim=-1)
    means = torch.cat([(probability[0] * after).sum()[None], after])
    visits = torch.cat([torch.ones(1, dtype=DOUBLE), probability[0]])
    assert close(found, 0.5 * visits * (values.detach() - means))


def test_with_the_penalty_in_the_reward_the_loss_has_none() -> None:
    logits = draw(1, 4, 3)

    found = losses(
        evaluation(logits, draw(2, 4)), targets(logits, draw(3, 4, 3)), torch.ones(9).double()
    )

    assert found.kl.item() == 0.0


def test_each_tokens_objective_is_weighted_for_a_sampler_with_other_numbers() -> None:
    logits = draw(1, 4, 3)
    weights, importance, advantages = draw(4, 9).abs(), draw(5, 9, 2).abs(), draw(6, 9, 2)

    found = losses(
        evaluation(logits, draw(2, 4)),
        targets(logits, logits, advantages=advantages, importance_weights=importance),
        weights,
    )

    # At ρ = 1 the objective is A.
    assert close(found.policy, -(weights[:, None] * importance * advantages).sum())


def test_the_penalty_and_the_critic_know_nothing_of_importance_weights() -> None:
    logits, reference, weights = draw(1, 4, 3), draw(3, 4, 3), draw(4, 9).abs()
    changes = {"kl_placement": "loss", "kl_estimator": "k2"}

    plain, weighted = (
        losses(
            evaluation(logits, draw(2, 4)),
            targets(logits, reference, importance_weights=importance),
            weights,
            **changes,
        )
        for importance in (torch.ones(9, 2, dtype=DOUBLE), draw(5, 9, 2).abs())
    )

    assert (plain.value, plain.entropy, plain.kl) == (
        weighted.value,
        weighted.entropy,
        weighted.kl,
    )
