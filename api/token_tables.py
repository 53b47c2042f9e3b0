"""Reading a token table: one gzipped line of JSON per token, searched in bounded memory."""

import gzip
import heapq
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from api.errors import ApiError
from core.errors import StoredFileCorrupt

MAX_PLAIN_BYTES = 64 << 20
"""A larger table is not searched."""

MAX_LINE_BYTES = 64 << 10
"""One token has a few hundred bytes."""

Token = dict[str, Any]
Key = tuple[bool, float, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOrder:
    """An order of tokens; those without the value come last, ties by row and position."""

    by: Literal["position", "ratio", "advantage"]
    is_descending: bool

    def key(self, token: Token) -> Key:
        """What to sort by."""
        sign = -1 if self.is_descending else 1
        row, position = token["row"], token["position"]
        if self.by == "position":
            return (False, 0.0, sign * row, sign * position)
        value = token[self.by]
        return (value is None, sign * (value or 0.0), row, position)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFilter:
    """Which tokens to take; None is all."""

    row: int | None
    classes: Sequence[str] | None

    def takes(self, token: Token) -> bool:
        """Whether the token is one of them."""
        is_row = self.row is None or token["row"] == self.row
        return is_row and (self.classes is None or token["class"] in self.classes)


class TokenTable:
    """The table behind `open_file`, which is opened for each walk over it."""

    def __init__(self, open_file: Callable[[], BinaryIO]) -> None:
        self._open = open_file

    def has_row(self, row: int) -> bool:
        """Whether a sample of this row is in the table."""
        return any(token["row"] == row for token in self._tokens())

    def find(self, row: int, position: int) -> Token | None:
        """The token of that row and position."""
        wanted = (row, position)
        return next((t for t in self._tokens() if (t["row"], t["position"]) == wanted), None)

    def page(
        self, where: TokenFilter, order: TokenOrder, *, after: Token | None, limit: int
    ) -> list[Token]:
        """The first tokens behind `after`."""
        start = None if after is None else order.key(after)
        chosen = (
            token
            for token in self._tokens()
            if where.takes(token) and (start is None or order.key(token) > start)
        )
        return heapq.nsmallest(limit, chosen, key=order.key)

    def _tokens(self) -> Iterator[Token]:
        """Every line; StoredFileCorrupt if one is none."""
        with self._open() as file, gzip.GzipFile(fileobj=file) as lines:
            left = MAX_PLAIN_BYTES
            try:
                while line := lines.readline(MAX_LINE_BYTES):
                    left -= len(line)
                    if left < 0:
                        raise _too_large()
                    yield _token(line)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise StoredFileCorrupt(f"a token table: {error}") from error


def _too_large() -> ApiError:
    detail = (
        f"The table unpacks to more than {MAX_PLAIN_BYTES >> 20} MB; download it as "
        "tokens/<step>.jsonl.gz from the job's artifacts."
    )
    return ApiError("token_table_too_large", detail)


def _token(line: bytes) -> Token:
    try:
        # The engine writes no NaN; a number that is none would be told as null.
        token: Token = json.loads(line, parse_constant=lambda _: None)
    except ValueError as error:
        raise StoredFileCorrupt(f"a token table holds a line that is no JSON: {error}") from error
    return token
