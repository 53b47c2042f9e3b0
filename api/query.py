"""Query parameters: each route names a model of them, everything else is refused.

The `openai` client writes lists as `status[]=a&status[]=b` and maps as `metadata[k]=v`; plain
repetition is understood too.  `null` means absent.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar, get_origin

import pydantic
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from api.errors import bad_request
from api.faults import faults_of, unknown_parameter
from api.strict_json import check_texts
from core.errors import Fault
from core.states import JobStatus
from ppo_engine.explain import TokenClass

_DualClip = Annotated[float, Field(gt=1, le=100)] | Literal["off"] | None
_MAP_KEY = re.compile(r"(\w+)\[([^\]]+)\]")


class Query(BaseModel):
    """Query parameters of a route; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Q = TypeVar("Q", bound=Query)


class NoQuery(Query):
    """A route without query parameters."""


class PageQuery(Query):
    """A page of a list: what follows `after`."""

    after: str | None = Field(None, max_length=200, description="Id of the last item already seen.")
    limit: int = Field(20, ge=0, le=100, description="Items wanted at most.")
    order: Literal["asc", "desc"] = Field("desc", description="Oldest first or newest first.")


class JobsQuery(PageQuery):
    """Which jobs to list."""

    metadata: dict[str, str] | None = Field(None, description="Pairs that a job must have.")
    status: list[JobStatus] | None = Field(None, description="States a job may be in.")
    model: str | None = Field(None, max_length=256, description="Base model of the jobs.")
    method: str | None = Field(None, max_length=64, description="Method of the jobs.")
    created_after: int | None = Field(None, ge=0, le=2**40, description="Unix seconds, exclusive.")
    created_before: int | None = Field(None, ge=0, le=2**40, description="Unix seconds, exclusive.")


class EventsQuery(PageQuery):
    """Which events to list."""

    limit: int = Field(20, ge=0, le=1000, description="Items wanted at most.")
    level: Literal["info", "warn", "error"] | None = Field(None, description="Only this level.")
    type: Literal["message", "metrics"] | None = Field(None, description="Only this type.")
    code: str | None = Field(None, max_length=64, description="Only this event code.")


class CheckpointsQuery(PageQuery):
    """Which checkpoints to list."""

    limit: int = Field(10, ge=0, le=100, description="Items wanted at most.")


class AdapterQuery(Query):
    """Which adapter of a job."""

    checkpoint: str | None = Field(
        None,
        max_length=200,
        description="Id of a checkpoint; without: the result, or the last checkpoint before it.",
    )


class StepsQuery(Query):
    """A range of steps, both ends included."""

    from_step: int | None = Field(None, ge=0, le=2**31 - 1, description="First step.")
    to_step: int | None = Field(None, ge=0, le=2**31 - 1, description="Last step.")


class MetricsQuery(StepsQuery):
    """Which curves to read."""

    names: list[str] | None = Field(
        None, max_length=200, description="Only these metrics; also one comma-separated text."
    )
    max_points: int = Field(
        2000, ge=2, le=20_000, description="Above this, only minima and maxima per bucket."
    )
    format: Literal["json", "csv"] = Field("json", description="Columns, or a table as text.")


class ClipQuery(PageQuery, StepsQuery):
    """Which clip updates to list."""

    detail: Literal["summary", "passes", "buckets"] = Field(
        "summary",
        description="Merged over the step; or also each epoch and minibatch; or also by place in "
        "the response and by old probability.",
    )


class PassesQuery(StepsQuery):
    """Which passes to merge."""

    epoch: int | None = Field(None, ge=0, lt=2**31, description="Only this epoch, from 0.")
    minibatch: int | None = Field(None, ge=0, lt=2**31, description="Only this one, from 0.")


class HistogramQuery(PassesQuery):
    """Which passes to merge, and into how many columns."""

    columns: int = Field(
        1, ge=1, le=600, description="Columns of consecutive steps at most; 1 merges everything."
    )


class SweepQuery(PassesQuery):
    """Which passes to judge, and under which clip ranges."""

    clip_range: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None,
        max_length=64,
        description="Values of ε_low; also one comma-separated text. Without both lists: the "
        "customary ranges. With `clip_range_high` alone: the run's own.",
    )
    clip_range_high: list[Annotated[float, Field(gt=0, le=10)]] | None = Field(
        None,
        max_length=64,
        description="Values of ε_high, as many as of `clip_range`, in pairs; without: ε_low.",
    )
    dual_clip: float | Literal["off"] | None = Field(
        None, description="c of every range, or `off`; without: the run's own."
    )

    @field_validator("dual_clip", mode="plain", json_schema_input_type=_DualClip)
    @classmethod
    def _number_or_off(cls, value: Any) -> float | Literal["off"]:
        """One fault for a wrong value; a union would tell one for each of its kinds."""
        if value == "off":
            return "off"
        try:
            number = float(value)
        except ValueError:
            raise PydanticKnownError("float_parsing") from None
        if number > 100:
            raise PydanticKnownError("less_than_equal", {"le": 100.0})
        if not number > 1:
            raise PydanticKnownError("greater_than", {"gt": 1.0})
        return number


