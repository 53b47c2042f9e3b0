"""An index for counting unfinished jobs, which every scrape of `/metrics` does."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index."""
    op.execute("set local lock_timeout = '5s'")
    op.execute("create index ix_job_unfinished on job (status) where finished_at is null")


def downgrade() -> None:
    """Drop the index."""
    op.execute("set local lock_timeout = '5s'")
    op.execute("drop index ix_job_unfinished")
