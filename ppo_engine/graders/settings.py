"""Typed reading of a grader's dict; every fault names the setting it is about."""

from collections.abc import Mapping
from typing import Any

from ppo_engine.errors import InvalidConfig
from ppo_engine.graders.template import DEFAULT_INPUT, Template

PARAM = "reward"
"""Name of the whole grader in errors; its settings are `reward.<name>`."""


class GraderSettings:
    """The fields of one grader; ask for each, then call `finish`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._known = {"type", "name"}

    def template(self) -> Template:
        """The text that is judged, by default the response."""
        text = self.text("input", default=DEFAULT_INPUT)
        return Template(text, param=f"{PARAM}.input")

    def text(self, name: str, *, default: str | None = None, longest: int = 10_000) -> str:
        """A string of 1 to `longest` characters; required without a default."""
        value = self._take(name, default)
        if value is None:
            raise self.fault(name, "is required")
        if not isinstance(value, str) or not 1 <= len(value) <= longest:
            raise self.fault(name, f"must be a string of 1 to {longest} characters")
        return value

    def choice(self, name: str, *options: str) -> str:
        """One of the options; the first is the default."""
        value = self._take(name, options[0])
        if value not in options:
            raise self.fault(name, f"must be one of {', '.join(options)}, got {value!r}")
        return str(value)

    def number(self, name: str, *, least: float = 0) -> float | None:
        """A finite number of at least `least`; None when absent."""
        value = self._take(name, None)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value < float("inf"):
            raise self.fault(name, f"must be a number of at least {least:g}, got {value!r}")
        return float(value)

    def finish(self) -> None:
        """Refuse settings nobody asked for."""
        if unknown := sorted(set(self._fields) - self._known):
            known = ", ".join(sorted(self._known))
            raise self.fault(unknown[0], f"is unknown; known are {known}")

    def fault(self, name: str, message: str) -> InvalidConfig:
        """The error to raise about one setting."""
        return InvalidConfig(f"{PARAM}.{name} {message}", param=f"{PARAM}.{name}")

    def _take(self, name: str, default: Any) -> Any:
        self._known.add(name)
        return self._fields.get(name, default)
