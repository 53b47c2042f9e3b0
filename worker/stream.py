"""The live feed in Redis: best effort, after the commit; what it lacks is in Postgres."""

import json
from collections.abc import Sequence

import redis
import structlog

from core.dispatch import FEED_LENGTH, FEED_SECONDS, feed_key
from core.events import FeedItem, feed_payload

SOCKET_SECONDS = 0.5

log = structlog.get_logger(__name__)


class FeedStream:
    """Writes the feed items of held jobs; Redis refuses an id that is not above the last."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(
            redis_url, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
        )

    def send(self, items: Sequence[FeedItem]) -> None:
        """Append the items of one job, if Redis is there."""
        if not items:
            return
        key = feed_key(items[0].job_id)
        pipeline = self._redis.pipeline(transaction=False)
        for item in items:
            text = json.dumps(feed_payload(item), allow_nan=False)
            pipeline.xadd(key, {"item": text}, id=item.id, maxlen=FEED_LENGTH, approximate=True)
        pipeline.expire(key, FEED_SECONDS)
        try:
            pipeline.execute(raise_on_error=False)
        except redis.RedisError as error:
            log.warning("feed.unsent", count=len(items), error=type(error).__name__)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
