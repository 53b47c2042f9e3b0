"""One attempt, from claim to final state: watches a trainer, stores what it tells, ends the job.

The row in Postgres is the truth. Each write names the attempt; when one says that the attempt is
lost, the trainer is killed and nothing more is written.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Connection, select

from core import attempts, feed, files, models, starts
from core.attempts import Claim, Ended, JobError
from core.db import Database
from core.errors import AttemptLost, ModelNotFound, NotFound, StoredFileCorrupt
from core.events import EventCode, NewClipPass, NewEvent, NewMetric, Report
from core.files import StoredFile
from core.hyperparameters import AUTO
from core.ids import public_checkpoint_id, public_job_id
from core.models_catalog import ModelCatalog
from core.rows import Checkpoint
from core.spec import Resolved
from core.states import JobStatus, Phase, StopWanted
from core.storage import ArtifactStore
from ppo_engine.errors import EngineError
from worker import translate
from worker.errors import BrokenTrainer, DatabaseGone, Unusable
from worker.hold import NO_ANSWER, Hold
from worker.journal import Batch, CheckpointFolder, FinalFolder, Journal, RowsFile
from worker.settings import WorkerSettings
from worker.stream import FeedStream
from worker.trainer_process import Stop, TrainerEnd, TrainerProcess
from worker.workspace import Workspace, is_full

ROWS_PER_TRANSACTION = 200

FINISHED = 0
OUT_OF_MEMORY = 71
STOPPED = 75
ERROR_OF_EXIT_CODE = {64: "invalid_config", 65: "invalid_training_file", 70: "internal_error"}
"""Exit codes that end the job, with the error when `exit.json` names none."""

DISK_FULL = "disk_full"
ERROR_OF_CRASH = {69: "reward_unavailable", 74: DISK_FULL}
"""Exit codes that are crashes, with the job's error when it is not tried again."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a worker process has, whichever job it works on."""

    settings: WorkerSettings
    database: Database
    stream: FeedStream
    store: ArtifactStore
    catalog: ModelCatalog


def run_job(parts: Parts, job_id: UUID, *, task_id: str, is_told_to_go: Callable[[], bool]) -> None:
    """Claim the job and see its attempt through; nothing happens when it cannot be claimed."""
    claim = _claim(parts, job_id, task_id)
    if claim is None:
        log.info("claim.nothing", job_id=public_job_id(job_id))
        return
    with structlog.contextvars.bound_contextvars(
        job_id=public_job_id(job_id), attempt=claim.holder.attempt
    ):
        log.info("job.claimed")
        Supervisor(parts, claim, is_told_to_go=is_told_to_go).run()


def _claim(parts: Parts, job_id: UUID, task_id: str) -> Claim | None:
    settings = parts.settings
    try:
        with parts.database.begin() as tx:
            return attempts.claim(
                tx,
                job_id,
                task_id=task_id,
                worker_label=settings.label,
                ttl=timedelta(seconds=settings.lease_seconds),
            )
    except NO_ANSWER:
        log.warning("claim.no_database", job_id=public_job_id(job_id))
        return None


