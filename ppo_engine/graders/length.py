"""Reward by the length of a text, in words, characters or sentences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from ppo_engine.graders.settings import GraderSettings
from ppo_engine.graders.template import Template

_CLOSING = "\"'”’»)]}*_"
_ENDINGS = (".", "!", "?", "…", "。", "！", "？")


def count_words(text: str) -> int:
    """Pieces between white space."""
    return len(text.split())


def count_sentences(text: str) -> int:
    """Pieces with a letter or digit that end in `.`, `!`, `?` or with the text."""
    for mark in "。！？":
        text = text.replace(mark, f"{mark} ")
    count, has_begun = 0, False
    for word in text.split():
        has_begun = has_begun or any(character.isalnum() for character in word)
        if has_begun and word.rstrip(_CLOSING).endswith(_ENDINGS):
            count, has_begun = count + 1, False
    return count + has_begun


_COUNTERS: dict[str, Callable[[str], int]] = {
    "words": count_words,
    "chars": len,
    "sentences": count_sentences,
}


class LengthGrader:
    """0 to 1: how well a length fits a range or a target."""

    def __init__(
        self, template: Template, *, unit: str, reward_of_length: Callable[[int], float]
    ) -> None:
        self._template = template
        self._count = _COUNTERS[unit]
        self._reward = reward_of_length

    @classmethod
    def from_settings(cls, settings: GraderSettings) -> Self:
        """The grader that a job asked for: `min` and/or `max`, or `target` with `tolerance`."""
        unit = settings.choice("unit", *_COUNTERS)
        template = settings.template()
        return cls(template, unit=unit, reward_of_length=_wanted_length(settings))

    def grade(self, texts: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[float]:
        """One reward per text."""
        return [
            self._reward(self._count(self._template.render(text, item)))
            for text, item in zip(texts, items, strict=True)
        ]


def _wanted_length(settings: GraderSettings) -> Callable[[int], float]:
    low, high = settings.number("min"), settings.number("max")
    target, tolerance = settings.number("target"), settings.number("tolerance")
    if (low is None and high is None) == (target is None):
        raise settings.fault("min", "and/or max, or target: one of the two must be given")
    if target is None:
        if tolerance is not None:
            raise settings.fault("tolerance", "needs target")
        low, high = low or 0.0, float("inf") if high is None else high
        if low > high:
            raise settings.fault("min", f"must not exceed max, got {low:g} and {high:g}")
        return lambda length: range_reward(length, low, high)
    if tolerance == 0:
        raise settings.fault("tolerance", "must be positive, got 0")
    width = max(target, 1.0) if tolerance is None else tolerance
    return lambda length: target_reward(length, target, width)


def range_reward(length: int, low: float, high: float) -> float:
    """1 within [low, high]; outside the nearer bound's proportion to the length, always below 1."""
    if length < low:
        return length / low
    return high / length if length > high else 1.0


def target_reward(length: int, target: float, tolerance: float) -> float:
    """1 at the target, falling in a straight line to 0 at the tolerance's distance from it."""
    return max(0.0, 1 - abs(length - target) / tolerance)
