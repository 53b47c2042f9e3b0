"""Fine-tuning jobs: create, list, look up, cancel, pause, resume."""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from sqlalchemy import Connection
from starlette.responses import Response

from api import schemas
from api.conditions import etag_of, tagged, wait_seconds
from api.deps import Api, JobsReader, JobsWriter, JsonObject, Nothing, Services
from api.errors import ApiError
from api.idempotency import Answer, identify, once
from api.openapi import body_of, errors_of, query_parameters
from api.paging import next_link, page
from api.queries import facts_of
from api.query import JobsQuery, query_of
from api.views import job_view
from core import files, jobs, starts
from core.errors import (
    DomainError,
    Fault,
    InvalidTrainingFile,
    InvalidValidationFile,
)
from core.ids import file_id_of, job_id_of
from core.keys import Caller
from core.rows import Job
from core.spec import JobSpec, notices, parse_spec, resolve
from core.states import FINAL, JobStatus
from ppo_engine.errors import InvalidConfig
from ppo_engine.graders.catalog import build_grader
from ppo_engine.guards import GuardRule

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"])

MAX_LINES_SHOWN = 1000
"""Faulty lines repeated in the answer to a job; the file's report has all."""

SEED_BITS = 31
POLL_SECONDS = 0.25
RETRY_AFTER = {JobStatus.RUNNING: "2", JobStatus.QUEUED: "5", JobStatus.VALIDATING_FILES: "2"}


@router.post(
    "",
    response_model=schemas.Job,
    responses=errors_of(400, 409, 413, 415, 422),
    openapi_extra=body_of("JobSpec"),
)
def create_job(
    request: Request, caller: JobsWriter, services: Api, query: Nothing, payload: JsonObject
) -> Response:
    """Store the job; the commit itself rings the dispatcher."""
    del query
    identity = identify(request, caller, payload)
    spec = parse_spec(payload)
    check_reward(spec)
    check_guards(spec)

    with services.database.begin() as tx:
        answer = once(tx, identity, lambda: _store_job(tx, services, caller, spec))
    response = _json(answer)
    response.headers["Location"] = _location(answer)
    return response


def check_reward(spec: JobSpec) -> None:
    """Refuse what only building the reward can tell: a bad pattern, a bad template."""
    try:
        build_grader(spec.reward)
    except InvalidConfig as error:
        param = f"method.ppo.{error.param or 'reward'}"
        raise ApiError("invalid_grader", error.message, param=param) from None


def check_guards(spec: JobSpec) -> None:
    """Refuse rules over metrics that do not exist, or that no pass has."""
    for index, rule in enumerate(spec.ppo.guards.rules):
        try:
            GuardRule(**rule.model_dump())
        except InvalidConfig as error:
            param = f"method.ppo.hyperparameters.guards.rules.{index}"
            raise ApiError("invalid_value", error.message, param=param) from None


def _store_job(tx: Connection, services: Services, caller: Caller, spec: JobSpec) -> schemas.Job:
    start = starts.find(tx, spec.model, tenant_id=caller.tenant_id)
    model = services.catalog.find(spec.model if start is None else start.model)
    with _bad_lines_of(tx, caller, spec.training_file):
        training = files.lock_for_job(
            tx, spec.training_file, tenant_id=caller.tenant_id, param="training_file"
        )
    validation = None
    if spec.validation_file is not None:
        with _bad_lines_of(tx, caller, spec.validation_file):
            validation = files.lock_for_job(
                tx, spec.validation_file, tenant_id=caller.tenant_id, param="validation_file"
            )
    resolved = resolve(
        spec,
        prompts=training.rows or 0,
        seed=secrets.randbits(SEED_BITS),
        context_length=model.context_length,
        start_lora=None if start is None else start.lora,
    )
    job = jobs.create(
        tx,
        jobs.NewJob(
            tenant_id=caller.tenant_id,
            created_by=caller.key_id,
            spec=spec.stored(),
            resolved=resolved.to_dict(),
            model=model.id,
            training_file_id=training.id,
            validation_file_id=None if validation is None else validation.id,
            suffix=spec.suffix,
            metadata=spec.metadata,
            start=None if start is None else start.checkpoint,
            priority=spec.priority,
            warnings=[asdict(notice) for notice in notices(spec)],
        ),
    )
    return _view(tx, job, caller)


@contextmanager
def _bad_lines_of(tx: Connection, caller: Caller, public_id: str) -> Iterator[None]:
    """Adds the faulty lines to the refusal of a file."""
    try:
        yield
    except (InvalidTrainingFile, InvalidValidationFile) as error:
        found = files.get(tx, file_id_of(public_id), tenant_id=caller.tenant_id)
        faults = [
            Fault(f"/{error.param}", error.code, _line_detail(line), line["line"])
            for line in (found.report or {}).get("errors", [])[:MAX_LINES_SHOWN]
        ]
        raise _with_faults(error, faults) from None


def _with_faults(error: DomainError, faults: list[Fault]) -> DomainError:
    return type(error)(error.message, param=error.param, faults=faults)


def _line_detail(line: dict[str, Any]) -> str:
    return f"line {line['line']}: {line['code']}: {line['message']}"


