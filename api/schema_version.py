"""Whether the database has the tables that this code was written for."""

from enum import StrEnum

from sqlalchemy import Connection, inspect, text

from migrations.head import HEAD


class SchemaState(StrEnum):
    """How the database's schema stands to the code's."""

    CURRENT = "current"
    OUTDATED = "outdated"


def schema_state(tx: Connection) -> SchemaState:
    """Compares the database's revision with the newest one shipped."""
    if not inspect(tx).has_table("alembic_version"):
        return SchemaState.OUTDATED
    found = tx.execute(text("select version_num from alembic_version")).scalars().all()
    return SchemaState.CURRENT if list(found) == [HEAD] else SchemaState.OUTDATED
