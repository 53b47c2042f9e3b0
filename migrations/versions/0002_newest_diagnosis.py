"""An index for the newest diagnosis of a job, which every view of a job shows."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index."""
    op.execute("set local lock_timeout = '5s'")
    op.execute(
        "create index ix_job_event_diagnosis on job_event (job_id, seq desc)"
        " where code = 'diagnosis.changed'"
    )


def downgrade() -> None:
    """Drop the index."""
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop index ix_job_event_diagnosis")
