"""Our formulas on inputs whose answers other people's PPO gave; `generate.py` asked for them.

Where a tolerance is wider than rounding, or an answer is compared after a change, the other
implementation differs by definition, and the constant says how.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_engine.advantages import gae, grpo, rloo
from ppo_engine.clip_stats import classify
from ppo_engine.config import LossAggregation
from ppo_engine.explain import TOKEN_CLASSES
from ppo_engine.kl import AdaptiveKl, k1, k2, k3, loss_kl
from ppo_engine.logprobs import token_logprobs
from ppo_engine.losses import (
    clipped_value_error,
    importance_weights,
    log_ratio,
    surrogate_terms,
)
from ppo_engine.masking import row_weights, standardize, weighted_sum

DATA = Path(__file__).parent / "data"
ROUNDING = 1e-12
"""float64 on both sides, summed in another order."""
SMALL_DENOMINATORS = 1e-7
"""verl adds 1e-8 to the counts and lengths it divides by."""
SINGLE = 1e-6
"""Log-probabilities are fp32 on both sides."""

AGGREGATIONS = {
    "token-mean": LossAggregation.TOKEN_MEAN,
    "seq-mean-token-mean": LossAggregation.SEQUENCE_MEAN_TOKEN_MEAN,
    "seq-mean-token-sum": LossAggregation.SEQUENCE_MEAN_TOKEN_SUM,
    "seq-mean-token-sum-norm": LossAggregation.SEQUENCE_MEAN_TOKEN_SUM_NORM,
}


def cases(name: str, **having: Any) -> Any:
    """Parametrizes a test over the stored cases that have these values."""
    stored = json.loads((DATA / f"{name}.json").read_text())["cases"]
    chosen = [case for case in stored if having.items() <= case.items()]
    return pytest.mark.parametrize("case", [with_tensors(case) for case in chosen])


def with_tensors(case: dict[str, Any]) -> dict[str, Any]:
    """Nested lists as tensors, numbers with a point in float64."""
    found = dict(case)
    for name, value in case.items():
        if isinstance(value, list) and not isinstance(value[0], dict):
            plain = torch.tensor(value)
            wide = torch.float64 if plain.is_floating_point() else plain.dtype
            found[name] = torch.tensor(value, dtype=wide)
    return found


def close(found: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@cases("gae_torchrl")
def test_gae_agrees_with_torchrl(case: dict[str, Any]) -> None:
    found = gae(case["rewards"], case["values"], case["mask"], gamma=case["gamma"], lam=case["lam"])

    close(found, case["advantages"], ROUNDING)
    close(found + case["values"], case["returns"], ROUNDING)


@cases("gae_verl")
def test_gae_agrees_with_verl_across_holes_in_the_response(case: dict[str, Any]) -> None:
    mask = case["mask"]

    found = gae(case["rewards"], case["values"], mask, gamma=case["gamma"], lam=case["lam"])

    close((found + case["values"]) * mask, case["returns"], ROUNDING)
    close(standardize(found, mask), case["whitened"], SMALL_DENOMINATORS)


@cases("whitening")
def test_standardizing_agrees_with_whitening_that_moves_the_mean_to_0(case: dict[str, Any]) -> None:
    found = standardize(case["values"], case["mask"])

    close(found, case["whitened"], SMALL_DENOMINATORS)


@cases("whitening")
def test_their_other_whitening_only_puts_the_mean_back(case: dict[str, Any]) -> None:
    mask = case["mask"]

    found = standardize(case["values"], mask) + case["values"][mask].mean() * mask

    close(found, case["whitened_around_the_mean"], SMALL_DENOMINATORS)


@cases("policy_loss_verl")
def test_the_policy_loss_and_its_gradient_agree_with_verl(case: dict[str, Any]) -> None:
    mask = case["mask"]
    logprobs = case["logprobs"].requires_grad_()
    weights = row_weights(
        mask, AGGREGATIONS[case["aggregation"]], max_response_tokens=case["max_response_tokens"]
    )

    objective = surrogate_terms(
        log_ratio(logprobs, case["old_logprobs"]), case["advantages"], **clip_rule(case)
    ).objective
    loss = -weighted_sum(objective, mask, weights)
    (gradient,) = torch.autograd.grad(loss, logprobs)

    close(loss.item(), case["loss"], SMALL_DENOMINATORS)
    close(gradient, case["gradient"], SMALL_DENOMINATORS)


@cases("policy_loss_verl")
def test_clip_fractions_agree_with_verl(case: dict[str, Any]) -> None:
    mask = case["mask"]
    drift = log_ratio(case["logprobs"].detach(), case["old_logprobs"])

    numbers = classify(drift, case["advantages"], **clip_rule(case))[mask].tolist()

    names = [TOKEN_CLASSES[number] for number in numbers]
    clipped = (names.count("clipped_high") + names.count("clipped_low")) / len(names)
    dual_clipped = names.count("dual_clipped") / len(names)
    # verl's fractions are fp32.
    close(clipped, case["clipped_fraction"], SINGLE)
    close(dual_clipped, case["dual_clipped_fraction"], SINGLE)
    close(-drift[mask].mean(), case["mean_drift"], SMALL_DENOMINATORS)


def clip_rule(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in ("clip_low", "clip_high", "dual_clip")}


@cases("value_loss_verl")
def test_the_value_loss_and_its_gradient_agree_with_verl(case: dict[str, Any]) -> None:
    mask = case["mask"]
    values = case["values"].requires_grad_()
    weights = row_weights(mask, LossAggregation.TOKEN_MEAN, max_response_tokens=1)

    terms = clipped_value_error(
        values, case["old_values"], case["returns"], clip_range=case["clip_range"]
    )
    loss = weighted_sum(terms.error, mask, weights)
    (gradient,) = torch.autograd.grad(loss, values)

    close(loss.item(), case["loss"], ROUNDING)
    close(gradient, case["gradient"], ROUNDING)
    close(terms.is_clipped[mask].double().mean(), case["clipped_fraction"], SINGLE)


@cases("aggregation_verl")
def test_aggregations_agree_with_verl_where_a_row_is_empty(case: dict[str, Any]) -> None:
    mode = AGGREGATIONS[case["aggregation"]]
    weights = row_weights(case["mask"], mode, max_response_tokens=case["max_response_tokens"])

    found = weighted_sum(case["losses"], case["mask"], weights)

    close(found, case["total"], SMALL_DENOMINATORS)


@cases("kl_verl")
def test_kl_estimators_agree_with_verl(case: dict[str, Any]) -> None:
    estimator = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3}[case["estimator"]]

    found = estimator(case["logprobs"] - case["reference_logprobs"])

    close(found, case["kl"], ROUNDING)


@cases("kl_verl", estimator="k3+")
def test_the_k2_loss_has_the_gradient_of_verls_corrected_estimator(case: dict[str, Any]) -> None:
    # verl's "k3+" shows k3 and differentiates k2; before the first step ours is the same.
    logprobs = case["logprobs"].requires_grad_()
    nothing_moved = logprobs - logprobs.detach()

    loss = loss_kl("k2", logprobs - case["reference_logprobs"], nothing_moved).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)

    close(gradient, case["gradient"], ROUNDING)


@cases("adaptive_kl_verl")
def test_the_adaptive_coefficient_agrees_with_verl(case: dict[str, Any]) -> None:
    controller = AdaptiveKl(
        case["coef"], target_kl_per_sequence=case["target"], horizon=case["horizon"]
    )

    for step in case["steps"]:
        controller.update(step["kl"], step["episodes"])

        assert controller.coef == pytest.approx(step["coef"], rel=ROUNDING)


@cases("groups_verl")
@pytest.mark.parametrize("formula", [rloo, grpo])
def test_group_advantages_agree_with_verl(case: dict[str, Any], formula: Any) -> None:
    found = formula(case["scores"], case["group_ids"])

    # verl leaves the rounding error of a constant group's mean, which grpo divides by 1e-6.
    close(found, case[formula.__name__], 1e-10)


@cases("importance_weights_verl")
def test_importance_weights_agree_with_verl(case: dict[str, Any]) -> None:
    found = importance_weights(
        case["old_logprobs"], case["behavior_logprobs"], case["mask"], cap=case["cap"]
    )

    close(found, case["weights"], ROUNDING)


@cases("logprobs_verl")
def test_log_probabilities_and_entropies_agree_with_verl(case: dict[str, Any]) -> None:
    found = token_logprobs(case["logits"].float(), case["tokens"], temperature=case["temperature"])

    close(found.logprobs, case["logprobs"], SINGLE)
    close(found.entropy, case["entropy"], SINGLE)


def test_every_stored_answer_is_used_and_says_who_gave_it() -> None:
    text = Path(__file__).read_text()

    for path in DATA.glob("*.json"):
        assert f'@cases("{path.stem}"' in text
        asked = json.loads(path.read_text())["asked"]
        assert "torch" in asked
        assert asked.keys() & {"torchrl", "verl", "trl"}
