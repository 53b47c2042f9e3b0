"""Ten seeds of a small run learn what is rewarded, and nothing where the reward is noise.

The gain of a run is the mean true score of its last three updates less that of its first three.
With 32 answers per update the sampling error of a gain is about 0.03.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import make_tiny_model
from tests.tiny_run import AsciiShare, tiny_config, tiny_trainer

SEEDS = range(10)
COMPARED_UPDATES = 3
SMALLEST_GAIN = 0.04
"""Every seed gains more, noise less.  When written, the smallest gain was 0.09, noise gave -0.02
on average."""
STUDENT_T = 4.3
"""Of 9 degrees of freedom, two-sided: chance alone exceeds it in one of 500 experiments."""

CONFIG = tiny_config(
    total_steps=10,
    batch_size=32,
    micro_batch_size=16,
    max_response_tokens=8,
    learning_rate=5e-3,
    kl_coef=0.0,
    eval_interval=100,
    eval_samples=1,
)


class Remembering:
    """Hands out rewards of its own, and remembers what the answers deserved."""

    def __init__(self) -> None:
        self.true_means: list[float] = []

    def grade(self, texts: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[float]:
        deserved = AsciiShare().grade(texts, items)
        if len(texts) == CONFIG.batch_size:  # not validation
            self.true_means.append(statistics.mean(deserved))
        return self.rewards(deserved)

    def rewards(self, deserved: list[float]) -> list[float]:
        return deserved


class Noise(Remembering):
    """Draws rewards that have nothing to do with the answers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draws = random.Random(seed)

    def rewards(self, deserved: list[float]) -> list[float]:
        return [self._draws.random() for _ in deserved]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def gain(folder: Path, scorer: Remembering, seed: int) -> float:
    for _ in tiny_trainer(folder, CONFIG, seed=seed, scorer=scorer).steps():
        pass
    means = scorer.true_means
    assert len(means) == CONFIG.total_steps
    return statistics.mean(means[-COMPARED_UPDATES:]) - statistics.mean(means[:COMPARED_UPDATES])


def test_every_seed_learns_what_is_rewarded(tiny_model: Path) -> None:
    gains = [gain(tiny_model, Remembering(), seed) for seed in SEEDS]

    assert min(gains) > SMALLEST_GAIN, gains


def test_rewards_that_are_noise_teach_nothing(tiny_model: Path) -> None:
    gains = [gain(tiny_model, Noise(seed), seed) for seed in SEEDS]

    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert abs(statistics.mean(gains)) < STUDENT_T * error, gains
    assert abs(statistics.mean(gains)) < SMALLEST_GAIN, gains
