"""Limits that were reached, the checkpoint a job starts from, and what is known of checkpoints.

A checkpoint of before has no `adapter`: it is resumed from as ever, but not served or built upon.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UP = """
alter table job
    add column limit_reached text,
    add column budget_from jsonb default '{}'::jsonb not null,
    add column start_job_id uuid,
    add column start_step integer,
    add column start_attempt integer,
    add constraint ck_job_start check (
        num_nulls(start_job_id, start_step, start_attempt) in (0, 3)
    ),
    add constraint fk_job_start foreign key (start_job_id, start_step, start_attempt)
        references checkpoint (job_id, step, attempt);

alter table checkpoint
    add column score double precision,
    add column adapter jsonb;

grant update (limit_reached, budget_from) on job to trimtab_api;
grant update (limit_reached) on job to trimtab_worker;
"""

DOWN = """
alter table checkpoint drop column adapter, drop column score;
alter table job
    drop constraint fk_job_start,
    drop constraint ck_job_start,
    drop column start_attempt,
    drop column start_step,
    drop column start_job_id,
    drop column budget_from,
    drop column limit_reached;
"""


def upgrade() -> None:
    """Add the columns."""
    op.execute("set local lock_timeout = '5s'")
    op.execute(UP)


def downgrade() -> None:
    """Drop them."""
    op.execute("set local lock_timeout = '5s'")
    op.execute(DOWN)
