"""The clip rule explained on tokens of the request's own."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from api import clip_schemas
from api.clip_views import explanation_view
from api.conditions import tagged
from api.deps import JobsReader, JsonObject, Nothing
from api.explain_request import parse_explain
from api.openapi import body_of, errors_of
from core.idempotency import parse_key
from ppo_engine.explain import explain

router = APIRouter(prefix="/v1/ppo", tags=["clip"])


@router.post(
    "/clip/explain",
    response_model=clip_schemas.Explanation,
    responses=errors_of(413, 415),
    openapi_extra=body_of("ExplainRequest"),
)
def explain_clipping(
    request: Request, caller: JobsReader, query: Nothing, payload: JsonObject
) -> Response:
    """What PPO's clipped objective does with a token, in numbers and words; nothing is stored."""
    del caller, query
    parse_key(request.headers.get("idempotency-key"))
    asked = parse_explain(payload)
    rule = asked.rule
    found = [
        explain(
            ratio,
            advantage,
            clip_range=rule.clip_range,
            clip_range_high=rule.clip_range_high,
            dual_clip=rule.dual_clip,
        )
        for ratio, advantage in asked.tokens()
    ]
    return tagged(request, explanation_view(found, rule))
