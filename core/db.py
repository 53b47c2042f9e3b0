"""The way to Postgres: one engine per process, one visible transaction per use case."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial

from sqlalchemy import Connection, create_engine, func
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.sql.functions import Function

from core.errors import DatabaseUnavailable


def driver_url(url: str) -> URL:
    """The same address for SQLAlchemy with psycopg 3."""
    return make_url(url).set(drivername="postgresql+psycopg")


def now() -> Function[datetime]:
    """The database's clock at the start of the transaction: the only clock that counts."""
    return func.now()


def first_line(error: Exception) -> str:
    """What a log may say of a database error: the server's words without the statement."""
    return str(error).partition("\n")[0]


class Database:
    """A pool of connections; build it in the process that uses it, after any fork."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 16,
        pool_timeout_seconds: float = 5,
        statement_timeout_seconds: float = 5,
    ) -> None:
        milliseconds = round(statement_timeout_seconds * 1000)
        self.engine = create_engine(
            driver_url(url),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=pool_timeout_seconds,
            pool_pre_ping=True,
            hide_parameters=True,
            json_serializer=partial(json.dumps, allow_nan=False),
            connect_args={
                "connect_timeout": 5,
                "application_name": "trimtab",
                "options": f"-c statement_timeout={milliseconds}"
                # Postgres ends the session of a process that was frozen within a transaction, or
                # cut off: it would keep its rows locked, and the reaper passes over locked rows.
                f" -c idle_in_transaction_session_timeout={milliseconds} -c timezone=UTC",
            },
        )
        self._reading = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One transaction: commits at the end of the block, rolls back when it raises.

        DatabaseUnavailable stands for a lost or refused connection and for an exhausted pool.
        """
        with _lost_is_unavailable(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading, or for a write that stands alone; errors as in `begin`.

        Each statement is a transaction by itself.  It sees what is committed when it starts, as it
        would in `begin`; only the journeys to and fro for a BEGIN and a COMMIT are spared.  Rows
        cannot be read bit by bit (`yield_per`): the server keeps a cursor within a transaction.
        """
        with _lost_is_unavailable(), self._reading.connect() as connection:
            yield connection

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()


@contextmanager
def _lost_is_unavailable() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise DatabaseUnavailable("all database connections are busy") from error
    except (OperationalError, InterfaceError, InternalError) as error:
        if _is_lost(error):
            raise DatabaseUnavailable from error
        raise


def _is_lost(error: OperationalError | InterfaceError | InternalError) -> bool:
    """Whether the connection is to blame rather than the statement.

    Connection failures carry no SQLSTATE, class 08, 57P0x (the server is going down) or 25P03 (the
    transaction was left idle for too long).
    """
    state = getattr(error.orig, "sqlstate", None)
    is_cut = state is None or state[:2] == "08" or state[:4] == "57P0" or state == "25P03"
    return error.connection_invalidated or is_cut
