"""What goes wrong in a run, with the numbers behind it and what to do."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api import clip_schemas
from api.clip_queries import clip_passes_at
from api.conditions import tagged
from api.deps import Api, JobsReader
from api.diagnosis import FIRST_STEPS, REPLAYED_STEPS, diagnosis_view, judged_steps
from api.openapi import errors_of, query_parameters
from api.queries import first_and_last_metrics
from api.query import DiagnosisQuery, query_of
from api.routes.jobs import find_job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["jobs"])


@router.get(
    "/diagnosis",
    response_model=clip_schemas.Diagnosis,
    responses=errors_of(404),
    openapi_extra=query_parameters(DiagnosisQuery),
)
def get_diagnosis(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[DiagnosisQuery, Depends(query_of(DiagnosisQuery))],
) -> Response:
    """The known ways for PPO to go wrong that the run shows, now or as of a step."""
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        rows = first_and_last_metrics(
            tx, job.id, first=FIRST_STEPS, last=REPLAYED_STEPS, to_step=query.step
        )
        places = [(row.attempt, row.step) for row in rows[-judged_steps(job) :]]
        passes = clip_passes_at(tx, job.id, places)
    return tagged(request, diagnosis_view(job, rows, passes))
