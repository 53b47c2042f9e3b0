"""`docs/api.md` keeps up with the code."""

import re
from pathlib import Path

from api import openapi
from api.app import create_app
from api.error_codes import ERROR_CODES
from api.settings import ApiSettings
from core.events import EventCode
from core.keys import SCOPES

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_event_code_is_told_once() -> None:
    told = re.findall(r"^\| `([a-z_.]+)` \|", section("Events"), re.MULTILINE)

    assert sorted(told) == sorted(code.value for code in EventCode)


def test_every_error_code_is_told_as_the_api_tells_it() -> None:
    told = [line for line in section("Errors").splitlines() if line.startswith("| `")]

    assert told == [
        f"| `{code}` | {about.status} | {about.title} | {about.remedy} |"
        for code, about in ERROR_CODES.items()
    ]


def test_every_route_is_told() -> None:
    settings = ApiSettings(
        database_url="postgresql://nobody:none@127.0.0.1:1/none",
        redis_url="redis://127.0.0.1:1/0",
    )
    document = openapi.document(create_app(settings))
    routes = {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
    }
    rows = re.findall(r"^\| ([A-Z, ]+) \| `([^`]+)` \|", section("Routes"), re.MULTILINE)
    told = {
        f"{method} {address.replace('J', '/v1/fine_tuning/jobs/{job_id}', 1)}"
        for methods, address in rows
        for method in methods.split(", ")
        if method != "HEAD"
    }

    assert told == routes | {"GET /v1/openapi.json"}


def test_every_scope_is_told() -> None:
    assert all(f"`{scope}`" in section("Keys") for scope in SCOPES)
