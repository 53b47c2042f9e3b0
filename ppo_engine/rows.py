"""Data rows of training and validation files: what a prompt is, and what is wrong with a line."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from ppo_engine.errors import InvalidTrainingFile
from ppo_engine.json_lines import (
    EXCERPT_CHARACTERS,
    Line,
    RowError,
    printable,
    read_lines,
    shortened,
)

ROLES = ("developer", "system", "user", "assistant", "tool")
"""Roles a message may have."""
MAX_FAULTS = 100_000
"""Faults, and warnings, that a report keeps; it counts all of them."""
MAX_COMPARED_ROWS = 250_000
"""Different rows among which duplicates are found."""
MAX_KEYS = 100
"""Names of row keys that a report counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: the conversation so far, and what else its row says."""

    messages: tuple[dict[str, Any], ...]
    """`{"role", "content"}` in order; the last one is not the assistant's."""
    item: dict[str, Any]
    """The row's other keys; templates reach them as `{{item.key}}`."""


def parse_prompt(row: object) -> Prompt:
    """The prompt in a row: `{"messages": [...], ...}` or `{"prompt": "...", ...}`."""
    if not isinstance(row, dict):
        raise RowError("not_an_object", "", f"a row must be a JSON object, got {_kind(row)}")
    if "messages" in row:
        key, messages = "messages", _messages(row["messages"])
    elif "prompt" in row:
        key, messages = "prompt", _user_message(row["prompt"])
    else:
        raise RowError("missing_messages", "/messages", 'a row needs "messages" or "prompt"')
    item = {name: value for name, value in row.items() if name != key}
    return Prompt(messages=messages, item=item)


