"""The OpenAPI document: what FastAPI does not see by itself (errors, strict bodies, queries)."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from api import schemas
from api.errors import PROBLEM
from api.explain_request import ExplainRequest
from api.middleware import PUBLIC_PATHS
from api.query import Query
from api.query import query_parameters as parameters_of
from api.uploads import UploadFields
from core.spec import JobSpec

DESCRIPTION = """Fine-tuning with PPO in the shape of OpenAI's fine-tuning API.

The unmodified `openai` client works with `base_url` and `api_key` changed. Times are unix seconds,
durations seconds, sizes bytes. JSON never holds NaN: `null` stands for it."""

_ALWAYS = (400, 401, 403, 405, 429, 500, 503)
"""Statuses that any route with a key may answer."""

Json = dict[str, Any]


def errors_of(*statuses: int) -> dict[int | str, Json]:
    """The error answers of a route, besides those of all routes."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({*_ALWAYS, *statuses})
    }


def body_of(schema: str) -> Json:
    """A JSON body that the route parses itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


def upload_body() -> Json:
    """The multipart form of an upload."""
    fields = UploadFields.model_json_schema()
    properties = {"file": {"type": "string", "format": "binary"}, **fields["properties"]}
    schema = {"type": "object", "properties": properties, "required": ["file", "purpose"]}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def query_parameters(model: type[Query]) -> Json:
    """The query of a route."""
    return {"parameters": parameters_of(model)}


def bytes_answer(description: str) -> dict[int | str, Json]:
    """An answer of plain bytes, whole or a range of it."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": description, "content": content},
        206: {"description": "The range asked for", "content": content},
        304: {"description": "The client has it already"},
    }


def document(app: FastAPI) -> Json:
    """The document, built once."""
    if app.openapi_schema is None:
        app.openapi_schema = _build(app)
    return app.openapi_schema


def _build(app: FastAPI) -> Json:
    built = get_openapi(
        title=app.title,
        version=app.version,
        description=DESCRIPTION,
        openapi_version="3.1.0",
        routes=app.routes,
    )
    components = built.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(name, None)
    for model in (JobSpec, ExplainRequest, schemas.Problem):
        _add_schema(components.setdefault("schemas", {}), model)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in built["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path.startswith(PUBLIC_PATHS) else [{"key": []}]
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]  # FastAPI's own; ours are problems
    return built


def _add_schema(components: Json, model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    components.update(schema.pop("$defs", {}))
    components[model.__name__] = schema
