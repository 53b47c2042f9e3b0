"""The numbers of this API process and of the service's state, for Prometheus.

They are served on an address of their own and ask for no key.  Labels are bounded: routes are
templates, statuses and reasons come from lists of ours; no id of a job, key or tenant is one.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import redis
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import Connection, Select, func, select
from sqlalchemy.exc import OperationalError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import Services
from api.feed_hub import CLOSE_REASONS, FeedHub
from core import models
from core.db import now
from core.dispatch import presence_pattern, presence_queue
from core.errors import DatabaseUnavailable
from core.states import FINAL, JobStatus

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
UNMATCHED = "unmatched"
"""The route of an address that is none of ours."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
REDIS_SECONDS = 1.0

_job = models.job.c


class Exposition:
    """All numbers of one process, and the server that shows them."""

    def __init__(self, services: Services, hub: FeedHub) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "trimtab_http_requests",
            "Answered requests.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "trimtab_http_request_seconds",
            "Time until an answer began.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(ServiceState(services, hub))

    def serve(self, host: str, port: int) -> None:
        """Answer `GET /metrics` on a thread until `end`; OSError if the address is not free."""
        self._server, self._thread = start_http_server(port, host, registry=self.registry)

    def end(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def meter(self, app: ASGIApp) -> ASGIApp:
        """The application, each of its answers counted."""

        async def metered(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            started = time.perf_counter()

            async def send_and_count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._count(scope, message["status"], time.perf_counter() - started)
                await send(message)

            await app(scope, receive, send_and_count)

        return metered

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class ServiceState(Collector):
    """What Postgres, Redis and the streams of this process say when they are asked."""

    def __init__(self, services: Services, hub: FeedHub) -> None:
        self._services = services
        self._hub = hub
        self._redis = redis.Redis.from_url(
            services.settings.redis_url.get_secret_value(),
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            decode_responses=True,
        )

    def describe(self) -> list[Metric]:
        """Nothing beforehand: asking takes the servers."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it; what a server that is away would say is left out."""
        yield _gauge("trimtab_streams_open", "Streams that hear of news.", self._hub.num_streams)
        closed = CounterMetricFamily(
            "trimtab_streams_closed", "Streams closed before their end.", labels=["reason"]
        )
        for reason in CLOSE_REASONS:
            closed.add_metric([reason], self._hub.closed[reason])
        yield closed
        yield from _answered("trimtab_database_up", "Postgres", self._jobs)
        yield from _answered("trimtab_redis_up", "Redis", self._workers)

    def _jobs(self) -> list[Metric]:
        with self._services.database.read() as tx:
            return [_jobs_by_status(tx), *_oldest(tx)]

    def _workers(self) -> list[Metric]:
        family = GaugeMetricFamily(
            "trimtab_workers_online", "Workers that showed themselves lately.", labels=["queue"]
        )
        counts: dict[str, int] = {}
        for key in self._redis.scan_iter(presence_pattern(), count=1000):
            queue = presence_queue(key)
            counts[queue] = counts.get(queue, 0) + 1
        for queue, count in sorted(counts.items()):
            family.add_metric([queue], count)
        return [family]


def _answered(name: str, server: str, question: Callable[[], list[Metric]]) -> Iterator[Metric]:
    """Whether the server answers, and what."""
    try:
        answer = question()
    except (DatabaseUnavailable, OperationalError, redis.RedisError):
        answer = None
    yield _gauge(name, f"Whether {server} answers.", float(answer is not None))
    yield from answer or []


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _jobs_by_status(tx: Connection) -> Metric:
    """Unfinished jobs only: counting those that have ended would cost more with each of them."""
    family = GaugeMetricFamily("trimtab_jobs", "Unfinished jobs.", labels=["status"])
    rows = tx.execute(unfinished_jobs()).all()
    counts = {row[0]: row[1] for row in rows}
    for status in JobStatus:
        if status not in FINAL:
            family.add_metric([status.value], counts.get(status.value, 0))
    return family


def unfinished_jobs() -> Select[Any]:
    """Their number by status; an index holds no others."""
    return select(_job.status, func.count()).where(_job.finished_at.is_(None)).group_by(_job.status)


def _oldest(tx: Connection) -> list[Metric]:
    """How long the oldest job waits for a worker, and how many workers are out of contact."""
    waiting = tx.execute(
        select(func.extract("epoch", now() - func.min(_job.created_at))).where(
            _job.status == JobStatus.QUEUED, _job.attempt == 0
        )
    ).scalar_one()
    lost = tx.execute(
        select(func.count()).where(_job.lease_until.is_not(None), _job.lease_until < now())
    ).scalar_one()
    return [
        _gauge(
            "trimtab_oldest_new_job_seconds",
            "Age of the oldest job that no worker has begun.",
            float(waiting or 0),
        ),
        _gauge("trimtab_leases_expired", "Jobs whose worker is out of contact.", lost),
    ]
