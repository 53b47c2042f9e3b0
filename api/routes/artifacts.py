"""What a job left: manifest, files, the adapter as one tar."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from sqlalchemy import Connection
from starlette.responses import Response

from api import schemas
from api.conditions import tagged
from api.deps import Api, JobsReader, Nothing, Services
from api.downloads import Download, download
from api.openapi import bytes_answer, errors_of, query_parameters
from api.query import AdapterQuery, query_of
from api.routes.jobs import find_job
from api.views import manifest_view
from core import artifacts
from core.adapter_tar import MEDIA_TYPE
from core.artifacts import Artifact
from core.errors import ModelNotFound
from core.ids import public_job_id
from core.keys import Caller
from core.rows import Job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["artifacts"])


@router.get(
    "/artifacts",
    response_model=schemas.Manifest,
    responses=errors_of(404, 409),
    openapi_extra=query_parameters(AdapterQuery),
)
def get_manifest(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[AdapterQuery, Depends(query_of(AdapterQuery))],
) -> Response:
    """All files with their digests; once there is an adapter."""
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        adapter = artifacts.adapter(tx, job, checkpoint=query.checkpoint)
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
    openapi_extra=query_parameters(AdapterQuery),
)
def get_adapter(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[AdapterQuery, Depends(query_of(AdapterQuery))],
) -> Response:
    """The adapter as one tar, in ranges if wanted; before the end that of the last checkpoint."""
    with services.database.begin() as tx:
        job = find_job(tx, job_id, caller)
        found = artifacts.adapter(tx, job, checkpoint=query.checkpoint)
    step = "" if found.checkpoint is None else f"-step-{found.step}"
    return download(
        request,
        Download(
            filename=f"{public_job_id(job.id)}{step}-adapter.tar",
            media_type=MEDIA_TYPE,
            num_bytes=found.bytes,
            sha256=found.sha256,
            read=artifacts.reader_of(services.store, found),
            # Another checkpoint takes this one's place at the same address.
            is_lasting=found.checkpoint is None or query.checkpoint is not None,
        ),
    )


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
