"""What clipping did to the single tokens of stored samples."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api import clip_schemas, schemas
from api.clip_queries import StoredTable, token_table
from api.clip_views import token_row
from api.conditions import tagged
from api.deps import Api, JobsReader, Services
from api.errors import ApiError, bad_request
from api.openapi import errors_of, query_parameters
from api.paging import next_link, page
from api.query import TokensQuery, query_of
from api.routes.jobs import find_job
from api.token_tables import Token, TokenFilter, TokenOrder, TokenTable
from api.views import stream_cursor
from core.errors import Fault
from core.ids import SamplePlace, sample_place_of, token_place_of
from core.rows import Job

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["clip"])


@router.get(
    "/clip/tokens",
    response_model=schemas.FeedPage[clip_schemas.TokenRow],
    responses=errors_of(404),
    openapi_extra=query_parameters(TokensQuery),
)
def list_clip_tokens(
    request: Request,
    job_id: str,
    caller: JobsReader,
    services: Api,
    query: Annotated[TokensQuery, Depends(query_of(TokensQuery))],
) -> Response:
    """The tokens of a step's stored samples, with the numbers behind the class of each."""
    with services.database.read() as tx:
        job = find_job(tx, job_id, caller)
        wanted = _wanted(job, query)
        stored = token_table(tx, job.id, wanted.step)
    views = [] if stored is None else _views(job, query, wanted, stored, services)
    if stored is None:
        wanted.refuse_if_any()
    view = schemas.FeedPage[clip_schemas.TokenRow](
        **page(views[: query.limit], has_more=len(views) > query.limit),
        stream_cursor=stream_cursor(job),
    )
    return tagged(request, view, next_link(request, view))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What a query names; None is whatever there is."""

    step: int | None
    sample: SamplePlace | None
    after: tuple[SamplePlace, int] | None

    def refuse_if_any(self) -> None:
        """Say what is missing where there is no table."""
        if self.after is not None:
            raise _no_such_token()
        if self.sample is not None:
            raise _no_such_sample()
        if self.step is not None:
            detail = f"No tokens are stored of step {self.step}; leave step out for the newest."
            raise ApiError("token_table_not_found", detail, param="step")


def _wanted(job: Job, query: TokensQuery) -> _Wanted:
    """The query's ids, read; they name a step too, so that a page goes on in the same table."""
    sample = after = None
    if query.sample_id is not None:
        sample = sample_place_of(query.sample_id, job.id)
        if sample is None:
            raise _no_such_sample()
        if query.step not in {None, sample.step}:
            detail = f"sample_id is of step {sample.step}, not {query.step}; leave step out"
            names = ("step", "sample_id")
            raise bad_request(
                [Fault(f"/{name}", "conflicting_parameters", detail) for name in names]
            )
    if query.after is not None:
        after = token_place_of(query.after, job.id)
        if after is None:
            raise _no_such_token()
    step = query.step
    if step is None and sample is not None:
        step = sample.step
    if step is None and after is not None:
        step = after[0].step
    return _Wanted(step=step, sample=sample, after=after)


def _views(
    job: Job, query: TokensQuery, wanted: _Wanted, stored: StoredTable, services: Services
) -> list[clip_schemas.TokenRow]:
    """A page of the table, and one token more if there is one."""
    table = TokenTable(partial(services.store.open, stored.uri))
    order = TokenOrder(by=query.order_by, is_descending=_is_descending(query))
    row = _row_in(stored, table, wanted.sample)
    found = table.page(
        TokenFilter(row=row, classes=query.class_),
        order,
        after=_after_in(stored, table, wanted.after),
        limit=query.limit + 1,
    )
    return [token_row(job.id, stored.attempt, stored.step, token) for token in found]


def _is_descending(query: TokensQuery) -> bool:
    if query.order is None:
        return query.order_by != "position"
    return query.order == "desc"


def _row_in(stored: StoredTable, table: TokenTable, sample: SamplePlace | None) -> int | None:
    """The sample's row, which must be in the table."""
    if sample is None:
        return None
    if sample.attempt != stored.attempt or not table.has_row(sample.row):
        raise _no_such_sample()
    return sample.row


def _after_in(
    stored: StoredTable, table: TokenTable, after: tuple[SamplePlace, int] | None
) -> Token | None:
    """The cursor's token, which must be in the table."""
    if after is None:
        return None
    sample, position = after
    token = table.find(sample.row, position)
    if token is None or (sample.attempt, sample.step) != (stored.attempt, stored.step):
        raise _no_such_token()
    return token


def _no_such_sample() -> ApiError:
    detail = "No tokens are stored of such a sample of this job."
    return ApiError("sample_not_found", detail, param="sample_id")


def _no_such_token() -> ApiError:
    detail = "after: no token of this list has such an id"
    return ApiError("invalid_cursor", detail, param="after")
