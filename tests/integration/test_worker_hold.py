"""The hold on a job, against a real Postgres."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, text
from structlog.testing import capture_logs

from core import attempts
from core.attempts import NewArtifact
from core.db import Database
from core.events import Report
from tests.fakes.bench import Bench
from worker.hold import Hold


@pytest.fixture
def hold(bench: Bench) -> Iterator[Hold]:
    """A held job whose statements may take a tenth of a second."""
    job = bench.make_job(steps=1)
    with bench.parts() as parts:
        database = Database(bench.worker_url, statement_timeout_seconds=0.1)
        with database.begin() as tx:
            claim = attempts.claim(
                tx,
                job.id,
                task_id="task",
                worker_label="bench",
                ttl=attempts.FIRST_BACKOFF,
            )
        assert claim is not None
        yield Hold(claim, database, parts.stream, parts.settings, is_told_to_go=lambda: False)
        database.dispose()


def test_the_log_of_a_write_that_waits_has_no_statement(hold: Hold) -> None:
    tries = []

    def slow_at_first(tx: Connection) -> str:
        tries.append(1)
        seconds = 10 if len(tries) == 1 else 0
        return str(tx.execute(text("select pg_sleep(:s)"), {"s": seconds}).scalar_one())

    with capture_logs() as lines:
        hold.write(slow_at_first)

    assert [line["event"] for line in lines] == ["database.no_answer"]
    assert "statement timeout" in lines[0]["error"]
    assert "pg_sleep" not in lines[0]["error"]


def test_the_log_of_a_heartbeat_that_fails_has_no_statement(bench: Bench, hold: Hold) -> None:
    sample = NewArtifact(
        path="samples/1.jsonl.gz", role="sample", media_type="", uri="x", sha256="0" * 64, bytes=1
    )

    with bench.locked("artifact"), capture_logs() as lines:
        assert not hold.tell(Report(), [sample])

    assert [line["event"] for line in lines] == ["database.no_answer"]
    assert "\n" not in lines[0]["error"]
    assert "insert" not in lines[0]["error"].lower()
