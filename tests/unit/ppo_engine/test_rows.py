"""Prompt files: what a prompt is, every code a bad line can get, and files that mean harm."""

import gzip
import io
import json
import pickle
from typing import Any

import pytest

from ppo_engine.errors import InvalidTrainingFile
from ppo_engine.json_lines import MAX_LINE_BYTES, MAX_NESTING
from ppo_engine.rows import (
    RowError,
    RowReport,
    check_prompt_file,
    parse_prompt,
    read_prompts,
)

USER = {"role": "user", "content": "Hello"}


def checked(*lines: bytes | dict[str, Any]) -> RowReport:
    """The report on these lines."""
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    return check_prompt_file(io.BytesIO(b"\n".join(encoded)))


def test_a_prompt_is_one_user_message() -> None:
    prompt = parse_prompt({"prompt": "Hello", "answer": 42})

    assert prompt.messages == (USER,)
    assert prompt.item == {"answer": 42}


def test_a_conversation_is_kept_with_the_rows_other_keys() -> None:
    system = {"role": "system", "content": "Be brief."}

    prompt = parse_prompt({"messages": [system, USER], "prompt": "other", "tag": "a"})

    assert prompt.messages == (system, USER)
    assert prompt.item == {"prompt": "other", "tag": "a"}


BAD_ROWS: tuple[tuple[Any, str, str], ...] = (
    ([1], "not_an_object", ""),
    ("text", "not_an_object", ""),
    (None, "not_an_object", ""),
    ({"question": "?"}, "missing_messages", "/messages"),
    ({"messages": "Hello"}, "missing_messages", "/messages"),
    ({"messages": []}, "empty_prompt", "/messages"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "empty_prompt", "/messages"),
    ({"prompt": ""}, "empty_prompt", "/prompt"),
    ({"prompt": ["Hello"]}, "unsupported_content", "/prompt"),
    ({"messages": ["Hello"]}, "unsupported_content", "/messages/0"),
    ({"messages": [USER, {"role": "user"}]}, "unsupported_content", "/messages/1/content"),
    (
        {"messages": [{**USER, "content": [{"type": "text"}]}]},
        "unsupported_content",
        "/messages/0/content",
    ),
    ({"messages": [{**USER, "role": "boss"}]}, "invalid_role", "/messages/0/role"),
    ({"messages": [{"content": "Hello"}]}, "invalid_role", "/messages/0/role"),
    ({"messages": [{**USER, "role": ["user"]}]}, "invalid_role", "/messages/0/role"),
    (
        {"messages": [USER, {**USER, "role": "assistant"}]},
        "last_message_is_assistant",
        "/messages/1/role",
    ),
)


