"""Pages of lists, and the link to the next one."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from fastapi import Request

from api import schemas


def page(items: Sequence[Any], *, has_more: bool) -> dict[str, Any]:
    """The fields of a list envelope."""
    return {
        "data": list(items),
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
        "has_more": has_more,
    }


def next_link(request: Request, view: schemas.Page[Any]) -> dict[str, str]:
    """The `Link` header of a page that is not the last."""
    if not view.has_more or view.last_id is None:
        return {}
    rest = [pair for pair in request.query_params.multi_items() if pair[0] != "after"]
    query = urlencode([*rest, ("after", view.last_id)])
    return {"Link": f'<{request.url.path}?{query}>; rel="next"'}
