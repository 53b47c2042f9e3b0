"""What `python -m migrations` does, callable: bring a database to a revision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psycopg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from core.db import driver_url
from migrations.roles import API_ROLE, WORKER_ROLE, ensure_role

OLDEST_SERVER = 18
"""The first Postgres that has all we use, such as `uuidv7()`."""

_LOCK = 7_265_128_001
"""Advisory lock that lets one migrator work at a time, in the whole cluster: roles are shared."""


class MigrationError(Exception):
    """The database cannot be brought to the revision asked for."""


def upgrade(
    owner_url: str,
    *,
    revision: str = "head",
    api_password: SecretStr | None = None,
    worker_password: SecretStr | None = None,
) -> str | None:
    """Make the roles and apply every missing migration; the revision reached."""
    with _alone(owner_url) as connection:
        driver = _driver(connection)
        ensure_role(driver, API_ROLE, api_password)
        ensure_role(driver, WORKER_ROLE, worker_password)
        connection.commit()
        command.upgrade(_config(connection), revision)
        return _current(connection)


def downgrade(owner_url: str, *, revision: str) -> str | None:
    """Take migrations back as far as `revision` (`base`: all); the revision reached."""
    with _alone(owner_url) as connection:
        command.downgrade(_config(connection), revision)
        return _current(connection)


@contextmanager
def _alone(url: str) -> Iterator[Connection]:
    """A connection whose session holds the migrators' lock."""
    engine = create_engine(driver_url(url), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            _check_server(_driver(connection))
            connection.execute(text("select pg_advisory_lock(:lock)"), {"lock": _LOCK})
            connection.commit()
            yield connection
    finally:
        engine.dispose()


def _driver(connection: Connection) -> psycopg.Connection:
    return cast(psycopg.Connection, connection.connection.driver_connection)


def _check_server(driver: psycopg.Connection) -> None:
    major = driver.info.server_version // 10_000
    if major < OLDEST_SERVER:
        raise MigrationError(f"Postgres {OLDEST_SERVER} or newer is needed, this is {major}")


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