class TokensQuery(Query):
    """Which tokens to list."""

    after: str | None = Field(None, max_length=200, description="Id of the last item already seen.")
    limit: int = Field(20, ge=0, le=1000, description="Items wanted at most.")
    order: Literal["asc", "desc"] | None = Field(
        None, description="Without: `asc` by position, `desc` by ratio or advantage."
    )
    step: int | None = Field(
        None, ge=0, lt=10**9, description="Without: the newest step that has a token table."
    )
    sample_id: str | None = Field(None, max_length=200, description="Only this sample.")
    class_: list[TokenClass] | None = Field(
        None, alias="class", description="Only these classes; also one comma-separated text."
    )
    order_by: Literal["position", "ratio", "advantage"] = Field(
        "position", description="What to order by; a null comes last."
    )


class DiagnosisQuery(Query):
    """As of when to judge a run."""

    step: int | None = Field(
        None, ge=0, le=2**31 - 1, description="As it looked after this step; without: now."
    )


class StreamQuery(Query):
    """Where a stream goes on, and what it carries."""

    after: str | None = Field(
        None, max_length=64, description="Id of the last frame seen; `latest` = only new ones."
    )
    types: list[Literal["status", "metrics", "event", "checkpoint"]] | None = Field(
        None, description="Only these types, and `end`; also one comma-separated text."
    )


class FilesQuery(PageQuery):
    """Which files to list."""

    limit: int = Field(10_000, ge=0, le=10_000, description="Items wanted at most.")
    purpose: str | None = Field(None, max_length=64, description="Only this purpose.")


class ValidationQuery(Query):
    """How to read the report on a file."""

    format: Literal["json", "jsonl"] = Field(
        "json", description="One object with up to 1000 faults, or every fault on its own line."
    )


def query_of(model: type[Q]) -> Callable[[Request], Awaitable[Q]]:
    """A dependency that reads the query of a request into `model`.

    A coroutine as all dependencies: a plain function would cost the request a thread of its own.
    """

    async def read(request: Request) -> Q:
        return read_query(model, request.query_params.multi_items())

    return read


def read_query(model: type[Q], items: list[tuple[str, str]]) -> Q:
    """The query as `model`; all its faults at once otherwise."""
    check_texts(text for item in items for text in item)
    values, faults = _collect(model, items)
    try:
        query = model.model_validate(values)
    except pydantic.ValidationError as error:
        faults += faults_of(error, model)
    if faults:
        raise bad_request(faults)
    return query


def _collect(
    model: type[Query], items: list[tuple[str, str]]
) -> tuple[dict[str, Any], list[Fault]]:
    """Raw values by field, and the faults of names and repetitions."""
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for raw_name, text in items:
        name, key = _name_and_key(raw_name)
        if name not in fields:
            faults.append(unknown_parameter(name, fields, pointer=f"/{name}"))
        elif key:
            _as_map(values, name)[key] = text
        elif text == "null":
            continue
        elif _is_list(fields[name]):
            values.setdefault(name, []).extend(part for part in text.split(",") if part)
        elif name in values:
            detail = f"{name} stands twice in the query; give it once"
            faults.append(Fault(f"/{name}", "conflicting_parameters", detail))
        else:
            values[name] = text
    return values, faults


def _as_map(values: dict[str, Any], name: str) -> dict[str, Any]:
    current = values.get(name)
    if not isinstance(current, dict):
        current = values[name] = {}
    return current


def _name_and_key(raw: str) -> tuple[str, str]:
    """`metadata[k]` is ("metadata", "k"), `status[]` is ("status", "")."""
    if raw.endswith("[]"):
        return raw.removesuffix("[]"), ""
    match = _MAP_KEY.fullmatch(raw)
    return (match[1], match[2]) if match else (raw, "")


def _is_list(field: FieldInfo) -> bool:
    annotation = field.annotation
    return any(get_origin(part) is list for part in (annotation, *_union_parts(annotation)))


def _union_parts(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def query_parameters(model: type[Query]) -> list[dict[str, Any]]:
    """The parameters of a query for the OpenAPI document."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.get("$defs", {})
    return [
        _parameter(name, _inlined(part, definitions))
        for name, part in schema.get("properties", {}).items()
    ]


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    description = schema.pop("description", "")
    schema.pop("title", None)
    parameter = {"name": name, "in": "query", "required": False, "description": description}
    kinds = {part.get("type") for part in (schema, *schema.get("anyOf", []))}
    if "object" in kinds:
        parameter |= {"style": "deepObject", "explode": True}
    return parameter | {"schema": schema}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its references replaced by what they point to."""
    if isinstance(value, list):
        return [_inlined(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(item, definitions) for key, item in value.items()}