@pytest.mark.parametrize(("row", "code", "pointer"), BAD_ROWS)
def test_a_bad_row_gets_its_code(row: Any, code: str, pointer: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_prompt(row)

    assert (caught.value.row_code, caught.value.pointer) == (code, pointer)


BAD_LINES: tuple[tuple[bytes, str, int | None], ...] = (
    (b'{"prompt": "a"', "invalid_json", 15),
    (b"{'prompt': 'a'}", "invalid_json", 2),
    (b'{"prompt": "a"} {"prompt": "b"}', "invalid_json", 17),
    (b'{"prompt": "\\ud800"}', "invalid_json", None),
    (b'{"prompt": "a", "\\udfff": 1}', "invalid_json", None),
    (b'{"prompt": "a", "n": ' + b"7" * 5000 + b"}", "invalid_json", None),
    (b'{"prompt": "caf\xe9"}', "not_utf8", 16),
    (b'{"prompt": "a", "n": NaN}', "nonfinite_number", None),
    (b'{"prompt": "a", "n": -Infinity}', "nonfinite_number", None),
    (b'{"prompt": "a", "n": 1e999}', "nonfinite_number", None),
    (
        b'{"prompt": "a", "n": ' + b"[" * MAX_NESTING + b"]" * MAX_NESTING + b"}",
        "nesting_too_deep",
        None,
    ),
    (b"[" * 200_000 + b"]" * 200_000, "nesting_too_deep", None),
    (b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}', "line_too_long", None),
    (b" " * (MAX_LINE_BYTES + 1), "line_too_long", None),
)


@pytest.mark.parametrize(("line", "code", "column"), BAD_LINES)
def test_a_bad_line_gets_its_code(line: bytes, code: str, column: int | None) -> None:
    report = checked({"prompt": "before"}, line, {"prompt": "after"})

    (error,) = report.errors
    assert (error.code, error.line, error.column) == (code, 2, column)
    assert not report.valid
    assert report.rows == 3


def test_all_bad_lines_are_listed_with_number_and_reason() -> None:
    report = checked(USER, {"prompt": "fine"}, b"", b"oops", {"prompt": ""}, {"prompt": "too"})

    assert [(error.line, error.code) for error in report.errors] == [
        (1, "missing_messages"),
        (4, "invalid_json"),
        (5, "empty_prompt"),
    ]
    assert all(error.message for error in report.errors)
    assert (report.rows, report.error_count, report.valid) == (5, 3, False)


def test_a_good_file_is_described() -> None:
    report = checked(
        {"prompt": "a" * 10, "tag": 1},
        {"messages": [USER, {"role": "assistant", "content": "Hi"}, USER]},
        {"prompt": "b" * 30, "tag": 2},
    )

    assert report.valid
    assert report.row_format == "prompts"
    assert report.stats == {
        "prompt_chars": {"p50": 12, "p95": 30, "max": 30},
        "prompt_tokens": None,
        "duplicates": 0,
        "keys": {"prompt": 2, "tag": 2, "messages": 1},
        "overlap": None,
    }


def test_the_same_prompt_twice_is_a_warning() -> None:
    report = checked({"prompt": "Hello"}, {"prompt": "Hi"}, {"messages": [USER], "tag": 1})

    (warning,) = report.warnings
    assert (warning.line, warning.code) == (3, "duplicate_row")
    assert "line 1" in warning.message
    assert report.valid
    assert report.stats["duplicates"] == 1


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n"])
def test_a_file_without_rows_is_not_valid(content: bytes) -> None:
    report = check_prompt_file(io.BytesIO(content))

    assert not report.valid
    assert [error.code for error in report.errors] == ["empty_file"]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine() -> None:
    content = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt":\r"b"}\n'

    report = check_prompt_file(io.BytesIO(content))

    assert report.valid
    assert report.rows == 2
    assert [number for number, _ in read_prompts(io.BytesIO(content))] == [1, 3]


def test_a_long_line_hides_nothing_after_it() -> None:
    exact = b'{"prompt": "' + b"a" * (MAX_LINE_BYTES - 14) + b'"}'
    assert len(exact) == MAX_LINE_BYTES

    report = checked(exact, b"x" * 5 * MAX_LINE_BYTES, b"[]")

    assert [(error.line, error.code) for error in report.errors] == [
        (2, "line_too_long"),
        (3, "not_an_object"),
    ]


def test_a_gzipped_file_is_read() -> None:
    packed = gzip.compress(b'{"prompt": "a"}\n[]\n')

    report = check_prompt_file(io.BytesIO(packed))

    assert report.rows == 2
    assert [(error.line, error.code) for error in report.errors] == [(2, "not_an_object")]


@pytest.mark.parametrize("cut", [2, 12, -4])
def test_a_broken_gzip_is_a_fault(cut: int) -> None:
    packed = gzip.compress(b'{"prompt": "a"}\n' * 100)

    report = check_prompt_file(io.BytesIO(packed[:cut]))

    assert not report.valid
    assert report.errors[-1].code == "invalid_gzip"


def test_a_gzip_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_engine.json_lines.MAX_PLAIN_BYTES", 100_000)
    many = gzip.compress(b'{"prompt": "a"}\n' * 10_000)
    one = gzip.compress(b"a" * 8 * MAX_LINE_BYTES)

    for packed in (many, one):
        assert check_prompt_file(io.BytesIO(packed)).errors[-1].code == "file_too_large"


def test_kept_faults_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_engine.rows.MAX_FAULTS", 3)

    report = checked(*[b"[]"] * 10)

    assert len(report.errors) == 3
    assert report.error_count == 10


def test_a_report_is_plain_json_whatever_the_file_holds() -> None:
    nasty = b'{"prompt": "a\x00", "\\u0000": 1}'

    report = checked(nasty, b'{"prompt": "a", "\\u0000\\n": 1}', b"\xff\x00", {"prompt": "\u202e"})

    assert all(text.isprintable() for text in texts(report.to_dict()))
    assert json.loads(json.dumps(report.to_dict()))["errors"][0]["line"] == 1


def texts(value: Any) -> list[str]:
    """Every string in a report, keys included."""
    if isinstance(value, dict):
        return [*value, *(text for inner in value.values() for text in texts(inner))]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in texts(inner)]
    return [value] if isinstance(value, str) else []