class Supervisor:
    """The holder of one attempt."""

    def __init__(self, parts: Parts, claim: Claim, *, is_told_to_go: Callable[[], bool]) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._is_told_to_go = is_told_to_go
        self._job = claim.job
        self._resolved = dict(claim.job.resolved)
        self._hold = Hold(
            claim, parts.database, parts.stream, parts.settings, is_told_to_go=is_told_to_go
        )
        self._workspace = Workspace(parts.settings.scratch, parts.store, claim.job)
        self._journal = Journal(self._workspace.folder / "metrics.jsonl")
        self._trainer: TrainerProcess | None = None
        self._started = time.monotonic()
        self._final: FinalFolder | None = None
        self._published: attempts.NewCheckpoint | None = None
        self._saved_steps: set[int] = set()
        self._asked: Stop | None = None
        self._tokens: dict[str, Any] = {}
        self._patience = float("inf")

    def run(self) -> None:
        """Carry the attempt to its end, whatever happens on the way."""
        try:
            ended = self._attempt()
            log.info("attempt.ended", status=ended.status.value)
            self._hold.show(ended.items)
        except AttemptLost:
            log.warning("attempt.lost")
            self._bury_trainer()
            self._workspace.unpublish_result()
        except DatabaseGone:
            log.warning("attempt.left_to_the_reaper")
        finally:
            self._bury_trainer()

    def _attempt(self) -> Ended:
        try:
            self._hold.while_beating(self._prepare)
            if self._is_told_to_go() or self._hold.stop_wanted is not None:
                return self._release("stopped_before_start", exit_code=None)
            return self._conclude(self._watch(self._start_trainer()))
        except BrokenTrainer as fault:
            self._bury_trainer()
            return self._crash("broken_trainer", message=str(fault), exit_code=None)
        except Unusable as fault:
            return self._fail(fault.error, exit_code=None)
        except NotFound as fault:  # perhaps a store that is not mounted here
            return self._crash("input_missing", message=fault.message, exit_code=None)
        except OSError as fault:
            log.exception("attempt.io_failed")
            self._bury_trainer()
            message = f"the worker's disk: {fault.strerror}"
            if is_full(fault):
                return self._crash(DISK_FULL, message, exit_code=None, error_code=DISK_FULL)
            return self._crash("io_error", message, exit_code=None)

    def _bury_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.kill()

    # Before the trainer.

    def _prepare(self) -> None:
        """A run directory with everything the trainer needs; runs on a thread."""
        try:
            base = self._parts.catalog.find(self._job.model)
        except ModelNotFound as fault:
            raise Unusable(JobError(code="model_load_failed", message=fault.message)) from None
        try:
            training, validation = self._hold.write(self._files)
            inputs = self._workspace.fetch_inputs(training, validation)
            start_adapter = self._fetch_start()
        except StoredFileCorrupt as fault:
            raise Unusable(JobError(code="internal_error", message=fault.message)) from None
        resolved = Resolved.from_dict(self._job.resolved)
        run = translate.RunInputs(
            job_id=str(self._job.id),
            attempt=self._job.attempt,
            device=self._settings.device,
            base_model={"id": base.id, "path": str(base.path.resolve()), "sha256": base.sha256},
            training_file=inputs.training_file,
            validation_file=inputs.validation_file,
            start_adapter=start_adapter,
            resume_from=self._resume(),
        )
        try:
            self._workspace.write_run_file(translate.run_file(resolved, run))
        except EngineError as fault:
            raise Unusable(_job_error(fault.code, fault.message, fault.param)) from None

    def _files(self, tx: Connection) -> tuple[StoredFile, StoredFile | None]:
        tenant, validation = self._job.tenant_id, self._job.validation_file_id
        return (
            files.get(tx, self._job.training_file_id, tenant_id=tenant),
            None if validation is None else files.get(tx, validation, tenant_id=tenant),
        )

    def _fetch_start(self) -> str | None:
        """The adapter that the job starts from, if it is not the bare base model."""
        start = self._hold.write(lambda tx: starts.of_job(tx, self._job))
        if start is None:
            return None
        try:
            return self._workspace.fetch_adapter(start)
        except StoredFileCorrupt as fault:
            name = public_checkpoint_id(start.job_id, start.attempt, start.step)
            log.warning("start.corrupt", checkpoint=name, reason=fault.message)
            message = f"the adapter of {name} is damaged; start from another checkpoint"
            raise Unusable(
                JobError(code="model_load_failed", message=message, param="model")
            ) from None

    def _resume(self) -> str | None:
        """The newest checkpoint that verifies, noted as the step this attempt goes on from."""
        saved, folder = self._usable_checkpoint()
        step = saved.step if saved is not None else 0
        self._hold.show(
            self._hold.write(lambda tx: attempts.record_resume(tx, self._hold.holder, step=step))
        )
        return folder

    def _usable_checkpoint(self) -> tuple[Checkpoint | None, str | None]:
        for saved in self._hold.write(lambda tx: attempts.resumable(tx, self._job.id)):
            try:
                return saved, self._workspace.fetch_checkpoint(saved)
            except StoredFileCorrupt as fault:
                self._give_up(saved, fault.message)
        return None, None

    def _give_up(self, bad: Checkpoint, reason: str) -> None:
        log.warning("checkpoint.corrupt", step=bad.step, reason=reason)
        self._hold.show(
            self._hold.write(
                lambda tx: attempts.give_up_checkpoint(tx, self._hold.holder, bad, reason=reason)
            )
        )

    def _start_trainer(self) -> TrainerProcess:
        self._started = time.monotonic()
        self._trainer = TrainerProcess(self._settings.trainer_command, self._workspace.folder)
        log.info("trainer.started", pid=self._trainer.pid)
        return self._trainer

    # While it runs.

    def _watch(self, trainer: TrainerProcess) -> TrainerEnd:
        """How the trainer ended, once everything it told is stored."""
        while True:
            has_ended = trainer.wait(self._settings.tick_seconds)
            has_stored_all = self._take_lines(trainer)
            if has_ended and has_stored_all:
                return trainer.end()
            if has_ended:  # Postgres is away; the trainer's end no longer sets the pace
                self._leave_if_told()
                time.sleep(self._settings.tick_seconds)
            else:
                self._stop_if_wanted(trainer)

    def _leave_if_told(self) -> None:
        """DatabaseGone once a worker that is told to go has waited long enough for Postgres."""
        if not self._is_told_to_go():
            return
        self._patience = min(self._patience, time.monotonic() + self._settings.pause_seconds)
        if time.monotonic() > self._patience:
            raise DatabaseGone

    def _take_lines(self, trainer: TrainerProcess) -> bool:
        """Store what the trainer told since the last look; False if Postgres does not answer.

        A trainer that tells faster than it can be stored is asked to stop all the same.
        """
        while True:
            batch = self._journal.entries(ROWS_PER_TRANSACTION)
            self._hold.usage = self._usage()
            if not batch.entries:
                self._hold.beat_if_due()
                return True
            self._hold.phase = Phase.TRAINING
            if not self._store(batch):
                return False
            self._journal = batch.behind
            if not trainer.wait(0):
                self._stop_if_wanted(trainer)

    def _store(self, batch: Batch) -> bool:
        match batch.entries[0]:
            case FinalFolder() as told:
                self._final = told
                return True
            case CheckpointFolder() as told:
                return told.step in self._saved_steps or self._save(told)
            case _:
                return self._tell(batch)

    def _tell(self, batch: Batch) -> bool:
        entries = batch.entries
        metrics = [one for one in entries if isinstance(one, NewMetric)]
        if metrics:
            self._hold.step = metrics[-1].step
            told = metrics[-1].values
            self._tokens = {name: told.get(name) for name in ("prompt_tokens", "response_tokens")}
            self._hold.usage = self._usage()
        for one in entries:
            if isinstance(one, NewEvent) and one.code is EventCode.SETTINGS_MEASURED:
                self._resolved = attempts.with_measured(self._resolved, one.data)
        report = Report(
            items=tuple(one for one in entries if isinstance(one, NewEvent | NewMetric)),
            passes=tuple(one for one in entries if isinstance(one, NewClipPass)),
        )
        samples = [
            self._workspace.publish_rows(one) for one in entries if isinstance(one, RowsFile)
        ]
        return self._hold.tell(report, samples)

    def _save(self, told: CheckpointFolder) -> bool:
        """Publish the checkpoint's files, then its row; the files only once."""
        if self._published is None or self._published.step != told.step:
            self._published = self._hold.while_beating(
                lambda: self._workspace.publish_checkpoint(told)
            )
        replaced = self._hold.save(self._published)
        if replaced is None:
            return False
        self._saved_steps.add(told.step)
        for old in replaced:
            self._workspace.thin_checkpoint(old)
        return True

    def _usage(self) -> dict[str, Any]:
        """What the job has used so far, over all its attempts."""
        before = self._job.usage.get("device_seconds", 0.0)
        return {
            **self._job.usage,
            **self._tokens,
            "device_seconds": round(before + time.monotonic() - self._started, 3),
        }

    def _stop_if_wanted(self, trainer: TrainerProcess) -> None:
        wish = self._wish()
        if wish is not None and _outranks(wish, self._asked):
            log.info("trainer.asked_to_stop", wish=wish.value)
            trainer.ask_to_stop(wish)
            self._asked = wish
            self._patience = time.monotonic() + self._grace(wish)
        if time.monotonic() > self._patience:
            log.warning("trainer.killed", reason="did not stop in time")
            trainer.kill()

    def _wish(self) -> Stop | None:
        if self._hold.stop_wanted is StopWanted.CANCEL:
            return Stop.CANCEL
        must_leave = (
            self._is_told_to_go() or self._hold.seconds_offline > self._settings.offline_seconds
        )
        if must_leave or self._hold.stop_wanted is StopWanted.PAUSE:
            return Stop.PAUSE
        return Stop.FINISH if self._hold.finish_wanted else None

    def _grace(self, wish: Stop) -> float:
        """Seconds until a trainer that does not obey is killed."""
        match wish:
            case Stop.FINISH:
                return float("inf")  # nobody waits: it goes on until its next boundary
            case Stop.PAUSE:
                return self._settings.pause_seconds
            case Stop.CANCEL:
                return self._settings.cancel_seconds

    # After it.

    def _conclude(self, end: TrainerEnd) -> Ended:
        self._hold.phase = Phase.FINALISING
        log.info("trainer.ended", code=end.code, reason=end.reason)
        if end.code == FINISHED and self._final is not None:
            return self._finish(self._final)
        if end.code in ERROR_OF_EXIT_CODE:
            return self._fail(_error_of(end), exit_code=end.code)
        if end.code == STOPPED or self._asked in {Stop.PAUSE, Stop.CANCEL}:
            is_paused = end.reason == attempts.PAUSED_BY_GUARD
            to = JobStatus.PAUSED if is_paused else JobStatus.QUEUED
            return self._release(end.reason, exit_code=end.code, to=to)
        if end.code == OUT_OF_MEMORY:
            return self._retry_smaller(end)
        if end.code == FINISHED:
            raise BrokenTrainer("the trainer ended well without a result")
        error_code = ERROR_OF_CRASH.get(end.code, attempts.TOO_MANY_CRASHES)
        return self._crash(*_told(end), exit_code=end.code, error_code=error_code)

    def _finish(self, told: FinalFolder) -> Ended:
        """Publish the result and end the job; a cancel that came first takes the result back."""
        curves = self._hold.write(lambda tx: feed.metrics(tx, self._job.id))
        artifacts = self._hold.while_beating(lambda: self._workspace.publish_result(told, curves))
        ended = self._hold.write(
            lambda tx: attempts.finish(
                tx,
                self._hold.holder,
                artifacts=artifacts,
                fine_tuned_model=self._result_name(tx),
                usage=self._hold.usage,
            )
        )
        if ended.status is not JobStatus.SUCCEEDED:
            self._workspace.unpublish_result()
        self._workspace.remove()
        return ended

    def _result_name(self, tx: Connection) -> str:
        slug = tx.execute(
            select(models.tenant.c.slug).where(models.tenant.c.id == self._job.tenant_id)
        ).scalar_one()
        return f"ft:{self._job.model}:{slug}:{self._job.suffix or ''}:{self._job.id.hex}"

    def _release(
        self, reason: str, *, exit_code: int | None, to: JobStatus = JobStatus.QUEUED
    ) -> Ended:
        ended = self._hold.write(
            lambda tx: attempts.release(
                tx, self._hold.holder, reason=reason, exit_code=exit_code, to=to
            )
        )
        self._workspace.remove()
        return ended

    def _crash(
        self,
        reason: str,
        message: str,
        *,
        exit_code: int | None,
        error_code: str = attempts.TOO_MANY_CRASHES,
    ) -> Ended:
        log.warning("attempt.crashed", reason=reason, message=message)
        return self._hold.write(
            lambda tx: attempts.release_crash(
                tx,
                self._hold.holder,
                reason=reason,
                message=message,
                exit_code=exit_code,
                error_code=error_code,
            )
        )

    def _fail(self, error: JobError, *, exit_code: int | None) -> Ended:
        log.warning("attempt.failed", code=error.code)
        return self._hold.write(
            lambda tx: attempts.fail(tx, self._hold.holder, error, exit_code=exit_code)
        )

    def _retry_smaller(self, end: TrainerEnd) -> Ended:
        """Once more with half the micro-batch, which later attempts keep; then the job fails."""
        smaller = halved_micro_batch(self._resolved)
        if smaller is None:
            return self._fail(_error_of(end), exit_code=end.code)

        def write(tx: Connection) -> Ended:
            attempts.record_resolved(tx, self._hold.holder, smaller)
            return attempts.release(
                tx, self._hold.holder, reason="out_of_memory", exit_code=end.code
            )

        return self._hold.write(write)


