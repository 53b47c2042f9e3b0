"""The first tables, the rule of a job's states, and what each role may do.

Written out in SQL and importing nothing of ours: what the code means later changes nothing here.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
create table tenant (
    id uuid default uuidv7() not null,
    slug text not null,
    created_at timestamptz default now() not null,
    constraint pk_tenant primary key (id),
    constraint uq_tenant_slug unique (slug)
);

create table api_key (
    id uuid default uuidv7() not null,
    tenant_id uuid not null,
    public_id text not null,
    name text not null,
    secret_sha256 bytea not null,
    scopes text[] not null,
    created_at timestamptz default now() not null,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    constraint pk_api_key primary key (id),
    constraint fk_api_key_tenant_id foreign key (tenant_id) references tenant (id),
    constraint uq_api_key_public_id unique (public_id)
);

create table file (
    id uuid default uuidv7() not null,
    tenant_id uuid not null,
    created_by uuid not null,
    purpose text not null,
    filename text not null,
    bytes bigint not null,
    sha256 text not null,
    uri text not null,
    status text not null,
    rows integer,
    report jsonb,
    created_at timestamptz default now() not null,
    expires_at timestamptz,
    deleted_at timestamptz,
    constraint pk_file primary key (id),
    constraint ck_file_status check (status in ('uploaded', 'processed', 'error')),
    constraint fk_file_tenant_id foreign key (tenant_id) references tenant (id),
    constraint fk_file_created_by foreign key (created_by) references api_key (id)
);
create index ix_file_tenant_id_created_at_id on file (tenant_id, created_at, id);

create table idempotency (
    tenant_id uuid not null,
    key text not null,
    caller uuid not null,
    retry_count integer not null,
    method text not null,
    path text not null,
    query text not null,
    body_sha256 bytea not null,
    answer jsonb not null,
    created_at timestamptz default now() not null,
    constraint pk_idempotency primary key (tenant_id, key),
    constraint fk_idempotency_tenant_id foreign key (tenant_id) references tenant (id),
    constraint fk_idempotency_caller foreign key (caller) references api_key (id)
);
create index ix_idempotency_created_at on idempotency (created_at);
create index ix_idempotency_repeat on idempotency (caller, body_sha256, created_at desc);

create table job (
    id uuid default uuidv7() not null,
    tenant_id uuid not null,
    created_by uuid not null,
    spec jsonb not null,
    spec_version integer default 1 not null,
    resolved jsonb not null,
    warnings jsonb default '[]'::jsonb not null,
    model text not null,
    method text not null,
    training_file_id uuid not null,
    validation_file_id uuid,
    suffix text,
    seed integer not null,
    metadata jsonb,
    status text not null,
    phase text,
    queue text not null,
    priority integer default 0 not null,
    attempt integer default 0 not null,
    lease_until timestamptz,
    claim_key text,
    worker_label text,
    stop_wanted text,
    stop_wanted_at timestamptz,
    dispatched_at timestamptz,
    not_before timestamptz,
    step integer default 0 not null,
    total_steps integer not null,
    saved_step integer default 0 not null,
    crashes integer default 0 not null,
    crash_step integer default -1 not null,
    last_seq integer default 0 not null,
    usage jsonb default '{}'::jsonb not null,
    fine_tuned_model text,
    error_code text,
    error_message text,
    error_param text,
    created_at timestamptz default now() not null,
    started_at timestamptz,
    finished_at timestamptz,
    constraint pk_job primary key (id),
    constraint ck_job_status check (
        status in ('validating_files', 'queued', 'running', 'paused', 'succeeded',
        'failed', 'cancelled')
    ),
    constraint ck_job_lease check (
        case status when 'running' then lease_until is not null when 'validating_files'
        then true else lease_until is null end
    ),
    constraint ck_job_stop_wanted check (
        stop_wanted is null or stop_wanted in ('pause', 'cancel') and status in
        ('running', 'validating_files')
    ),
    constraint ck_job_finished check (
        (finished_at is not null) = (status in ('succeeded', 'failed', 'cancelled'))
    ),
    constraint fk_job_tenant_id foreign key (tenant_id) references tenant (id),
    constraint fk_job_created_by foreign key (created_by) references api_key (id),
    constraint fk_job_training_file_id foreign key (training_file_id) references file (id),
    constraint fk_job_validation_file_id foreign key (validation_file_id) references file (id)
);
create index ix_job_lease on job (lease_until) where lease_until is not null;
create index ix_job_queued on job (queue, priority desc, created_at) where status = 'queued';
create index ix_job_tenant on job (tenant_id, created_at desc, id desc);
create index ix_job_training_file on job (training_file_id);
create index ix_job_validating on job (created_at) where status = 'validating_files';
create index ix_job_validation_file on job (validation_file_id);

create table artifact (
    id uuid default uuidv7() not null,
    job_id uuid not null,
    tenant_id uuid not null,
    attempt integer not null,
    path text not null,
    role text not null,
    media_type text not null,
    uri text not null,
    sha256 text not null,
    bytes bigint not null,
    created_at timestamptz default now() not null,
    constraint pk_artifact primary key (id),
    constraint uq_artifact_job_id_path unique (job_id, path),
    constraint fk_artifact_job_id foreign key (job_id) references job (id),
    constraint fk_artifact_tenant_id foreign key (tenant_id) references tenant (id)
);

create table attempt (
    job_id uuid not null,
    attempt integer not null,
    tenant_id uuid not null,
    kind text not null,
    worker_label text not null,
    last_line integer default 0 not null,
    resumed_from_step integer,
    started_at timestamptz default now() not null,
    ended_at timestamptz,
    end_reason text,
    end_status text,
    exit_code integer,
    constraint pk_attempt primary key (job_id, attempt),
    constraint ck_attempt_kind check (kind in ('validate', 'train')),
    constraint fk_attempt_job_id foreign key (job_id) references job (id),
    constraint fk_attempt_tenant_id foreign key (tenant_id) references tenant (id)
);

create table checkpoint (
    job_id uuid not null,
    step integer not null,
    attempt integer not null,
    tenant_id uuid not null,
    uri text not null,
    manifest_sha256 text not null,
    bytes bigint not null,
    resumable boolean default true not null,
    best boolean default false not null,
    created_at timestamptz default now() not null,
    constraint pk_checkpoint primary key (job_id, step, attempt),
    constraint fk_checkpoint_job_id foreign key (job_id) references job (id),
    constraint fk_checkpoint_tenant_id foreign key (tenant_id) references tenant (id)
);

create table clip_pass (
    job_id uuid not null,
    attempt integer not null,
    line integer not null,
    epoch integer not null,
    minibatch integer not null,
    tenant_id uuid not null,
    step integer not null,
    values jsonb not null,
    histogram bytea not null,
    constraint pk_clip_pass primary key (job_id, attempt, line, epoch, minibatch),
    constraint fk_clip_pass_job_id foreign key (job_id) references job (id),
    constraint fk_clip_pass_tenant_id foreign key (tenant_id) references tenant (id)
);
create index ix_clip_pass_step on clip_pass (job_id, step, attempt desc);

create table job_event (
    job_id uuid not null,
    seq integer not null,
    tenant_id uuid not null,
    attempt integer not null,
    at timestamptz default now() not null,
    level text not null,
    code text not null,
    step integer,
    message text not null,
    data jsonb default '{}'::jsonb not null,
    constraint pk_job_event primary key (job_id, seq),
    constraint ck_job_event_level check (level in ('info', 'warn', 'error')),
    constraint fk_job_event_job_id foreign key (job_id) references job (id),
    constraint fk_job_event_tenant_id foreign key (tenant_id) references tenant (id)
);

create table metric (
    job_id uuid not null,
    attempt integer not null,
    line integer not null,
    tenant_id uuid not null,
    seq integer not null,
    step integer not null,
    at timestamptz not null,
    values jsonb not null,
    constraint pk_metric primary key (job_id, attempt, line),
    constraint uq_metric_job_id_seq unique (job_id, seq),
    constraint fk_metric_job_id foreign key (job_id) references job (id),
    constraint fk_metric_tenant_id foreign key (tenant_id) references tenant (id)
);
create index ix_metric_step on metric (job_id, step, attempt desc);
"""

