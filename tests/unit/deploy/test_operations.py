"""The table of settings in docs/operations.md, held against the settings that there are."""

import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from core.settings import DatabaseSettings, ProcessSettings
from tests.unit.deploy import deployment
from tests.unit.deploy.deployment import MODULES, ROOT, SETTINGS

WITH_SETTINGS = {**SETTINGS, "keys": DatabaseSettings}
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
REQUIRED = {"DATABASE_URL": "postgresql://u:p@h/d", "REDIS_URL": "redis://u:p@h:1/0"}

each_process = pytest.mark.parametrize("process", sorted(WITH_SETTINGS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    name: str
    processes: frozenset[str]
    default: str
    is_secret: bool
    meaning: str


def rows() -> list[Row]:
    """All lines of the table, in order."""
    section = TEXT.split("\n## ")[1]
    lines = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+?) \| (yes|no) \| (.+) \|$", section, re.MULTILINE
    )
    assert len(lines) == section.count("\n| ") - 1
    return [
        Row(
            name=name,
            processes=frozenset(processes.split(", ")),
            default=default,
            is_secret=secret == "yes",
            meaning=meaning,
        )
        for name, processes, default, secret, meaning in lines
    ]


def settings_of(process: str) -> dict[str, FieldInfo]:
    """The settings of a process by the name of their variable."""
    fields = WITH_SETTINGS[process].model_fields.values()
    return {str(field.validation_alias): field for field in fields}


def defaults_of(process: str, environment: pytest.MonkeyPatch) -> dict[str, str]:
    """What each setting is when only what is required is given, as the table writes it."""
    for name in settings_of(process):
        environment.delenv(name, raising=False)
        environment.delenv(f"{name}_FILE", raising=False)
    for name, value in REQUIRED.items():
        environment.setenv(name, value)
    environment.setenv("TRIMTAB_HOME", "$TRIMTAB_HOME")
    built = WITH_SETTINGS[process].from_environment()
    return {
        str(field.validation_alias): _written(getattr(built, name))
        for name, field in type(built).model_fields.items()
        if not field.is_required()
    }


def _written(value: Any) -> str:
    """A value as the table shows it; what differs from machine to machine in capitals."""
    if isinstance(value, tuple):
        return f"[{', '.join(_quoted(part) for part in value)}]"
    if value is None:
        return "none"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).replace(f"{socket.gethostname()}-{os.getpid()}", "HOSTNAME-PID")


def _quoted(part: str) -> str:
    return '"PYTHON"' if part == sys.executable else f'"{part}"'


@each_process
def test_the_table_has_every_setting_of_each_process_and_no_other(process):
    documented = {row.name for row in rows() if process in row.processes}

    assert documented - {"XDG_STATE_HOME"} == set(settings_of(process))


def test_each_name_stands_in_one_line():
    names = [row.name for row in rows()]

    assert len(names) == len(set(names))


def test_each_process_of_the_table_is_explained():
    named = set().union(*(row.processes for row in rows()))

    assert named == {*WITH_SETTINGS, "cli"}
    for process, module in {**MODULES, "keys": "api.keys"}.items():
        assert re.search(rf"`{process}`\s\(`python -m {re.escape(module)}`\)", TEXT), process


@each_process
def test_the_table_knows_the_defaults(process, monkeypatch):
    documented = {row.name: row.default.strip("`") for row in rows() if process in row.processes}
    defaults = defaults_of(process, monkeypatch)
    del defaults["TRIMTAB_HOME"]

    assert {name: documented[name] for name in defaults} == defaults


def test_the_table_knows_the_home(monkeypatch):
    (row,) = [row for row in rows() if row.name == "TRIMTAB_HOME"]
    monkeypatch.delenv("TRIMTAB_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_STATE_HOME", "$XDG_STATE_HOME")

    chosen = ProcessSettings.from_environment().home
    monkeypatch.delenv("XDG_STATE_HOME")
    otherwise = str(ProcessSettings.from_environment().home).replace("/home/someone", "~")

    assert row.default == f"`{chosen}`, else `{otherwise}`"


@each_process
def test_the_table_says_what_is_required(process):
    required = {name for name, field in settings_of(process).items() if field.is_required()}

    named = {row.name for row in rows() if process in row.processes and row.default == "required"}

    assert named == required


@each_process
def test_the_table_says_what_is_secret(process):
    secret = {
        name
        for name, field in settings_of(process).items()
        if "SecretStr" in str(field.annotation) or field.annotation is SecretStr
    }

    named = {row.name for row in rows() if process in row.processes and row.is_secret}

    assert named == secret


def test_what_only_the_command_line_reads_is_read_there():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "trimtab").rglob("*.py")]

    for row in rows():
        if "cli" in row.processes:
            assert any(f'"{row.name}"' in source for source in sources), row.name


def test_the_page_says_that_no_container_has_run():
    assert "only been checked statically" in TEXT


def test_services_and_variables_of_the_page_exist():
    compose = deployment.compose()
    used = {one.name for one in deployment.references(deployment.compose_text())}
    known = {row.name for row in rows()} | used | {"PIP_INDEX_URL"}

    services = re.findall(r"docker compose (?:run|exec)(?: -\S+)* (\w+)", TEXT)
    variables = re.findall(r"\b(?:TRIMTAB|VALKEY|PIP)_[A-Z_]+\b", TEXT)

    assert services
    assert set(services) <= set(compose["services"])
    assert set(variables) <= known


def test_volumes_of_the_page_are_those_of_the_compose_file():
    section = next(part for part in TEXT.split("\n## ") if part.startswith("Where state lives"))

    assert set(re.findall(r"\(`(\w+)`\)", section)) == set(deployment.compose()["volumes"])