def test_nesting_up_to_the_limit_is_fine() -> None:
    inner = MAX_NESTING - 1

    report = checked(b'{"prompt": "a", "n": ' + b"[" * inner + b"]" * inner + b"}")

    assert report.valid


def test_places_are_exact() -> None:
    packed = gzip.compress(b'{"prompt": "a"}\n' * 3)

    (utf8,) = checked({"prompt": "a"}, b'{"prompt": "caf\xe9"}').errors
    (broken,) = check_prompt_file(io.BytesIO(packed[:-4])).errors

    assert "byte 16 of" in utf8.message
    assert broken.line == 4


def test_the_middle_length_is_not_exceeded_by_half_of_the_rows() -> None:
    report = checked({"prompt": "a"}, {"prompt": "abc"})

    assert report.stats["prompt_chars"] == {"p50": 1, "p95": 3, "max": 3}


def test_what_a_report_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAX_KEYS", 2), ("MAX_COMPARED_ROWS", 1), ("MAX_FAULTS", 1)):
        monkeypatch.setattr(f"ppo_engine.rows.{name}", limit)
    first, second = {"prompt": "a", "b": 1, "c": 2}, {"prompt": "other"}

    report = checked(first, second, second, first, first)

    assert report.stats["keys"] == {"prompt": 5, "b": 3}
    assert report.stats["duplicates"] == 2
    assert [warning.line for warning in report.warnings] == [4]


def test_the_excerpt_shows_the_place() -> None:
    report = checked(b'{"prompt": "' + b"a" * 5000 + b'" oops')

    (error,) = report.errors
    assert error.excerpt.endswith('" oops')
    assert len(error.excerpt) <= 80


def test_the_engine_reads_what_the_check_accepts() -> None:
    content = b'{"prompt": "a", "k": 1}\n\n{"messages": [{"role": "user", "content": "b"}]}'

    prompts = dict(read_prompts(io.BytesIO(content)))

    assert list(prompts) == [1, 3]
    assert prompts[1].item == {"k": 1}


def test_the_engine_names_the_first_bad_line() -> None:
    with pytest.raises(InvalidTrainingFile, match="line 2: not JSON") as caught:
        list(read_prompts(io.BytesIO(b'{"prompt": "a"}\noops\n')))

    assert caught.value.param == "training_file"
    assert caught.value.exit_code == 65


def test_a_row_error_survives_pickling() -> None:
    error = RowError("invalid_role", "/messages/0/role", "bad", column=3)

    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes

    assert (again.row_code, again.pointer, again.message, again.column) == (
        "invalid_role",
        "/messages/0/role",
        "bad",
        3,
    )
