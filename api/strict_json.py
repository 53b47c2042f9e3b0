"""JSON as the API takes it: no duplicate keys, no NaN, no text that a database cannot hold."""

import json
import math
from collections.abc import Iterable
from typing import Any

from api.errors import ApiError


def parse_json(body: bytes) -> Any:
    """The value in a request body."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError("invalid_json", f"byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError("invalid_json", f"{error.msg} at {place}", line=error.lineno) from None
    except RecursionError:
        raise ApiError("invalid_json", "the value is nested too deep") from None
    except ValueError:  # Python refuses integers of thousands of digits
        raise ApiError("invalid_json", "a number has too many digits") from None
    check_texts(_texts(value))
    return value


def check_texts(texts: Iterable[str]) -> None:
    """Refuse text with NUL characters or lone surrogates: neither fits into the database."""
    for text in texts:
        if "\x00" in text:
            raise ApiError("invalid_value", "text must not hold NUL characters")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ApiError("invalid_value", "text must not hold lone surrogates")


def canonical_json(value: Any) -> bytes:
    """The same bytes for the same value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ApiError("invalid_json", f"the key {key!r} stands twice in one object")
        result[key] = value
    return result


def _constant(name: str) -> float:
    raise ApiError("invalid_json", f"{name} is not JSON; use null or a finite number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError("invalid_json", f"the number {text} is too large")
    return value


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
