"""Shapes of the answers.  Times are unix seconds, durations float seconds, sizes bytes.

Only pydantic here: clients share these models without the server's packages.
"""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from core.states import JobStatus


class View(BaseModel):
    """An answer; its fields are frozen by a test."""

    model_config = ConfigDict(frozen=True)


class JobError(View):
    """Why a job failed."""

    code: str
    message: str
    param: str | None
    attempt: int


class Warning_(View):  # noqa: N801  the builtin has the plain name
    """Something worth a second look; the request was accepted."""

    code: str
    param: str | None
    message: str


class Progress(View):
    """How far a job is."""

    step: int
    total_steps: int
    fraction: float
    generated_tokens: int
    seconds_per_step: float | None = Field(description="Mean over the last steps of this attempt.")


class QueuePlace(View):
    """Where a queued job stands."""

    position: int = Field(description="1 is next.")


class Latest(View):
    """The last step's figures; null where the step has none."""

    step: int
    reward_mean: float | None
    kl_reference_per_sequence: float | None
    policy_clip_fraction: float | None
    entropy: float | None


class JobLimits(View):
    """What a job may use, and whether it has."""

    max_runtime_seconds: int | None
    max_generated_tokens: int | None
    on_limit: Literal["pause", "finish"]
    reached: str | None = Field(description="Which of the two was reached; null while none is.")


class JobHealth(View):
    """What the last diagnosis of a run found; `J/diagnosis` tells the rest."""

    level: Literal["ok", "warn", "critical", "unknown"]
    findings: list[str] = Field(description="Their codes.")


class Job(View):
    """A fine-tuning job: OpenAI's fields first, then ours."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str = Field(description="The base model.")
    fine_tuned_model: str | None
    organization_id: str
    status: JobStatus
    hyperparameters: dict[str, Any] = Field(description="Unused with `method`; always empty.")
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(description="Metrics as CSV, then the adapter as tar.")
    seed: int
    trained_tokens: int | None = Field(description="Response tokens; null until final.")
    estimated_finish: int | None
    integrations: list[Any] | None
    metadata: dict[str, str] | None
    method: dict[str, Any]
    error: JobError | None
    user_provided_suffix: str | None
    phase: str | None = Field(description="What the job is busy with inside its status.")
    started_at: int | None
    attempt: int
    worker: str | None
    resumed_from_step: int | None
    pause_requested_at: int | None
    cancel_requested_at: int | None
    progress: Progress
    queue: QueuePlace | None
    usage: dict[str, Any]
    limits: JobLimits | None
    start_checkpoint: str | None = Field(
        description="The checkpoint whose adapter it starts from, and is held to."
    )
    priority: int
    latest: Latest | None
    health: JobHealth
    resolved: dict[str, Any] = Field(description="Every hyperparameter with its final value.")
    warnings: list[Warning_]
    stream_cursor: str = Field(description="Id of the last frame of the stream.")
    links: dict[str, str]


class Event(View):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]
    code: str | None
    attempt: int
    seq: int
    step: int | None


class Checkpoint(View):
    """A stored state of the training."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]
    bytes: int
    sha256: str = Field(description="Digest of the checkpoint's manifest.")
    attempt: int
    best: bool
    score: float | None = Field(
        description="What the best is chosen by; null if it does not compete."
    )
    resumable: bool


class Definition(View):
    """What a metric means."""

    unit: str
    formula: str


class AttemptSpan(View):
    """An attempt and the step it went on from."""

    attempt: int
    resumed_from_step: int | None


class Metrics(View):
    """Curves in columns: `series[name][i]` belongs to `steps[i]`."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    job_id: str
    steps: list[int]
    series: dict[str, list[float | None]]
    definitions: dict[str, Definition]
    thinned: bool = Field(description="Whether steps were left out; minima and maxima stay.")
    nonfinite: dict[str, list[int]] = Field(description="Steps at which a value was not finite.")
    attempts: list[AttemptSpan]
    stream_cursor: str


class ManifestFile(View):
    """One file that a job left."""

    id: str
    path: str
    role: str
    bytes: int
    sha256: str
    media_type: str
    url: str


class AdapterLink(View):
    """The adapter as one tar."""

    url: str
    bytes: int
    sha256: str
    media_type: str


class BaseModelRef(View):
    """The model an adapter belongs to."""

    id: str
    sha256: str | None


class Manifest(View):
    """All files of a job, with their digests."""

    object: Literal["fine_tuning.job.artifacts"] = "fine_tuning.job.artifacts"
    schema_version: int = 1
    job_id: str
    checkpoint_id: str | None
    step: int
    base_model: BaseModelRef
    adapter: AdapterLink
    files: list[ManifestFile]


class FileValidation(View):
    """Outcome of the row checks."""

    state: Literal["passed", "failed", "not_checked"]
    rows: int | None
    error_count: int


class File(View):
    """An uploaded file, or a result of a job."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    sha256: str
    validation: FileValidation


class LineFault(View):
    """What is wrong with one line, or worth knowing about it."""

    line: int
    column: int | None
    pointer: str
    code: str
    message: str
    excerpt: str


class Report(View):
    """What the check of a file of prompts found."""

    object: Literal["file.validation"] = "file.validation"
    file_id: str
    valid: bool
    row_format: str
    rows: int
    error_count: int = Field(description="All bad lines; the first 1000 are in `errors`.")
    errors: list[LineFault]
    warnings: list[LineFault]
    stats: dict[str, Any]


class Deleted(View):
    """Something is gone."""

    id: str
    object: str
    deleted: bool = True


class Model(View):
    """A model that jobs can start from, or that a job made."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["base", "adapter"]
    base_model: str | None
    job_id: str | None
    context_length: int | None


Item = TypeVar("Item", bound=View)


class Page(View, Generic[Item]):
    """A page of a list; go on with `after=<last_id>` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FeedPage(Page[Item], Generic[Item]):
    """A page below a job."""

    stream_cursor: str


class Health(View):
    """Whether the process lives."""

    status: Literal["ok"] = "ok"


class Readiness(View):
    """Whether the process can serve, and what it leans on."""

    status: Literal["ready", "unavailable"]
    database: Literal["ok", "unavailable"]
    schema_: Literal["current", "outdated", "unknown"] = Field(serialization_alias="schema")
    redis: Literal["ok", "unavailable"] = Field(
        description="Without it jobs are accepted, and streams are slower."
    )


class ErrorMeaning(View):
    """What an error code means."""

    object: Literal["error_code"] = "error_code"
    code: str
    status: int
    title: str
    remedy: str
    retryable: bool


class Fault(View):
    """One thing that is wrong."""

    pointer: str
    line: int | None
    code: str
    detail: str


class OpenAiError(View):
    """The first fault as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(View):
    """Every error: RFC 9457's members and OpenAI's `error` in one object."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str | None
    errors: list[Fault]
    error: OpenAiError
