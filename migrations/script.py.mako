"""${message}."""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Say what it makes."""
    op.execute("set local lock_timeout = '5s'")
    ${upgrades if upgrades else ""}


def downgrade() -> None:
    """Say what it takes back."""
    op.execute("set local lock_timeout = '5s'")
    ${downgrades if downgrades else ""}