def _outranks(wish: Stop, asked: Stop | None) -> bool:
    """Whether a wish goes further than the one that was told before."""
    order = list(Stop)
    return asked is None or order.index(wish) > order.index(asked)


def halved_micro_batch(resolved: dict[str, Any]) -> dict[str, Any] | None:
    """The settings with half the micro-batch; None if it is 1, unknown, or was halved before."""
    settings = resolved["hyperparameters"]
    # "auto" is still there if memory ran out before anything was measured.
    if "full_micro_batch_size" in resolved or settings["micro_batch_size"] in (1, AUTO):
        return None
    half = settings["micro_batch_size"] // 2
    return {
        **resolved,
        "full_micro_batch_size": settings["micro_batch_size"],
        "hyperparameters": {**settings, "micro_batch_size": half},
    }


def _error_of(end: TrainerEnd) -> JobError:
    """Why the job fails: what the trainer says, else what its exit code means."""
    said = end.error or {}
    codes = {**ERROR_OF_EXIT_CODE, OUT_OF_MEMORY: "out_of_memory"}
    code = said.get("code") or codes[end.code]
    message = said.get("message") or f"The trainer ended with {end.reason}"
    return _job_error(str(code), str(message), said.get("param"))


def _job_error(code: str, message: str, param: str | None) -> JobError:
    return JobError(
        code=code, message=message, param=None if param is None else translate.spec_param(param)
    )


def _told(end: TrainerEnd) -> tuple[str, str]:
    """Reason and message of a crash."""
    message = (end.error or {}).get("message") or _silent_end(end)
    return end.reason, str(message)


def _silent_end(end: TrainerEnd) -> str:
    """What a trainer that said nothing may have ended of."""
    if end.reason == "SIGKILL":
        return (
            "the trainer was killed (SIGKILL), as systems do when memory runs out; if it happens "
            "again, lower micro_batch_size or max_response_tokens"
        )
    return f"the trainer ended with {end.reason}"
