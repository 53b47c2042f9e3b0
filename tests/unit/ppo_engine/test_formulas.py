"""The engine's formulas against hand-computed values, and mutants against the same checks."""

import inspect
from types import ModuleType

import pytest
import torch

from ppo_engine import advantages, losses, masking, rewards
from tests.unit.ppo_engine.loss_checks import CHECKS, Formulas

ENGINE = Formulas(losses=losses, masking=masking, advantages=advantages, rewards=rewards)

MUTANTS = (
    # losses: which branch, which bound, which sign
    ("losses", "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)"),
    (
        "losses",
        "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_high, 1 + clip_low)",
    ),
    ("losses", "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(max=1 + clip_high)"),
    ("losses", "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(min=1 - clip_low)"),
    ("losses", "(logprobs - old_logprobs)", "(old_logprobs - logprobs)"),
    ("losses", "unclipped = ratio * advantages", "unclipped = -ratio * advantages"),
    ("losses", "1 + clip_high) * advantages", "1 + clip_high) * -advantages"),
    ("losses", ".clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)", ""),
    ("losses", "floor = dual_clip * advantages", "floor = -dual_clip * advantages"),
    ("losses", "(advantages < 0) & (objective < floor)", "objective < floor"),
    ("losses", "(advantages < 0) & (objective < floor)", "(advantages > 0) & (objective < floor)"),
    ("losses", "(objective < floor)", "(objective > floor)"),
    (
        "losses",
        "torch.where((advantages < 0) & (objective < floor), floor, objective)",
        "torch.where(advantages < 0, torch.maximum(objective, floor), objective)",
    ),
    ("losses", "zero_outside(logprobs, response_mask)", "logprobs"),
    ("losses", "zero_outside(old_logprobs, response_mask)", "old_logprobs"),
    ("losses", "zero_outside(advantages, response_mask)", "advantages"),
    (
        "losses",
        "torch.maximum(error, clipped_error) / 2",
        "torch.minimum(error, clipped_error) / 2",
    ),
    ("losses", "torch.maximum(error, clipped_error) / 2", "torch.maximum(error, clipped_error)"),
    ("losses", "torch.maximum(error, clipped_error) / 2", "clipped_error / 2"),
    ("losses", "clipped_error > error", "clipped_error >= error"),
    ("losses", "clipped_error > error", "clipped_error < error"),
    ("losses", "(values < low) | (values > high)", "(values < low)"),
    ("losses", "(values < low) | (values > high)", "(values > high)"),
    (
        "losses",
        "old_values - clip_range, old_values + clip_range",
        "returns - clip_range, returns + clip_range",
    ),
    # masking: the one reduction
    ("masking", "(weight * zero_outside(per_token, response_mask))", "(weight * per_token)"),
    (
        "masking",
        "lengths.sum().expand_as(lengths)",
        "torch.full_like(lengths, response_mask.numel())",
    ),
    ("masking", "lengths.sum().expand_as(lengths)", "rows * lengths"),
    ("masking", "rows = has_tokens.sum()", "rows = torch.ones_like(has_tokens).sum()"),
    ("masking", "(rows * max_response_tokens)", "(rows * response_mask.shape[1])"),
    (
        "masking",
        "SEQUENCE_MEAN_TOKEN_SUM: rows.expand_as(lengths)",
        "SEQUENCE_MEAN_TOKEN_SUM: lengths",
    ),
    ("masking", "correction=1", "correction=0"),
    ("masking", "selected = values[mask]", "selected = values.flatten()"),
    ("masking", "(values - mean) * torch.rsqrt", "values * torch.rsqrt"),
    ("masking", "if selected.numel() < 2", "if False"),
    # advantages: off by one, discounts, skipped columns
    ("advantages", "gamma * next_value - values[:, t]", "gamma * values[:, t] - next_value"),
    ("advantages", "delta + gamma * lam", "delta + gamma"),
    ("advantages", "delta + gamma * lam", "delta + lam"),
    ("advantages", "gamma * next_value", "next_value"),
    ("advantages", "torch.where(response_mask[:, t], values[:, t], next_value)", "values[:, t]"),
    (
        "advantages",
        "torch.where(response_mask[:, t], advantages[:, t], next_advantage)",
        "advantages[:, t]",
    ),
    ("advantages", "return zero_outside(advantages, response_mask)", "return advantages"),
    ("advantages", "reversed(range(values.shape[1]))", "reversed(range(1, values.shape[1]))"),
    # rewards
    ("rewards", "penalty = -kl_coef", "penalty = kl_coef"),
    ("rewards", "position == position[:, -1:]", "position == 1"),
    ("rewards", "position == position[:, -1:]", "position == position[:, -1:] - 1"),
    (
        "rewards",
        "return response_mask & (position == position[:, -1:])",
        "return position == position.shape[1]",
    ),
    ("rewards", "return zero_outside(penalty", "return (penalty"),
    ("rewards", "scores - missing_stop_penalty, scores)", "scores, scores - missing_stop_penalty)"),
    ("rewards", "_SCALED_LIMIT = 10.0", "_SCALED_LIMIT = 5.0"),
    ("rewards", "(self.std or 1.0)", "(self.std or 2.0)"),
    ("rewards", "scores / (self.std", "(scores - self._mean) / (self.std"),
    ("rewards", "max(self._count, 1)", "max(self._count - 1, 1)"),
    ("rewards", "shift**2 * self._count * count / total", "0"),
)


def mutated(name: str, old: str, new: str) -> Formulas:
    """The engine with one module changed in one place."""
    source = inspect.getsource(getattr(ENGINE, name))
    assert source.count(old) >= 1, f"{old!r} no longer stands in {name}"
    source = source.replace(old, new)
    if new.startswith("return (") or "return (penalty" in new:
        source = source.replace("unsqueeze(1), response_mask)", "unsqueeze(1))")
    module = ModuleType(f"mutant_of_{name}")
    exec(compile(source, f"<{name} with {new!r}>", "exec"), module.__dict__)  # noqa: S102
    return ENGINE._replace(**{name: module})


@pytest.mark.parametrize("name", CHECKS)
def test_the_engine_passes(name: str) -> None:
    CHECKS[name](ENGINE)


@pytest.mark.parametrize(("module", "old", "new"), MUTANTS)
def test_a_mutant_is_caught(module: str, old: str, new: str) -> None:
    mutant = mutated(module, old, new)

    caught = []
    for name, check in CHECKS.items():
        try:
            check(mutant)
        except Exception:  # noqa: BLE001 - a mutant that raises is caught as well
            caught.append(name)

    assert caught


def test_one_token_is_explained() -> None:
    clip_rule = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    for ratio, advantage, expected in ((3.0, 1.0, 1.2), (3.0, 2.5, 3.0), (0.5, -2.5, -2.0)):
        old_logprobs = torch.tensor([[-1.25]])
        logprobs = (old_logprobs + torch.tensor(ratio).log()).requires_grad_()
        response_mask = torch.tensor([[True]])
        weights = masking.row_weights(response_mask, "token_mean", max_response_tokens=1)

        objective = losses.clipped_surrogate(
            logprobs, old_logprobs, torch.tensor([[advantage]]), response_mask, **clip_rule
        )
        loss = -masking.weighted_sum(objective, response_mask, weights)
        loss.backward()

        assert loss.item() == pytest.approx(-expected, rel=1e-6)
        assert logprobs.grad is not None
        assert logprobs.grad.item() == 0.0
