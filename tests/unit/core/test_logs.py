import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from core import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_one_event_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()

    structlog.get_logger().info("job.claimed", job_id="x\ny", attempt=1)
    logging.getLogger("other").warning("from a library: %s", "z\r\n")
    structlog.get_logger().debug("too quiet")

    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["event"], first["job_id"], first["attempt"]) == ("job.claimed", "x\ny", 1)
    assert (second["event"], second["level"]) == ("from a library: z\r\n", "warning")
    assert first["timestamp"].endswith("Z")


def test_context_rides_along_until_it_is_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()

    with structlog.contextvars.bound_contextvars(request_id="req_1"):
        structlog.get_logger().info("inside")
    structlog.get_logger().info("outside")

    inside, outside = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert inside["request_id"] == "req_1"
    assert "request_id" not in outside


def test_people_can_have_words_instead(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format="console")

    structlog.get_logger().info("job.claimed", attempt=1)

    assert "job.claimed" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_local_variables(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    logs.configure(log_format=log_format)
    password = "hunter-2"
    try:
        {}[len(password)]
    except KeyError:
        structlog.get_logger().exception("it.broke")

    said = capsys.readouterr().err
    assert "KeyError" in said
    assert password not in said


def test_an_exception_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    try:
        {}["lost"]
    except KeyError:
        structlog.get_logger().exception("it.broke")

    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError" in json.loads(line)["exception"]
