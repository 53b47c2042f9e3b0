"""What pydantic found wrong, in the API's words: a code, a pointer, and what to change."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic

from core.errors import Fault

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "greater_than": "{number}_below_min_value",
    "greater_than_equal": "{number}_below_min_value",
    "less_than": "{number}_above_max_value",
    "less_than_equal": "{number}_above_max_value",
    "string_too_short": "string_below_min_length",
    "string_too_long": "string_above_max_length",
    "too_short": "array_below_min_length",
    "too_long": "array_above_max_length",
    "enum": "invalid_value",
    "literal_error": "invalid_value",
    "string_pattern_mismatch": "invalid_value",
    "value_error": "invalid_value",
    "assertion_error": "invalid_value",
}
"""pydantic's kinds of fault; every other kind means a wrong type."""


def faults_of(error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> list[Fault]:
    """All faults of one validation, in the order of the fields."""
    names = list(model.model_fields)
    return [_fault(fault, names) for fault in error.errors(include_url=False)]


def unknown_parameter(name: str, known: Iterable[str], *, pointer: str) -> Fault:
    """The fault of a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return Fault(pointer, "unknown_parameter", f"{name!r} is not known here{hint}")


def _fault(fault: Mapping[str, Any], names: Sequence[str]) -> Fault:
    pointer = "".join(f"/{part}" for part in fault["loc"])
    # A place in a list has no name of its own.
    name = next((part for part in reversed(fault["loc"]) if isinstance(part, str)), "the value")
    if fault["type"] == "extra_forbidden":
        return unknown_parameter(name, names, pointer=pointer)
    if fault["type"] == "missing":
        return Fault(pointer, "missing_required_parameter", f"{name} is required")
    bound = next(iter(fault.get("ctx", {}).values()), None)
    number = "integer" if isinstance(bound, int) else "decimal"
    code = _CODES.get(fault["type"], "invalid_type").format(number=number)
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return Fault(pointer, code, f"{name}: {message}, got {_excerpt(fault.get('input'))}")


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
