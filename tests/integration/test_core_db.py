import psycopg
import pytest
from psycopg import sql
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from core import models
from core.db import Database, first_line, now
from core.errors import DatabaseUnavailable
from tests.factories import Tenant, make_job
from tests.fakes.waiting import wait_until


def test_a_block_that_raises_changes_nothing(database: Database, tenant: Tenant) -> None:
    def fail() -> None:
        with database.begin() as tx:
            make_job(tx, tenant)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    with database.begin() as tx:
        assert tx.execute(select(models.job)).all() == []


def test_times_are_aware_and_in_utc(database: Database) -> None:
    with database.begin() as tx:
        moment = tx.execute(select(now())).scalar_one()

    assert moment.utcoffset() is not None
    assert moment.utcoffset().total_seconds() == 0


def test_nobody_there_is_said_in_our_words() -> None:
    database = Database("postgresql://nobody:x@127.0.0.1:1/none")

    with pytest.raises(DatabaseUnavailable), database.begin():
        pass
    database.dispose()


def test_a_pool_in_use_is_said_in_our_words(api_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(api_url, pool_size=1)
    monkeypatch.setattr(database.engine.pool, "_timeout", 0.1)

    with database.begin(), pytest.raises(DatabaseUnavailable, match="busy"), database.begin():
        pass
    database.dispose()


def test_a_connection_that_was_cut_is_replaced(
    database: Database, owner_database: Database
) -> None:
    with database.begin() as tx:
        pid = tx.execute(text("select pg_backend_pid()")).scalar_one()
    with owner_database.begin() as tx:
        tx.execute(text("select pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    with database.begin() as tx:
        assert tx.execute(text("select pg_backend_pid()")).scalar_one() != pid


def test_a_connection_cut_inside_a_block_is_said_in_our_words(api_url: str, owner_url: str) -> None:
    database = Database(api_url, pool_size=1)

    def work_while_cut() -> None:
        with database.begin() as tx:
            pid = tx.execute(text("select pg_backend_pid()")).scalar_one()
            with psycopg.connect(owner_url) as owner:
                owner.execute(
                    sql.SQL("select pg_terminate_backend({}, 5000)").format(sql.Literal(pid))
                )
            tx.execute(text("select 1"))

    with pytest.raises(DatabaseUnavailable):
        work_while_cut()
    database.dispose()


def test_a_statement_has_a_time_limit(api_url: str) -> None:
    database = Database(api_url, statement_timeout_seconds=0.05)

    with pytest.raises(DBAPIError, match="statement timeout"), database.begin() as tx:
        tx.execute(text("select pg_sleep(5)"))
    database.dispose()


def test_a_transaction_that_is_left_idle_is_ended(api_url: str, database: Database) -> None:
    forgetful = Database(api_url, statement_timeout_seconds=0.1)

    def is_gone(pid: int) -> bool:
        with database.begin() as tx:
            found = tx.execute(
                text("select 1 from pg_stat_activity where pid = :pid"), {"pid": pid}
            )
            return found.first() is None

    def come_back_late() -> None:
        with forgetful.begin() as tx:
            pid = tx.execute(text("select pg_backend_pid()")).scalar_one()
            wait_until(lambda: is_gone(pid))
            tx.execute(text("select 1"))

    with pytest.raises(DatabaseUnavailable):
        come_back_late()
    forgetful.dispose()


def test_json_that_is_none_is_refused(database: Database, tenant: Tenant) -> None:
    with database.begin() as tx, pytest.raises(Exception, match="JSON compliant"):
        make_job(tx, tenant, warnings=[{"x": float("nan")}])


def test_the_words_of_an_error_hold_no_values(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught, database.begin() as tx:
        tx.execute(text("select 1 / (length(:said) - length(:said))"), {"said": "a secret"})

    assert "a secret" not in str(caught.value)
    assert first_line(caught.value) == "(psycopg.errors.DivisionByZero) division by zero"
