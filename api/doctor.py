"""`python -m api.doctor`: whether the servers are as they have to be, one JSON object a line.

`trimtab doctor` shows these with its own.  Each names the check, how it went and what to do.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import redis
from pydantic import ValidationError
from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import OperationalError

from api.schema_version import SchemaState, schema_state
from core import models
from core.db import Database, first_line, now
from core.dispatch import presence_pattern
from core.errors import DatabaseUnavailable
from core.settings import ServiceSettings
from core.states import JobStatus

OLDEST_POSTGRES = 18
CLOCK_SECONDS = 5.0
"""Difference of the clocks from which times of logs and of the database are hard to compare."""
REDIS_SECONDS = 3.0


class Verdict(StrEnum):
    """How a check went."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: what was found, and what to do unless it is good."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def main() -> int:
    """Print every finding; 1 if one is bad."""
    try:
        settings = ServiceSettings.from_environment()
    except ValidationError as error:
        missing = ", ".join(str(one["loc"][0]) for one in error.errors())
        findings = [_bad("settings", f"missing or wrong: {missing}", "set them; see operations.md")]
    else:
        findings = [*_postgres(settings), *_redis(settings)]
    for finding in findings:
        sys.stdout.write(json.dumps(asdict(finding)) + "\n")
    return int(any(one.verdict is Verdict.BAD for one in findings))


def _postgres(settings: ServiceSettings) -> Iterator[Finding]:
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    try:
        with database.begin() as tx:
            yield from _database_checks(tx)
    except (DatabaseUnavailable, OperationalError) as error:
        yield _bad("postgres", first_line(error), "start Postgres, or correct DATABASE_URL")
    finally:
        database.dispose()


def _database_checks(tx: Connection) -> Iterator[Finding]:
    version = tx.execute(text("show server_version")).scalar_one()
    if int(str(version).split(".")[0]) < OLDEST_POSTGRES:
        yield _bad("postgres", f"version {version}", f"Postgres must be {OLDEST_POSTGRES} or newer")
    else:
        yield _good("postgres", f"version {version} answers")
    skew = tx.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one()
    yield _clock(float(skew) - time.time())
    if schema_state(tx) is not SchemaState.CURRENT:
        remedy = "run `trimtab migrate` as the database's owner"
        yield _bad("schema", "the tables are of another version", remedy)
        return
    yield _good("schema", "up to date")
    yield _leases(tx)


def _clock(skew_seconds: float) -> Finding:
    found = (
        f"the database's is {abs(skew_seconds):.1f} s {'ahead' if skew_seconds > 0 else 'behind'}"
    )
    if abs(skew_seconds) < CLOCK_SECONDS:
        return _good("clock", found)
    remedy = "let both machines keep time by NTP; leases go by the database's clock alone"
    return Finding(check="clock", verdict=Verdict.DOUBTFUL, found=found, remedy=remedy)


def _leases(tx: Connection) -> Finding:
    job = models.job.c
    running, lost, waiting = tx.execute(
        select(
            func.count().filter(job.status == JobStatus.RUNNING),
            func.count().filter(job.lease_until < now()),
            func.count().filter(job.status == JobStatus.QUEUED),
        ).where(job.status.in_([JobStatus.RUNNING, JobStatus.QUEUED]))
    ).one()
    found = f"{running} running, {waiting} waiting, {lost} out of contact"
    if lost:
        remedy = "is the dispatcher up? it gives such jobs to another worker within a minute"
        return Finding(check="jobs", verdict=Verdict.DOUBTFUL, found=found, remedy=remedy)
    return _good("jobs", found)


def _redis(settings: ServiceSettings) -> Iterator[Finding]:
    client: Any = redis.Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
        decode_responses=True,
    )
    try:
        with client:
            yield _eviction(client.info("memory"))
            yield _workers(sum(1 for _ in client.scan_iter(presence_pattern(), count=1000)))
    except (redis.RedisError, OSError) as error:
        remedy = "start Valkey, or correct REDIS_URL; jobs are accepted meanwhile and start later"
        yield _bad("redis", type(error).__name__, remedy)


def _eviction(memory: dict[str, Any]) -> Finding:
    policy = memory.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        remedy = "set maxmemory-policy noeviction: announcements of jobs must not be thrown away"
        return _bad("redis", f"maxmemory-policy is {policy}", remedy)
    return _good("redis", "answers, never evicts")


def _workers(count: int) -> Finding:
    if count == 0:
        remedy = "start one with `trimtab worker`; jobs wait until then"
        return Finding(
            check="workers", verdict=Verdict.DOUBTFUL, found="none online", remedy=remedy
        )
    return _good("workers", f"{count} online")


def _good(check: str, found: str) -> Finding:
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def _bad(check: str, found: str, remedy: str) -> Finding:
    return Finding(check=check, verdict=Verdict.BAD, found=found, remedy=remedy)


if __name__ == "__main__":
    sys.exit(main())
