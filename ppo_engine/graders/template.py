"""Texts with `{{...}}` in them, filled in from a response and its data row."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ppo_engine.errors import InvalidConfig, RewardFailed

DEFAULT_INPUT = "{{sample.output_text}}"
"""The response alone."""

_REFERENCE = re.compile(r"\{\{([^{}]*)\}\}")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d{1,9})\]")


class Template:
    """A text with references to `sample.output_text` and to keys of the row: `item.a.b[0]`."""

    def __init__(self, text: str, *, param: str) -> None:
        """Check every reference; `param` names the setting in errors."""
        pieces = _REFERENCE.split(text)
        self._literals = pieces[::2]
        self._references = [_parse(piece.strip(), param) for piece in pieces[1::2]]

    @property
    def reads_sample(self) -> bool:
        """Whether the response occurs in it at all."""
        return None in self._references

    def render(self, output_text: str, item: Mapping[str, Any]) -> str:
        """The text with every reference replaced; what is no string becomes JSON."""
        filled = [self._literals[0]]
        for path, literal in zip(self._references, self._literals[1:], strict=True):
            filled += [output_text if path is None else _text(_look_up(item, path)), literal]
        return "".join(filled)

    def missing(self, item: Mapping[str, Any]) -> list[str]:
        """References that this row cannot fill."""
        return [_name(path) for path in self._references if path and not _has(item, path)]


def _parse(reference: str, param: str) -> tuple[str | int, ...] | None:
    """Keys and positions of a reference to the row; None for the response."""
    if reference == "sample.output_text":
        return None
    head, rest = reference[:4], reference[4:]
    steps = [match.group(1) or int(match.group(2)) for match in _STEP.finditer(rest)]
    if head != "item" or not steps or "".join(map(_written, steps)) != rest:
        raise InvalidConfig(
            f"the template cannot refer to {{{{{reference}}}}}; "
            "use {{sample.output_text}} or {{item.key}}",
            param=param,
        )
    return tuple(steps)


def _written(step: str | int) -> str:
    return f"[{step}]" if isinstance(step, int) else f".{step}"


def _name(path: tuple[str | int, ...]) -> str:
    return "item" + "".join(map(_written, path))


def _look_up(item: Mapping[str, Any], path: tuple[str | int, ...]) -> Any:
    """What stands in the row at this place."""
    value: Any = item
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise RewardFailed(
                f"the row has no {_name(path)}, which the reward's template reads",
                param="reward.input",
            ) from None
    return value


def _has(item: Mapping[str, Any], path: tuple[str | int, ...]) -> bool:
    try:
        _look_up(item, path)
    except RewardFailed:
        return False
    return True


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
