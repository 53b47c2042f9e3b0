"""The one Celery task, and what happens around it in the worker's two processes.

The parent keeps the queue; the pool child runs the task, supervises the trainer and can be killed.
"""

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from uuid import UUID

import structlog
from billiard.common import TERM_SIGNAL
from billiard.exceptions import WorkerLostError
from celery import Celery
from celery.signals import setup_logging, task_failure, worker_process_init, worker_ready

from core import attempts
from core.db import Database
from core.dispatch import TASK_NAME
from core.models_catalog import ModelCatalog
from core.storage import ArtifactStore
from worker import supervisor
from worker.hold import NO_ANSWER
from worker.settings import WorkerSettings
from worker.stream import FeedStream
from worker.sweep import sweep_runs
from worker.trainer_process import DieWithParent

SWEEP_SECONDS = 3600.0

log = structlog.get_logger(__name__)


def register(app: Celery, settings: WorkerSettings) -> None:
    """Give the app its task, and hear of pool children that died with a task in their hands."""

    @cache
    def parts() -> supervisor.Parts:
        """Built in the pool child, after the fork."""
        return supervisor.Parts(
            settings=settings,
            database=Database(settings.database_url.get_secret_value(), pool_size=4),
            stream=FeedStream(settings.redis_url.get_secret_value()),
            store=ArtifactStore(settings.artifacts),
            catalog=ModelCatalog(settings.models),
        )

    @app.task(name=TASK_NAME, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
    def run_job(task: Any, job_id: str) -> None:
        _run(parts(), job_id, task.request.id)

    @setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
    def keep_logging(**_: Any) -> None:
        """With a receiver Celery leaves levels and handlers alone."""

    die_with_parent = DieWithParent()

    @worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def prepare_child(**_: Any) -> None:
        die_with_parent()

    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
    def begin_sweeping(sender: Any, **_: Any) -> None:
        sweep_own_runs(settings)
        sender.timer.call_repeatedly(SWEEP_SECONDS, sweep_own_runs, (settings,))

    @task_failure.connect(weak=False)  # type: ignore[untyped-decorator]
    def release_lost(task_id: str, exception: BaseException, **_: Any) -> None:
        if isinstance(exception, WorkerLostError):
            release_claim(settings, task_id)


def sweep_own_runs(settings: WorkerSettings) -> None:
    """Delete what workers that died on this machine left in the scratch folder."""
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    try:
        sweep_runs(database, settings.scratch)
    except (*NO_ANSWER, OSError) as error:
        log.warning("sweep.postponed", error=type(error).__name__)
    finally:
        database.dispose()


def release_claim(settings: WorkerSettings, task_id: str) -> None:
    """Hand back, as a crash, what the task of a dead or broken pool child still holds.

    Without a database it is left to the reaper.
    """
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    try:
        with database.begin() as tx:
            ended = attempts.release_claim(tx, task_id, message="the worker's process died")
    except NO_ANSWER:
        log.warning("claim.left_to_the_reaper", task_id=task_id)
        return
    finally:
        database.dispose()
    if ended is not None:
        log.warning("claim.released", task_id=task_id, status=ended.status.value)


def _run(parts: supervisor.Parts, job_id: str, task_id: str) -> None:
    """The task's body; ends the pool child afterwards if the worker was told to go meanwhile."""
    try:
        parsed = UUID(job_id)
    except (ValueError, AttributeError, TypeError):
        log.warning("task.malformed", job_id=str(job_id)[:64])
        return
    with _noting_the_stop_signal() as stop:
        try:
            supervisor.run_job(parts, parsed, task_id=task_id, is_told_to_go=stop.was_asked)
        except Exception:
            log.exception("attempt.broke")
            release_claim(parts.settings, task_id)
    if stop.was_asked():
        raise SystemExit(0)


class _Stop:
    """Whether the signal to stop has come; a handler that raised could strike anywhere."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self, _signal: int, _frame: types.FrameType | None) -> None:
        self._asked = True

    def was_asked(self) -> bool:
        return self._asked


@contextmanager
def _noting_the_stop_signal() -> Iterator[_Stop]:
    """Keep billiard's handler, which raises SystemExit, out of the way while an attempt runs."""
    stop = _Stop()
    before = signal.signal(TERM_SIGNAL, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(TERM_SIGNAL, before)
