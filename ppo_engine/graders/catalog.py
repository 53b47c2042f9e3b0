"""Reward functions by the name a job uses for them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ppo_engine.errors import InvalidConfig
from ppo_engine.graders.length import LengthGrader
from ppo_engine.graders.regex import RegexGrader
from ppo_engine.graders.sentiment import SentimentGrader
from ppo_engine.graders.settings import PARAM, GraderSettings


class Grader(Protocol):
    """Gives responses a reward each."""

    def grade(self, texts: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[float]:
        """One finite number per text; `items` are the data rows' other keys, in the same order."""
        ...


_GRADERS: dict[str, Callable[[GraderSettings], Grader]] = {
    "sentiment": SentimentGrader.from_settings,
    "length": LengthGrader.from_settings,
    "regex": RegexGrader.from_settings,
}

GRADER_TYPES = tuple(_GRADERS)
"""What `type` may be."""


def build_grader(fields: Mapping[str, Any]) -> Grader:
    """The grader a job asked for; `InvalidConfig` names the setting that is wrong."""
    kind = fields.get("type")
    if kind not in _GRADERS:
        raise InvalidConfig(
            f"reward.type must be one of {', '.join(GRADER_TYPES)}, got {kind!r}",
            param=f"{PARAM}.type",
        )
    settings = GraderSettings(fields)
    grader = _GRADERS[kind](settings)
    settings.finish()
    return grader
