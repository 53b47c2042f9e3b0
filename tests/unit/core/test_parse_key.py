import pytest

from core.errors import InvalidIdempotencyKey
from core.idempotency import parse_key


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (None, None),
        ("abc", "abc"),
        ('"abc"', "abc"),
        ("  abc ", "abc"),
        ('"', '"'),
        ("a" * 255, "a" * 255),
    ],
)
def test_a_key_is_quoted_or_bare(header: str | None, key: str | None) -> None:
    assert parse_key(header) == key


@pytest.mark.parametrize("header", ["", '""', "a b", "a" * 256, "é", "a\x7f", "a\n", "a\x00"])
def test_anything_else_is_refused(header: str) -> None:
    with pytest.raises(InvalidIdempotencyKey):
        parse_key(header if header != "a\n" else "a\nb")
