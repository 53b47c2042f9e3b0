"""Reward by the tone of a text: VADER's lexicon and rules (Hutto & Gilbert 2014)."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Self

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ppo_engine.graders.settings import GraderSettings
from ppo_engine.graders.template import Template


class SentimentGrader:
    """−1 to 1: VADER's compound score, its negative, or 1 − 2·|compound| for a neutral tone."""

    def __init__(self, template: Template, *, target: str) -> None:
        self._template = template
        self._target = target
        self._analyzer = _analyzer()

    @classmethod
    def from_settings(cls, settings: GraderSettings) -> Self:
        """The grader that a job asked for."""
        target = settings.choice("target", "positive", "negative", "neutral")
        return cls(settings.template(), target=target)

    def grade(self, texts: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[float]:
        """One reward per text."""
        return [
            self._reward(self._template.render(text, item))
            for text, item in zip(texts, items, strict=True)
        ]

    def _reward(self, text: str) -> float:
        compound = float(self._analyzer.polarity_scores(text)["compound"])
        match self._target:
            case "positive":
                return compound
            case "negative":
                return -compound
            case _:
                return 1 - 2 * abs(compound)


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    """One for all, since it holds nothing but the lexicon, which takes long to read."""
    return SentimentIntensityAnalyzer()