@router.get(
    "",
    response_model=schemas.Page[schemas.Job],
    responses=errors_of(400),
    openapi_extra=query_parameters(JobsQuery),
)
def list_jobs(
    request: Request,
    caller: JobsReader,
    services: Api,
    query: Annotated[JobsQuery, Depends(query_of(JobsQuery))],
) -> Response:
    """Jobs by creation time, newest first."""
    with services.database.read() as tx:
        found = jobs.page(
            tx,
            tenant_id=caller.tenant_id,
            limit=query.limit,
            after=None if query.after is None else cursor_of(query.after),
            order=query.order,
            where=jobs.JobFilter(
                status=query.status or (),
                model=query.model,
                method=query.method,
                metadata=query.metadata or {},
                has_no_metadata=request.query_params.get("metadata") == "null",
                created_after=_moment(query.created_after),
                created_before=_moment(query.created_before),
            ),
        )
        facts = facts_of(tx, found.jobs)
    views = [
        job_view(job, each, organization=caller.tenant_slug)
        for job, each in zip(found.jobs, facts, strict=True)
    ]
    view = schemas.Page[schemas.Job](**page(views, has_more=found.has_more))
    return tagged(request, view, next_link(request, view))


def cursor_of(after: str) -> Any:
    """The job that `after` names."""
    try:
        return job_id_of(after)
    except DomainError:
        raise ApiError("invalid_cursor", f"after: {after!r} is no job id", param="after") from None


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


@router.get("/{job_id}", response_model=schemas.Job, responses=errors_of(404))
def get_job(
    request: Request, job_id: str, caller: JobsReader, services: Api, query: Nothing
) -> Response:
    """The job; `Prefer: wait=N` holds the answer until something changed."""
    del query
    view = _read(services, caller, job_id)
    seconds = wait_seconds(request)
    applied = {}
    if seconds and view.status not in FINAL and services.waiting.acquire(blocking=False):
        try:
            view = _wait(request, services, caller, view, seconds)
        finally:
            services.waiting.release()
        applied = {"Preference-Applied": f"wait={seconds}"}
    return tagged(request, view, {**applied, **_retry_after(view)})


def _wait(
    request: Request, services: Services, caller: Caller, view: schemas.Job, seconds: int
) -> schemas.Job:
    """The job once it differs from what the client has, or as it is when time is up."""
    known = request.headers.get("if-none-match")
    before = view.status
    for _ in range(round(seconds / POLL_SECONDS)):
        is_news = view.status != before if known is None else _etag(view) not in known
        if is_news or services.stopping.wait(POLL_SECONDS):
            break
        view = _read(services, caller, view.id)
    return view


def _etag(view: schemas.Job) -> str:
    return etag_of(view.model_dump_json().encode())


def _retry_after(view: schemas.Job) -> dict[str, str]:
    seconds = RETRY_AFTER.get(view.status)
    return {} if seconds is None else {"Retry-After": seconds}


def _read(services: Services, caller: Caller, public_id: str) -> schemas.Job:
    with services.database.read() as tx:
        return _view(tx, find_job(tx, public_id, caller), caller)


def find_job(tx: Connection, public_id: str, caller: Caller) -> Job:
    """The caller's job; JobNotFound for another tenant's as for none."""
    return jobs.get(tx, job_id_of(public_id), tenant_id=caller.tenant_id)


def _view(tx: Connection, job: Job, caller: Caller) -> schemas.Job:
    (facts,) = facts_of(tx, [job])
    return job_view(job, facts, organization=caller.tenant_slug)


@router.post(
    "/{job_id}/cancel", response_model=schemas.Job, responses=errors_of(404, 409, 412, 422)
)
def cancel_job(
    request: Request, job_id: str, caller: JobsWriter, services: Api, query: Nothing
) -> Response:
    """Stop the job: at once if it waits, at the next step if it runs."""
    del query
    return _changed(request, job_id, caller, services, jobs.cancel)


@router.post("/{job_id}/pause", response_model=schemas.Job, responses=errors_of(404, 409, 412, 422))
def pause_job(
    request: Request, job_id: str, caller: JobsWriter, services: Api, query: Nothing
) -> Response:
    """Let the job rest: at once if it waits, with a checkpoint at the next step if it runs."""
    del query
    return _changed(request, job_id, caller, services, jobs.pause)


@router.post(
    "/{job_id}/resume", response_model=schemas.Job, responses=errors_of(404, 409, 412, 422)
)
def resume_job(
    request: Request, job_id: str, caller: JobsWriter, services: Api, query: Nothing
) -> Response:
    """Put a paused job back into the queue, or withdraw a pause that has not come yet."""
    del query
    return _changed(request, job_id, caller, services, jobs.resume)


def _changed(
    request: Request,
    job_id: str,
    caller: Caller,
    services: Services,
    change: Callable[..., Job],
) -> Response:
    """The job after `change`, once per idempotency key and only in the state that was asked for."""
    identity = identify(request, caller, None)

    def work() -> schemas.Job:
        key, tenant_id = job_id_of(job_id), caller.tenant_id
        if "if-match" in request.headers:
            _check_match(request, _view(tx, jobs.lock(tx, key, tenant_id=tenant_id), caller))
        return _view(tx, change(tx, key, tenant_id=tenant_id), caller)

    with services.database.begin() as tx:
        answer = once(tx, identity, work)
    return _json(answer)


def _check_match(request: Request, view: schemas.Job) -> None:
    wanted = request.headers.get("if-match")
    if wanted is not None and wanted != "*" and _etag(view) not in wanted:
        raise ApiError("precondition_failed", "The job has changed since that ETag.")


def _json(answer: Answer) -> Response:
    body = answer.body.encode()
    headers = {**answer.headers, "ETag": etag_of(body)}
    return Response(body, headers=headers, media_type="application/json")


def _location(answer: Answer) -> str:
    """Where the new job is; a replay knows its job only from its body."""
    return str(json.loads(answer.body)["links"]["self"])
