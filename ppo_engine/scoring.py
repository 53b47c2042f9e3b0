"""What stands between the trainer and a reward: the `Scorer` protocol and its guard."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, tensor

from ppo_engine.errors import EngineError, RewardFailed


class Scorer(Protocol):
    """Anything that gives responses a reward each."""

    def grade(self, texts: Sequence[str], items: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        """One number per text; `items` are the data rows' other keys, in the same order."""
        ...


def checked_scores(
    scorer: Scorer, texts: Sequence[str], items: Sequence[Mapping[str, Any]]
) -> Tensor:
    """Scores of all responses, [B] fp32; anything but one finite number each is `RewardFailed`."""
    try:
        scores = [float(score) for score in scorer.grade(texts, items)]
    except EngineError:
        raise
    except Exception as error:  # a reward is foreign code: whatever it raises is its failure
        raise RewardFailed(f"the reward raised {type(error).__name__}: {error}") from error
    if len(scores) != len(texts):
        raise RewardFailed(f"the reward returned {len(scores)} numbers for {len(texts)} answers")
    for row, score in enumerate(scores):
        if not math.isfinite(score):
            raise RewardFailed(f"the reward of answer {row} is {score}, not a finite number")
    return tensor(scores)
