"""The roles of api and worker: log in, read and write rows, own nothing."""

import psycopg
from psycopg import sql
from pydantic import SecretStr

API_ROLE = "trimtab_api"
WORKER_ROLE = "trimtab_worker"

_SAFE = sql.SQL("nosuperuser nobypassrls nocreatedb nocreaterole noreplication")


def ensure_role(connection: psycopg.Connection, name: str, password: SecretStr | None) -> None:
    """The role exists; with a password it can log in with just that one.

    The server sees only the password's verifier, so no log of statements can hold the password.
    """
    known = connection.execute("select 1 from pg_roles where rolname = %s", [name]).fetchone()
    role = sql.Identifier(name)
    if known is None:
        connection.execute(sql.SQL("create role {} {}").format(role, _SAFE))
    if password is None:
        return
    verifier = connection.pgconn.encrypt_password(
        password.get_secret_value().encode(), name.encode(), b"scram-sha-256"
    )
    connection.execute(
        sql.SQL("alter role {} login password {}").format(role, sql.Literal(verifier.decode()))
    )
