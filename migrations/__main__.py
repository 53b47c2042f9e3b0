"""`python -m migrations [upgrade|downgrade REVISION]`, with the owner's DATABASE_URL."""

import argparse
import sys
from collections.abc import Sequence

import psycopg
import structlog
from alembic.util import CommandError
from pydantic import Field, SecretStr, ValidationError
from sqlalchemy.exc import DBAPIError

from core import logs
from core.settings import DatabaseSettings
from migrations import commands

log = structlog.get_logger()


class MigrationSettings(DatabaseSettings):
    """The owner's address, and the passwords that the other roles shall have."""

    api_password: SecretStr | None = Field(None, validation_alias="TRIMTAB_API_PASSWORD")
    """Of `trimtab_api`; unset leaves it as it is."""
    worker_password: SecretStr | None = Field(None, validation_alias="TRIMTAB_WORKER_PASSWORD")
    """Of `trimtab_worker`; unset leaves it as it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Migrate; 0 when the database is where it was asked to be."""
    options = _parser().parse_args(arguments)
    try:
        settings = MigrationSettings.from_environment()
    except ValidationError as error:
        missing = ", ".join(str(one["loc"][0]) for one in error.errors())
        sys.stderr.write(f"migrations: missing or wrong settings: {missing}\n")
        return 64
    logs.configure(log_format=settings.log_format)
    try:
        revision = _run(options, settings)
    except (DBAPIError, psycopg.Error, CommandError, commands.MigrationError) as error:
        reason = getattr(error, "orig", None) or error
        log.error("migrations.failed", reason=str(reason).strip())  # noqa: TRY400 - no stack
        return 69
    log.info("migrations.done", revision=revision)
    return 0


def _run(options: argparse.Namespace, settings: MigrationSettings) -> str | None:
    url = settings.database_url.get_secret_value()
    if options.command == "downgrade":
        return commands.downgrade(url, revision=options.revision)
    return commands.upgrade(
        url,
        revision=options.revision,
        api_password=settings.api_password,
        worker_password=settings.worker_password,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m migrations", description=__doc__)
    parser.set_defaults(command="upgrade", revision="head")
    verbs = parser.add_subparsers(dest="command")
    upgrade = verbs.add_parser("upgrade", help="apply what is missing (default)")
    upgrade.add_argument("revision", nargs="?", default="head")
    downgrade = verbs.add_parser("downgrade", help="take back as far as REVISION")
    downgrade.add_argument("revision")
    return parser


if __name__ == "__main__":
    sys.exit(main())
