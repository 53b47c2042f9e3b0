"""Reward by a pattern, matched in linear time (RE2), so that no pattern can hang a job."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Self

import re2

from ppo_engine.graders.settings import GraderSettings
from ppo_engine.graders.template import Template

_LONGEST_PATTERN = 1000


class RegexGrader:
    """0 or 1 by `search` and `fullmatch`; by `count` the matches over `max_count`, at most 1."""

    def __init__(self, template: Template, pattern: Any, *, mode: str, max_count: int) -> None:
        self._template = template
        self._pattern = pattern
        self._mode = mode
        self._max_count = max_count

    @classmethod
    def from_settings(cls, settings: GraderSettings) -> Self:
        """The grader that a job asked for."""
        pattern = _compile(settings)
        mode = settings.choice("mode", "search", "fullmatch", "count")
        max_count = settings.number("max_count", least=1) or 1.0
        if not max_count.is_integer():
            raise settings.fault("max_count", f"must be a whole number, got {max_count:g}")
        return cls(settings.template(), pattern, mode=mode, max_count=int(max_count))

    def grade(self, texts: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[float]:
        """One reward per text."""
        return [
            self._reward(self._template.render(text, item))
            for text, item in zip(texts, items, strict=True)
        ]

    def _reward(self, text: str) -> float:
        match self._mode:
            case "search":
                return float(self._pattern.search(text) is not None)
            case "fullmatch":
                return float(self._pattern.fullmatch(text) is not None)
            case _:
                found = islice(self._pattern.finditer(text), self._max_count)
                return sum(1 for _ in found) / self._max_count


def _compile(settings: GraderSettings) -> Any:
    pattern = settings.text("pattern", longest=_LONGEST_PATTERN)
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0]
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(error)
        raise settings.fault("pattern", f"is no RE2 pattern: {text}") from error