STATES = """
create function job_state_rule() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        if new.status not in ('validating_files', 'queued') then
            raise exception 'a job cannot begin as %', new.status using errcode = '23514';
        end if;
        return new;
    end if;
    if old.status || ' ' || new.status not in (
        'validating_files queued',
        'validating_files paused',
        'validating_files failed',
        'validating_files cancelled',
        'queued running',
        'queued paused',
        'queued cancelled',
        'running succeeded',
        'running queued',
        'running paused',
        'running failed',
        'running cancelled',
        'paused queued',
        'paused cancelled'
    ) then
        raise exception 'a job cannot go from % to %', old.status, new.status
            using errcode = '23514';
    end if;
    return new;
end
$$;
create trigger job_begins before insert on job
    for each row execute function job_state_rule();
create trigger job_changes before update of status on job
    for each row when (old.status is distinct from new.status) execute function job_state_rule();
"""

GRANTS = """
grant usage on schema public to trimtab_api, trimtab_worker;

grant select on alembic_version to trimtab_api, trimtab_worker;
grant select on tenant, file, job, attempt, job_event, metric, clip_pass, checkpoint, artifact
    to trimtab_api, trimtab_worker;

grant select on api_key to trimtab_api;
grant update (last_used_at) on api_key to trimtab_api;
grant insert on file, job, job_event to trimtab_api;
grant update (deleted_at) on file to trimtab_api;
grant update (status, stop_wanted, stop_wanted_at, finished_at, dispatched_at, not_before,
    crashes, last_seq) on job to trimtab_api;
grant select, insert, delete on idempotency to trimtab_api;

grant update (status, phase, attempt, lease_until, claim_key, worker_label, stop_wanted,
    stop_wanted_at, dispatched_at, not_before, step, total_steps, saved_step, crashes, crash_step,
    last_seq, resolved, usage, fine_tuned_model, error_code, error_message, error_param,
    started_at, finished_at) on job to trimtab_worker;
grant insert on job_event, metric, clip_pass, attempt, checkpoint, artifact to trimtab_worker;
grant update (last_line, resumed_from_step, ended_at, end_reason, end_status, exit_code)
    on attempt to trimtab_worker;
grant update (resumable, best) on checkpoint to trimtab_worker;
grant update (attempt, path, role, media_type, uri, sha256, bytes) on artifact to trimtab_worker;
grant select (created_at), delete on idempotency to trimtab_worker;
"""


def upgrade() -> None:
    """Make everything."""
    op.execute("set local lock_timeout = '5s'")
    op.execute(TABLES)
    op.execute(STATES)
    op.execute(GRANTS)


def downgrade() -> None:
    """Remove everything."""
    op.execute("set local lock_timeout = '5s'")
    op.execute(
        "drop table idempotency, artifact, checkpoint, clip_pass, metric, job_event, attempt,"
        " job, file, api_key, tenant"
    )
    op.execute("drop function job_state_rule()")
    op.execute("revoke usage on schema public from trimtab_api, trimtab_worker")
