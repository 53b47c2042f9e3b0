"""The deployment files as the tests read them, and the processes that they start."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from api.settings import ApiSettings
from core.settings import ProcessSettings
from migrations.__main__ import MigrationSettings
from worker.settings import DispatcherSettings, WorkerSettings

ROOT = Path(__file__).parents[3]

SETTINGS: Mapping[str, type[ProcessSettings]] = {
    "api": ApiSettings,
    "worker": WorkerSettings,
    "dispatcher": DispatcherSettings,
    "migrations": MigrationSettings,
}
"""The settings class of each process of the service."""

MODULES = {
    "api": "api",
    "worker": "worker",
    "dispatcher": "worker.dispatcher",
    "migrations": "migrations",
}
"""What `python -m` starts for it."""

_REFERENCE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::(?P<kind>[?-])(?P<text>[^}]*))?\}")


class Missing(Exception):
    """A required variable is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A variable that the compose file reads from its surroundings."""

    name: str
    is_required: bool
    default: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """A line of a Dockerfile, continuation lines joined."""

    word: str
    rest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A build stage and where it comes from."""

    name: str
    parent: str
    instructions: tuple[Instruction, ...]


def compose_text() -> str:
    return (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def compose() -> dict[str, Any]:
    return yaml.safe_load(compose_text())


def references(text: str) -> list[Reference]:
    """Every `${...}`, in order."""
    return [
        Reference(
            name=match["name"],
            is_required=match["kind"] == "?" and bool(match["text"]),
            default=match["text"] if match["kind"] == "-" else None,
        )
        for match in _REFERENCE.finditer(text)
        if match["name"]
    ]


def interpolated(value: Any, environment: Mapping[str, str]) -> Any:
    """A part of the compose file as Compose would run it."""
    if isinstance(value, dict):
        return {key: interpolated(inner, environment) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolated(inner, environment) for inner in value]
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: _substitute(match, environment), value)
    return value


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile by name."""
    found: dict[str, Stage] = {}
    name, parent, inside = "", "", []
    for instruction in _instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if instruction.word == "FROM":
            parent, _, name = instruction.rest.partition(" AS ")
            inside = []
        else:
            inside.append(instruction)
        found[name] = Stage(name=name, parent=parent, instructions=tuple(inside))
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those that it is built upon, oldest first."""
    known = stages()
    line: list[Stage] = []
    while name in known:
        line.insert(0, known[name])
        name = known[name].parent
    return line


def values(name: str, word: str) -> list[str]:
    """What all instructions of a kind say in a stage and those that it is built upon."""
    return [one.rest for stage in lineage(name) for one in stage.instructions if one.word == word]


def image_environment(name: str) -> dict[str, str]:
    """The variables that an image sets."""
    pairs = (pair for rest in values(name, "ENV") for pair in rest.split())
    return dict(pair.split("=", 1) for pair in pairs)


def command_of(target: str) -> list[str]:
    return json.loads(values(target, "CMD")[-1])


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the tree out of the build; the last match decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        kept = pattern.startswith("!")
        if _matches(path, pattern.removeprefix("!")):
            verdict = not kept
    return verdict


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern names the path or a folder above it."""
    parts = path.split("/")
    if pattern.startswith("**/"):
        return any(fnmatch(part, pattern.removeprefix("**/")) for part in parts)
    depth = pattern.count("/") + 1
    return fnmatch("/".join(parts[:depth]), pattern)


def _substitute(match: re.Match[str], environment: Mapping[str, str]) -> str:
    if match[0] == "$$":
        return "$"
    value = environment.get(match["name"], "")
    if value or match["kind"] is None:
        return value
    if match["kind"] == "?":
        raise Missing(match["name"])
    return match["text"]


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [
        Instruction(word=line.split(maxsplit=1)[0], rest=line.split(maxsplit=1)[1])
        for line in joined.splitlines()
    ]
