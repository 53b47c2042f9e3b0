"""KL estimators, and the state of what adapts from step to step."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ppo_engine.kl import AdaptiveKl, FixedKl, KlController, k1, k2, k3
from ppo_engine.rewards import RunningStd

HAND = 2e-6
"""Numbers by hand carry six digits."""
ROUNDED = 1e-4
"""Gradients by hand carry four digits."""

POLICY = torch.softmax(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), dim=0)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(-1, (-1, 0.5, 0.718282)), (1, (1, 0.5, 0.367879)), (0.1, (0.1, 0.005, 0.004837))],
)
def test_estimators_of_one_token(difference: float, expected: tuple[float, ...]) -> None:
    tensor = torch.tensor([difference], dtype=torch.float64)

    found = [estimator(tensor).item() for estimator in (k1, k2, k3)]

    assert found == pytest.approx(expected, abs=HAND)


def test_expectations_are_the_divergence() -> None:
    difference = (POLICY / REFERENCE).log()

    assert (POLICY * k1(difference)).sum().item() == pytest.approx(0.283068, abs=HAND)
    assert (POLICY * k3(difference)).sum().item() == pytest.approx(0.283068, abs=HAND)
    reverse = (REFERENCE * (REFERENCE / POLICY).log()).sum().item()
    assert reverse == pytest.approx(0.277953, abs=HAND)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (k1, (0.0, 0.0, 0.0)),
        (k2, (-0.0973, -0.2441, 0.3415)),
        (k3, (-0.1100, -0.2553, 0.3652)),
    ],
)
def test_expected_gradients_are_three_different_things(
    estimator: Callable[[Tensor], Tensor], expected: tuple[float, ...]
) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    difference = torch.log_softmax(logits, dim=0) - REFERENCE.log()

    (POLICY * estimator(difference)).sum().backward()

    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(expected, abs=ROUNDED)


@pytest.mark.parametrize(
    ("kl", "episodes", "expected"),
    [
        (9.0, 64, 0.200256),  # e = 0.5, bounded to 0.2
        (6.6, 100, 0.2 * 1.001),  # e = 0.1
        (6.0, 64, 0.2),
        (0.0, 64, 0.199744),  # e = -1, bounded to -0.2
        (-3.0, 64, 0.199744),
    ],
)
def test_the_adaptive_coefficient_follows_the_error(
    kl: float, episodes: int, expected: float
) -> None:
    controller = AdaptiveKl(0.2, target_kl_per_sequence=6, horizon=10_000)

    controller.update(kl, episodes)

    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_the_fixed_coefficient_stays() -> None:
    controller = FixedKl(0.05)

    controller.update(100.0, 64)

    assert controller.coef == 0.05


@pytest.mark.parametrize(
    "make",
    [
        FixedKl,
        lambda coef: AdaptiveKl(coef, target_kl_per_sequence=6, horizon=9),
    ],
)
def test_a_controller_goes_on_from_its_state(make: Callable[[float], KlController]) -> None:
    interrupted, uninterrupted = make(0.2), make(0.2)
    interrupted.update(8.0, 3)
    uninterrupted.update(8.0, 3)
    resumed = make(0.7)

    resumed.load(json.loads(json.dumps(interrupted.state())))
    resumed.update(5.0, 2)
    uninterrupted.update(5.0, 2)

    assert resumed.coef == uninterrupted.coef


def test_the_running_std_goes_on_from_its_state() -> None:
    interrupted, uninterrupted, resumed = RunningStd(), RunningStd(), RunningStd()
    for running in (interrupted, uninterrupted):
        running.update(torch.tensor([1.0, 5.0, 2.0]))

    resumed.load(json.loads(json.dumps(interrupted.state())))
    for running in (resumed, uninterrupted):
        running.update(torch.tensor([0.5, 9.0]))

    assert resumed.std == uninterrupted.std
    assert resumed.std == pytest.approx(torch.tensor([1, 5, 2, 0.5, 9]).std(correction=0).item())


def test_the_running_std_is_0_before_scores_differ() -> None:
    running = RunningStd()
    running.update(torch.tensor([]))
    before = running.std
    running.update(torch.tensor([0.7]))

    assert (before, running.std) == (0.0, 0.0)
    assert running.scale(torch.tensor([0.7, 50.0])).tolist() == pytest.approx([0.7, 10.0])
