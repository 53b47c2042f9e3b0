"""Lines of a JSON Lines file, read safely: bounded length, depth and size, real numbers and text.

The file is UTF-8, plain or gzipped; blank lines are skipped.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn, cast

from ppo_engine.errors import InvalidTrainingFile

MAX_LINE_BYTES = 1 << 20
"""Longer lines are not read."""
MAX_PLAIN_BYTES = 1 << 30
"""A gzipped file may unpack to this much."""
MAX_NESTING = 64
"""Objects and lists inside each other."""
EXCERPT_CHARACTERS = 80
"""Length of the quotations in messages and reports."""

_GZIP_MAGIC = b"\x1f\x8b"
_NESTING_MESSAGE = f"objects and lists are nested more than {MAX_NESTING} deep"


class RowError(InvalidTrainingFile):
    """A data row cannot be used."""

    def __init__(self, code: str, pointer: str, message: str, *, column: int | None = None) -> None:
        super().__init__(message)
        self.row_code = code
        self.pointer = pointer
        self.column = column

    def __reduce__(self) -> tuple[object, ...]:
        return (_row_error, (self.row_code, self.pointer, self.message, self.column))


def _row_error(code: str, pointer: str, message: str, column: int | None) -> RowError:
    """The error again, on the other side of a pickle."""
    return RowError(code, pointer, message, column=column)


def shortened(value: object) -> str:
    """The value as Python writes it, cut to a readable length."""
    text = ascii(value)
    return text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}..."


class Line:
    """One line that is not blank."""

    def __init__(self, number: int, content: bytes) -> None:
        self.number = number
        self._content = content

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing on it."""
        return not self._is_too_long and not self._content.strip()

    @property
    def _is_too_long(self) -> bool:
        return len(self._content) > MAX_LINE_BYTES

    def row(self) -> Any:
        """The JSON value in it."""
        if self._is_too_long:
            message = f"the line is longer than {MAX_LINE_BYTES} bytes"
            raise RowError("line_too_long", "", message)
        row = _parse_json(self.text())
        _check_values(row)
        return row

    def text(self) -> str:
        """The line as text."""
        try:
            return self._content.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"byte {error.start + 1} of the line is not UTF-8"
            raise RowError("not_utf8", "", message, column=error.start + 1) from None

    def excerpt(self, column: int | None) -> str:
        """A piece of the line that shows the column, fit for any reader."""
        start = max(0, (column or 1) - 1 - EXCERPT_CHARACTERS // 2)
        text = self._content[: MAX_LINE_BYTES + 1].decode("utf-8", errors="replace")
        return printable(text[start : start + EXCERPT_CHARACTERS])


def printable(text: str) -> str:
    """The text with control characters, and halves of surrogate pairs, replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """Lines that are not blank; of those too long only the beginning."""
    number = size = 0
    plain = _plain(stream)
    try:
        while content := plain.readline(MAX_LINE_BYTES + len(b"\r\n")):
            number += 1
            line = Line(number, content.rstrip(b"\r\n"))
            size += len(content) + _skip_rest_of_line(plain, content)
            if size > MAX_PLAIN_BYTES:
                raise RowError(
                    "file_too_large", "", f"the file unpacks to more than {MAX_PLAIN_BYTES} bytes"
                )
            if not line.is_blank:
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RowError("invalid_gzip", "", f"the file cannot be unpacked: {error}") from error


def _plain(stream: BinaryIO) -> BinaryIO:
    """The plain bytes of a file that may be gzipped, from its beginning."""
    stream.seek(0)
    is_gzip = stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    stream.seek(0)
    return cast("BinaryIO", gzip.GzipFile(fileobj=stream, mode="rb")) if is_gzip else stream


def _skip_rest_of_line(stream: BinaryIO, content: bytes) -> int:
    """Bytes between the piece of a line that was read and the line's end."""
    skipped = 0
    while content and not content.endswith(b"\n") and skipped <= MAX_PLAIN_BYTES:
        content = stream.readline(MAX_LINE_BYTES)
        skipped += len(content)
    return skipped


def _parse_json(text: str) -> Any:
    """The value in a line; NaN, infinities and endless nesting are faults."""
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise RowError("invalid_json", "", f"not JSON: {error.msg}", column=error.colno) from None
    except RecursionError:
        raise RowError("nesting_too_deep", "", _NESTING_MESSAGE) from None
    except ValueError:  # of int(): thousands of digits
        raise RowError("invalid_json", "", "an integer has too many digits") from None


def _refuse_number(name: str) -> NoReturn:
    raise RowError("nonfinite_number", "", f"{name} is no JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RowError("nonfinite_number", "", f"{shortened(text)} is too large for a number")
    return number


def _check_values(row: Any) -> None:
    """Refuse nesting that is too deep, and text that is no text."""
    pending = [(row, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str) and not _is_text(value):
            message = f"{shortened(value)} holds half of a surrogate pair, which is no character"
            raise RowError("invalid_json", "", message)
        if not isinstance(value, dict | list):
            continue
        if depth > MAX_NESTING:
            raise RowError("nesting_too_deep", "", _NESTING_MESSAGE)
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        pending += [(each, depth + 1) for each in inner]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
