"""Data rows of training and validation files: what a prompt is, and what is wrong with a line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ppo_engine.errors import InvalidTrainingFile

ROLES = ("developer", "system", "user", "assistant", "tool")
"""Roles a message may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: the conversation so far, and what else its row says."""

    messages: tuple[dict[str, Any], ...]
    """`{"role", "content"}` in order; the last one is not the assistant's."""
    item: dict[str, Any]
    """The row's other keys; templates reach them as `{{item.key}}`."""


class RowError(InvalidTrainingFile):
    """A data row is not a prompt."""

    def __init__(self, code: str, pointer: str, message: str) -> None:
        super().__init__(message)
        self.row_code = code
        self.pointer = pointer

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.row_code, self.pointer, self.message))


def parse_prompt(row: object) -> Prompt:
    """The prompt in a row: `{"messages": [...], ...}` or `{"prompt": "...", ...}`."""
    if not isinstance(row, dict):
        raise RowError("not_an_object", "", f"a row must be a JSON object, got {_kind(row)}")
    if "messages" in row:
        messages = _messages(row["messages"])
    elif "prompt" in row:
        messages = _user_message(row["prompt"])
    else:
        raise RowError("missing_messages", "/messages", 'a row needs "messages" or "prompt"')
    item = {key: value for key, value in row.items() if key not in ("messages", "prompt")}
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
        text = f"role must be one of {', '.join(ROLES)}, got {role!r}"
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
