"""`python -m api.keys`: make, list and revoke API keys, with the owner's DATABASE_URL.

No HTTP route makes keys.  `create` prints the secret once, alone on standard output.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import ProgrammingError

from core import keys
from core.db import Database
from core.errors import DatabaseUnavailable, DomainError
from core.keys import ApiKey
from core.settings import DatabaseSettings

EXIT_REFUSED = 1
EXIT_SETTINGS = 64
EXIT_UNAVAILABLE = 69


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; the exit status of the process."""
    options = _parser().parse_args(arguments)
    try:
        settings = DatabaseSettings.from_environment()
    except ValidationError as error:
        missing = ", ".join(str(one["loc"][0]) for one in error.errors())
        return _complain(f"missing or wrong settings: {missing}", EXIT_SETTINGS)
    try:
        with _transaction(settings) as tx:
            sys.stdout.writelines(f"{line}\n" for line in _run(options, tx))
    except DatabaseUnavailable as error:
        return _complain(error.message, EXIT_UNAVAILABLE)
    except DomainError as error:
        return _complain(error.message, EXIT_REFUSED)
    except ProgrammingError:
        return _complain("no tables, or not the owner's DATABASE_URL", EXIT_REFUSED)
    return 0


@contextmanager
def _transaction(settings: DatabaseSettings) -> Iterator[Connection]:
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    try:
        with database.begin() as tx:
            yield tx
    finally:
        database.dispose()


def _complain(message: str, status: int) -> int:
    sys.stderr.write(f"keys: {message}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api.keys", description=__doc__)
    verbs = parser.add_subparsers(dest="command", required=True)
    create = verbs.add_parser("create", help="make a key and print its secret")
    create.add_argument("--tenant", default=keys.LOCAL_TENANT, help="made when it is new")
    create.add_argument("--name", required=True, help="what the key is for")
    create.add_argument("--scope", action="append", choices=keys.SCOPES, help="default: all")
    create.add_argument("--expires-in-days", type=int, help="default: never")
    listing = verbs.add_parser("list", help="show keys, without their secrets")
    listing.add_argument("--tenant", help="only this one's")
    revoke = verbs.add_parser("revoke", help="end a key at once")
    revoke.add_argument("id", help="as `list` shows it")
    return parser


def _run(options: argparse.Namespace, tx: Connection) -> list[str]:
    match options.command:
        case "create":
            made = keys.create(
                tx,
                tenant=options.tenant,
                name=options.name,
                scopes=options.scope or keys.SCOPES,
                expires_at=_expiry(options.expires_in_days),
            )
            return [made.secret.get_secret_value()]
        case "list":
            return [_line(key) for key in keys.keys(tx, tenant=options.tenant)]
        case _:
            return [_line(keys.revoke(tx, options.id))]


def _expiry(days: int | None) -> datetime | None:
    return None if days is None else datetime.now(UTC) + timedelta(days=days)


def _line(key: ApiKey) -> str:
    state = "revoked" if key.revoked_at else "active"
    expires = key.expires_at.isoformat() if key.expires_at else "never"
    scopes = ",".join(key.scopes)
    return f"{key.public_id}\t{key.tenant_slug}\t{key.name}\t{state}\texpires {expires}\t{scopes}"


if __name__ == "__main__":
    sys.exit(main())
