"""Small parts: ranges, conditions, strict JSON, queries, thinning."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from api.conditions import matches, wait_seconds
from api.deps import bearer_key
from api.downloads import Span, parse_range
from api.errors import ApiError
from api.feed_stream import OpenStreams
from api.query import ClipQuery, JobsQuery, MetricsQuery, read_query
from api.strict_json import canonical_json, parse_json
from api.views import thin
from core.errors import InvalidApiKey
from core.feed import MetricPoint


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", Span(0, 1)),
        ("bytes=2-5", Span(2, 6)),
        ("bytes=2-", Span(2, 10)),
        ("bytes=2-99", Span(2, 10)),
        ("bytes=-3", Span(7, 10)),
        ("bytes=-99", Span(0, 10)),
        ("bytes = 1 - 2", Span(1, 3)),
        ("bytes=0-1,3-4", None),
        ("bytes=5-2", None),
        ("bytes=-", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes=١-٢", None),
    ],
)
def test_ranges_of_ten_bytes(header: str, span: Span | None) -> None:
    assert parse_range(header, 10) == span


@pytest.mark.parametrize(("header", "num_bytes"), [("bytes=10-", 10), ("bytes=-0", 10)])
def test_a_range_beyond_the_end_is_refused(header: str, num_bytes: int) -> None:
    with pytest.raises(ApiError, match="range_not_satisfiable") as caught:
        parse_range(header, num_bytes)

    assert caught.value.headers == {"Content-Range": "bytes */10"}


@pytest.mark.parametrize(
    ("header", "is_match"),
    [
        (None, False),
        ('"a"', True),
        ('W/"a"', True),
        ('"b", "a"', True),
        ("*", True),
        ('"b"', False),
    ],
)
def test_if_none_match(header: str | None, is_match: bool) -> None:  # noqa: FBT001  a test table
    assert matches(header, '"a"') is is_match


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("wait=5", 5), ("respond-async, wait=5", 5), ("WAIT=90", 60), ("waiting=5", 0), ("", 0)],
)
def test_prefer_wait(header: str, seconds: int) -> None:
    headers = [(b"prefer", header.encode())]

    assert wait_seconds(Request({"type": "http", "headers": headers})) == seconds


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", "Basic x", "x"])
def test_no_bearer_no_key(header: str | None) -> None:
    with pytest.raises(InvalidApiKey):
        bearer_key(header)


def test_the_scheme_has_any_case() -> None:
    assert bearer_key("bearer abc") == "abc"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(categories=["L"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(JSON)
def test_json_survives(value: Any) -> None:
    assert parse_json(canonical_json(value)) == value


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"a": 1, "b": {"d": 1, "c": 2}}) == canonical_json(
        {"b": {"c": 2, "d": 1}, "a": 1}
    )


@pytest.mark.parametrize("body", [b'"\\u0000"', b'{"a": ["\\ud800"]}', b'{"\\udfff": 1}'])
def test_text_that_the_database_cannot_hold_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="invalid_value"):
        parse_json(body)


def test_lists_come_in_three_spellings() -> None:
    repeated = read_query(JobsQuery, [("status", "queued"), ("status", "failed")])
    bracketed = read_query(JobsQuery, [("status[]", "queued"), ("status[]", "failed")])
    joined = read_query(JobsQuery, [("status", "queued,failed")])

    assert repeated.status == bracketed.status == joined.status == ["queued", "failed"]


def test_maps_come_in_brackets() -> None:
    query = read_query(JobsQuery, [("metadata[a]", "1"), ("metadata[b c]", "2")])

    assert query.metadata == {"a": "1", "b c": "2"}


def test_null_is_absent() -> None:
    query = read_query(JobsQuery, [("metadata", "null"), ("limit", "null"), ("after", "null")])

    assert (query.metadata, query.limit, query.after) == (None, 20, None)


@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([("limit", "5"), ("limit", "6")], "conflicting_parameters"),
        ([("max_points", "1")], "integer_below_min_value"),
        ([("from_step", "1.5")], "invalid_type"),
        ([("colour", "red")], "unknown_parameter"),
        ([("metadata[x]", "1")], "unknown_parameter"),
    ],
)
def test_faulty_queries(items: list[tuple[str, str]], code: str) -> None:
    model = MetricsQuery if items[0][0] == "max_points" else ClipQuery
    with pytest.raises(ApiError, match=code):
        read_query(model, items)


def point(step: int, value: float | None) -> MetricPoint:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=step)
    return MetricPoint(attempt=1, line=step, seq=step, step=step, at=at, values={"a": value})


@given(
    st.lists(st.floats(-100, 100) | st.none(), min_size=1, max_size=200),
    st.integers(2, 50),
)
def test_thinning_keeps_order_extremes_and_the_limit(
    values: list[float | None], max_points: int
) -> None:
    rows = [point(step, value) for step, value in enumerate(values)]

    kept = thin(rows, ["a"], max_points=max_points)

    assert len(kept) <= max_points
    assert [row.step for row in kept] == sorted({row.step for row in kept})
    known = [value for value in values if value is not None]
    if known:
        assert {min(known), max(known)} <= {row.values["a"] for row in kept}


def test_few_rows_are_not_thinned() -> None:
    rows = [point(step, None) for step in range(5)]

    assert thin(rows, ["a"], max_points=5) == rows


def test_streams_are_counted_per_tenant() -> None:
    streams = OpenStreams(limit=1)
    streams.enter(one := object())  # type: ignore[arg-type]
    streams.enter(object())  # type: ignore[arg-type]

    with pytest.raises(ApiError, match="too_many_streams"):
        streams.enter(one)  # type: ignore[arg-type]
    streams.leave(one)  # type: ignore[arg-type]
    streams.enter(one)  # type: ignore[arg-type]
