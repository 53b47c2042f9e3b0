from datetime import UTC, datetime

import pytest

from core.best_checkpoint import score
from core.feed import MetricPoint


def point(step: int, **values: float | None) -> MetricPoint:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return MetricPoint(attempt=1, line=step, seq=step, step=step, at=at, values=values)


def test_with_held_out_prompts_the_checkpoints_own_step_counts() -> None:
    points = [
        point(3, valid_reward_mean=9.0, reward_mean=9.0, kl_reference_per_sequence=0.0),
        point(4, valid_reward_mean=0.8, reward_mean=9.0, kl_reference_per_sequence=2.0),
    ]

    found = score(points, step=4, kl_coef=0.05, is_held_out=True)

    assert found == pytest.approx(0.8 - 0.05 * 2.0)


def test_a_step_that_was_not_evaluated_does_not_compete() -> None:
    points = [
        point(3, valid_reward_mean=0.5, kl_reference_per_sequence=0.0),
        point(4, valid_reward_mean=None, kl_reference_per_sequence=0.0),
    ]

    assert score(points, step=4, kl_coef=0.05, is_held_out=True) is None


def test_without_held_out_prompts_the_last_steps_are_averaged() -> None:
    points = [
        point(1, reward_mean=0.1, kl_reference_per_sequence=1.0),
        point(2, reward_mean=0.4, kl_reference_per_sequence=3.0),
    ]

    found = score(points, step=2, kl_coef=0.1, is_held_out=False)

    assert found == pytest.approx(((0.1 - 0.1) + (0.4 - 0.3)) / 2)


def test_steps_without_figures_are_left_out_of_the_mean() -> None:
    points = [
        point(1, reward_mean=None, kl_reference_per_sequence=1.0),
        point(2, reward_mean=0.4, kl_reference_per_sequence=None),
        point(3, reward_mean=0.6, kl_reference_per_sequence=0.0),
    ]

    assert score(points, step=3, kl_coef=0.1, is_held_out=False) == pytest.approx(0.6)
    assert score(points[:2], step=2, kl_coef=0.1, is_held_out=False) is None
