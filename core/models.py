"""The tables.  Migrations create them; a test finds no difference between the two."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _key() -> Column[object]:
    return Column("id", Uuid, primary_key=True, server_default=text("uuidv7()"))


def _tenant() -> Column[object]:
    return Column("tenant_id", Uuid, ForeignKey("tenant.id"), nullable=False)


def _job() -> Column[object]:
    return Column("job_id", Uuid, ForeignKey("job.id"), primary_key=True)


def _moment(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True))


def _now(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _count(name: str, start: int = 0) -> Column[object]:
    return Column(name, Integer, nullable=False, server_default=text(str(start)))


def _json(name: str, empty: str) -> Column[object]:
    return Column(name, JSONB, nullable=False, server_default=text(f"'{empty}'::jsonb"))


tenant = Table(
    "tenant",
    metadata,
    _key(),
    Column("slug", Text, nullable=False, unique=True),
    _now("created_at"),
)

api_key = Table(
    "api_key",
    metadata,
    _key(),
    _tenant(),
    Column("public_id", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    _now("created_at"),
    _moment("expires_at"),
    _moment("revoked_at"),
    _moment("last_used_at"),
)

file = Table(
    "file",
    metadata,
    _key(),
    _tenant(),
    Column("created_by", Uuid, ForeignKey("api_key.id"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("uri", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("rows", Integer),
    Column("report", JSONB(none_as_null=True)),
    _now("created_at"),
    _moment("expires_at"),
    _moment("deleted_at"),
    CheckConstraint("status in ('uploaded', 'processed', 'error')", name="status"),
    Index(None, "tenant_id", "created_at", "id"),
)

job = Table(
    "job",
    metadata,
    _key(),
    _tenant(),
    Column("created_by", Uuid, ForeignKey("api_key.id"), nullable=False),
    Column("spec", JSONB, nullable=False),
    _count("spec_version", 1),
    Column("resolved", JSONB, nullable=False),
    _json("warnings", "[]"),
    Column("model", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("training_file_id", Uuid, ForeignKey("file.id"), nullable=False),
    Column("validation_file_id", Uuid, ForeignKey("file.id")),
    Column("suffix", Text),
    Column("seed", Integer, nullable=False),
    Column("metadata", JSONB(none_as_null=True)),
    Column("status", Text, nullable=False),
    Column("phase", Text),
    Column("queue", Text, nullable=False),
    _count("priority"),
    _count("attempt"),
    _moment("lease_until"),
    Column("claim_key", Text),
    Column("worker_label", Text),
    Column("stop_wanted", Text),
    _moment("stop_wanted_at"),
    _moment("dispatched_at"),
    _moment("not_before"),
    _count("step"),
    Column("total_steps", Integer, nullable=False),
    _count("saved_step"),
    _count("crashes"),
    _count("crash_step", -1),
    _count("last_seq"),
    _json("usage", "{}"),
    Column("fine_tuned_model", Text),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("error_param", Text),
    Column("limit_reached", Text),
    _json("budget_from", "{}"),
    Column("start_job_id", Uuid),
    Column("start_step", Integer),
    Column("start_attempt", Integer),
    _now("created_at"),
    _moment("started_at"),
    _moment("finished_at"),
    CheckConstraint(
        "status in ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed',"
        " 'cancelled')",
        name="status",
    ),
    CheckConstraint(
        "case status when 'running' then lease_until is not null"
        " when 'validating_files' then true else lease_until is null end",
        name="lease",
    ),
    CheckConstraint(
        "stop_wanted is null or stop_wanted in ('pause', 'cancel')"
        " and status in ('running', 'validating_files')",
        name="stop_wanted",
    ),
    CheckConstraint(
        "(finished_at is not null) = (status in ('succeeded', 'failed', 'cancelled'))",
        name="finished",
    ),
    CheckConstraint("num_nulls(start_job_id, start_step, start_attempt) in (0, 3)", name="start"),
    ForeignKeyConstraint(
        ["start_job_id", "start_step", "start_attempt"],
        ["checkpoint.job_id", "checkpoint.step", "checkpoint.attempt"],
        name="fk_job_start",
        use_alter=True,  # checkpoints point at their job
    ),
    Index("ix_job_tenant", "tenant_id", text("created_at desc"), text("id desc")),
    Index(
        "ix_job_queued",
        "queue",
        text("priority desc"),
        "created_at",
        postgresql_where=text("status = 'queued'"),
    ),
    Index(
        "ix_job_validating",
        "created_at",
        postgresql_where=text("status = 'validating_files'"),
    ),
    Index("ix_job_lease", "lease_until", postgresql_where=text("lease_until is not null")),
    Index("ix_job_unfinished", "status", postgresql_where=text("finished_at is null")),
    Index("ix_job_training_file", "training_file_id"),
    Index("ix_job_validation_file", "validation_file_id"),
)

attempt = Table(
    "attempt",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True),
    _tenant(),
    Column("kind", Text, nullable=False),
    Column("worker_label", Text, nullable=False),
    _count("last_line"),
    Column("resumed_from_step", Integer),
    _now("started_at"),
    _moment("ended_at"),
    Column("end_reason", Text),
    Column("end_status", Text),
    Column("exit_code", Integer),
    CheckConstraint("kind in ('validate', 'train')", name="kind"),
)

job_event = Table(
    "job_event",
    metadata,
    _job(),
    Column("seq", Integer, primary_key=True),
    _tenant(),
    Column("attempt", Integer, nullable=False),
    _now("at"),
    Column("level", Text, nullable=False),
    Column("code", Text, nullable=False),
    Column("step", Integer),
    Column("message", Text, nullable=False),
    _json("data", "{}"),
    CheckConstraint("level in ('info', 'warn', 'error')", name="level"),
    Index(
        "ix_job_event_diagnosis",
        "job_id",
        text("seq desc"),
        postgresql_where=text("code = 'diagnosis.changed'"),
    ),
)

metric = Table(
    "metric",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True),
    Column("line", Integer, primary_key=True),
    _tenant(),
    Column("seq", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("values", JSONB, nullable=False),
    UniqueConstraint("job_id", "seq"),
    Index("ix_metric_step", "job_id", "step", text("attempt desc")),
)

clip_pass = Table(
    "clip_pass",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("minibatch", Integer, primary_key=True),
    _tenant(),
    Column("step", Integer, nullable=False),
    Column("values", JSONB, nullable=False),
    Column("histogram", LargeBinary, nullable=False),
    Index("ix_clip_pass_step", "job_id", "step", text("attempt desc")),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    _job(),
    Column("step", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    _tenant(),
    Column("uri", Text, nullable=False),
    Column("manifest_sha256", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("resumable", Boolean, nullable=False, server_default=text("true")),
    Column("best", Boolean, nullable=False, server_default=text("false")),
    Column("score", Double),
    Column("adapter", JSONB(none_as_null=True)),
    _now("created_at"),
)

artifact = Table(
    "artifact",
    metadata,
    _key(),
    Column("job_id", Uuid, ForeignKey("job.id"), nullable=False),
    _tenant(),
    Column("attempt", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("media_type", Text, nullable=False),
    Column("uri", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    _now("created_at"),
    UniqueConstraint("job_id", "path"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", Uuid, ForeignKey("tenant.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("caller", Uuid, ForeignKey("api_key.id"), nullable=False),
    Column("retry_count", Integer, nullable=False),
    Column("method", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("query", Text, nullable=False),
    Column("body_sha256", LargeBinary, nullable=False),
    Column("answer", JSONB, nullable=False),
    _now("created_at"),
    Index("ix_idempotency_repeat", "caller", "body_sha256", text("created_at desc")),
    Index(None, "created_at"),
)
