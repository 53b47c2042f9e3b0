"""Models on offer, and models that jobs made."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from api import schemas
from api.conditions import tagged
from api.deps import Api, ModelsReader, Nothing
from api.openapi import errors_of
from api.paging import page
from api.queries import fine_tuned_jobs
from api.views import adapter_model_view, base_model_view
from core.errors import ModelNotFound
from core.keys import Caller

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=schemas.Page[schemas.Model], responses=errors_of())
def list_models(request: Request, caller: ModelsReader, services: Api, query: Nothing) -> Response:
    """Base models first, then adapters, newest first."""
    del query
    return tagged(
        request, schemas.Page[schemas.Model](**page(_models(services, caller), has_more=False))
    )


@router.get("/{model:path}", response_model=schemas.Model, responses=errors_of(404))
def get_model(
    request: Request, model: str, caller: ModelsReader, services: Api, query: Nothing
) -> Response:
    """One model, by id or alias."""
    del query
    for view in _models(services, caller):
        if view.id == model:
            return tagged(request, view)
    try:
        return tagged(request, base_model_view(services.catalog.find(model)))
    except ModelNotFound as error:
        raise ModelNotFound(error.message) from None  # in the path, not in a body


def _models(services: Api, caller: Caller) -> list[schemas.Model]:
    with services.database.read() as tx:
        made = fine_tuned_jobs(tx, caller.tenant_id)
    bases = [base_model_view(entry) for entry in services.catalog.entries()]
    return bases + [adapter_model_view(job, owner=caller.tenant_slug) for job in made]
