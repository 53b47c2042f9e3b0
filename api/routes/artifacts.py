"""What a job left: manifest, files, the adapter as one tar."""

from fastapi import APIRouter, Request
from sqlalchemy import Connection
from starlette.responses import Response

from api import schemas
from api.conditions import tagged
from api.deps import Api, JobsReader, Nothing, Services
from api.downloads import Download, download
from api.openapi import bytes_answer, errors_of
from api.routes.jobs import find_job
from api.views import manifest_view
from core import artifacts
from core.artifacts import Artifact
from core.errors import ModelNotFound
from core.ids import public_job_id
from core.keys import Caller
from core.rows import Job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["artifacts"])


@router.get("/artifacts", response_model=schemas.Manifest, responses=errors_of(404, 409))
def get_manifest(
    request: Request, job_id: str, caller: JobsReader, services: Api, query: Nothing
) -> Response:
    """All files with their digests; once there is an adapter."""
    del query
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        adapter = artifacts.adapter(tx, job)
        found = artifacts.of_job(tx, job.id)
    base = schemas.BaseModelRef(id=job.model, sha256=_base_sha256(services, job))
    return tagged(request, manifest_view(job, adapter, found, base=base))


def _base_sha256(services: Services, job: Job) -> str | None:
    """Unknown once an operator took the model away."""
    try:
        return services.catalog.find(job.model).sha256
    except ModelNotFound:
        return None


@router.head("/adapter", include_in_schema=False)
@router.get(
    "/adapter",
    response_class=Response,
    responses={
        **bytes_answer("The adapter in PEFT's format, as a tar"),
        **errors_of(404, 409, 416),
    },
)
def get_adapter(
    request: Request, job_id: str, caller: JobsReader, services: Api, query: Nothing
) -> Response:
    """The adapter as one tar: same bytes each time, in ranges if wanted."""
    del query
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        found = artifacts.adapter(tx, job)
    return artifact_download(request, services, found, f"{public_job_id(job.id)}-adapter.tar")


@router.head("/artifacts/{path:path}", include_in_schema=False)
@router.get(
    "/artifacts/{path:path}",
    response_class=Response,
    responses={**bytes_answer("The file"), **errors_of(404, 416)},
)
def get_artifact(
    request: Request, job_id: str, path: str, caller: JobsReader, services: Api, query: Nothing
) -> Response:
    """One file of the manifest; a path is a name here, never a place on a disk."""
    del query
    with services.database.begin() as tx:
        found = _artifact_at(tx, job_id, path, caller)
    return artifact_download(request, services, found, path.rpartition("/")[2])


def _artifact_at(tx: Connection, job_id: str, path: str, caller: Caller) -> Artifact:
    return artifacts.by_path(tx, find_job(tx, job_id, caller).id, path)


def artifact_download(
    request: Request, services: Services, found: Artifact, filename: str
) -> Response:
    """The bytes of an artifact."""
    return download(
        request,
        Download(
            filename=filename,
            media_type=found.media_type,
            num_bytes=found.bytes,
            sha256=found.sha256,
            read=lambda start, stop: services.store.read(
                found.uri, start=start, length=stop - start
            ),
        ),
    )