def _user_message(prompt: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(prompt, str):
        message = f'"prompt" must be a string, got {_kind(prompt)}'
        raise RowError("unsupported_content", "/prompt", message)
    if not prompt.strip():
        raise RowError("empty_prompt", "/prompt", '"prompt" holds no text')
    return ({"role": "user", "content": prompt},)


def _messages(messages: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list):
        message = f'"messages" must be a list of messages, got {_kind(messages)}'
        raise RowError("missing_messages", "/messages", message)
    if not messages:
        raise RowError("empty_prompt", "/messages", '"messages" holds no message')
    checked = tuple(_message(message, f"/messages/{i}") for i, message in enumerate(messages))
    if checked[-1]["role"] == "assistant":
        raise RowError(
            "last_message_is_assistant",
            f"/messages/{len(checked) - 1}/role",
            "the last message is the assistant's; a prompt ends where the assistant is to answer",
        )
    if not any(message["content"].strip() for message in checked):
        raise RowError("empty_prompt", "/messages", "no message holds any text")
    return checked


def _message(message: object, pointer: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        text = f'a message must be an object with "role" and "content", got {_kind(message)}'
        raise RowError("unsupported_content", pointer, text)
    role = message.get("role")
    if role not in ROLES:
        text = f"role must be one of {', '.join(ROLES)}, got {shortened(role)}"
        raise RowError("invalid_role", f"{pointer}/role", text)
    content = message.get("content")
    if not isinstance(content, str):
        text = f"content must be a string, got {_kind(content)}"
        raise RowError("unsupported_content", f"{pointer}/content", text)
    return {"role": role, "content": content}


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFault:
    """What is wrong with one line, or worth knowing about it."""

    line: int
    """From 1."""
    column: int | None
    """Place in the line, from 1, where it is known: a character, or a byte if it is no UTF-8."""
    pointer: str
    """JSON pointer into the row; empty for the whole row."""
    code: str
    """Stable name."""
    message: str
    """What is wrong and what to change."""
    excerpt: str
    """Some of the line around the fault, control characters replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReport:
    """Everything that is wrong with a file of prompts."""

    valid: bool
    """True if a job can use it."""
    row_format: str
    """`prompts`."""
    rows: int
    """Lines that are not blank."""
    error_count: int
    """Bad lines, all of them."""
    errors: tuple[RowFault, ...]
    """The first fault of every bad line, up to `MAX_FAULTS`."""
    warnings: tuple[RowFault, ...]
    """What does not stop a job."""
    stats: dict[str, Any]
    """Lengths, duplicates, and how many rows have which key."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def read_prompts(stream: BinaryIO) -> Iterator[tuple[int, Prompt]]:
    """Line number and prompt of every row; `InvalidTrainingFile` at the first bad line."""
    for line in read_lines(stream):
        try:
            prompt = parse_prompt(line.row())
        except RowError as error:
            message = f"line {line.number}: {error.message}"
            raise InvalidTrainingFile(message, param="training_file") from error
        yield line.number, prompt


def check_prompt_file(stream: BinaryIO) -> RowReport:
    """What is wrong with a file, all bad lines included; memory does not grow with its lines."""
    check = _Check()
    try:
        for line in read_lines(stream):
            check.take(line)
    except RowError as error:
        check.fail(check.last_line + 1, error, excerpt="")
    return check.report()


class _Check:
    """Collects what the report will say."""

    def __init__(self) -> None:
        self.last_line = 0
        self._rows = 0
        self._error_count = 0
        self._errors: list[RowFault] = []
        self._warnings: list[RowFault] = []
        self._lengths: Counter[int] = Counter()
        self._keys: Counter[str] = Counter()
        self._first_lines: dict[int, int] = {}
        self._duplicates = 0

    def take(self, line: Line) -> None:
        """Look at one line."""
        self._rows += 1
        self.last_line = line.number
        try:
            row = line.row()
            prompt = parse_prompt(row)
        except RowError as error:
            self.fail(line.number, error, excerpt=line.excerpt(error.column))
            return
        self._lengths[sum(len(message["content"]) for message in prompt.messages)] += 1
        self._count_keys(row)
        self._compare(line, prompt)

    def fail(self, number: int, error: RowError, *, excerpt: str) -> None:
        """Note a bad line."""
        self._error_count += 1
        if len(self._errors) < MAX_FAULTS:
            self._errors.append(_fault(number, error, excerpt))

    def report(self) -> RowReport:
        """What was found."""
        if not self._rows and not self._error_count:
            self.fail(1, RowError("empty_file", "", "the file holds no rows"), excerpt="")
        return RowReport(
            valid=not self._error_count,
            row_format="prompts",
            rows=self._rows,
            error_count=self._error_count,
            errors=tuple(self._errors),
            warnings=tuple(self._warnings),
            stats={
                "prompt_chars": _percentiles(self._lengths),
                "prompt_tokens": None,
                "duplicates": self._duplicates,
                "keys": dict(self._keys),
                "overlap": None,
            },
        )

    def _count_keys(self, row: Mapping[str, Any]) -> None:
        for key in map(_key_name, row):
            if key in self._keys or len(self._keys) < MAX_KEYS:
                self._keys[key] += 1

    def _compare(self, line: Line, prompt: Prompt) -> None:
        """Warn where the same conversation stood before."""
        fingerprint = hash(tuple((m["role"], m["content"]) for m in prompt.messages))
        first = self._first_lines.get(fingerprint)
        if first is None:
            if len(self._first_lines) < MAX_COMPARED_ROWS:
                self._first_lines[fingerprint] = line.number
            return
        self._duplicates += 1
        if len(self._warnings) < MAX_FAULTS:
            warning = RowError("duplicate_row", "", f"the same prompt stands on line {first}")
            self._warnings.append(_fault(line.number, warning, line.excerpt(None)))


def _key_name(key: str) -> str:
    return printable(key[:EXCERPT_CHARACTERS])


def _fault(number: int, error: RowError, excerpt: str) -> RowFault:
    return RowFault(
        line=number,
        column=error.column,
        pointer=error.pointer,
        code=error.row_code,
        message=error.message,
        excerpt=excerpt,
    )


def _percentiles(lengths: Counter[int]) -> dict[str, int | None]:
    """The middle, 95th and largest length; None without any."""
    return {
        "p50": _percentile(lengths, 0.5),
        "p95": _percentile(lengths, 0.95),
        "max": max(lengths, default=None),
    }


def _percentile(lengths: Counter[int], share: float) -> int | None:
    """The smallest length that this share of the rows does not exceed."""
    missing = share * lengths.total()
    for length in sorted(lengths):
        missing -= lengths[length]
        if missing <= 0:
            return length
    return None
