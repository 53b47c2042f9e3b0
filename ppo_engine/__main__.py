"""`python -m ppo_engine RUN.json`: one run of the engine in a process of its own.

Exit codes: `errors.py`.  Everything else it has to say goes into the run directory.
"""

import errno
import os
import signal
import stat
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ppo_engine.answers import load_adapter, sample_answers, write_comparison
from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.config import TrainConfig
from ppo_engine.errors import STOPPED_EXIT_CODE, DiskFull, EngineError, InvalidConfig, OutOfMemory
from ppo_engine.export import RunSummary, export_result
from ppo_engine.graders.catalog import build_grader
from ppo_engine.policy import BaseModel, CausalPolicy, Policy
from ppo_engine.prompts import EncodedPrompt, load_prompts
from ppo_engine.reports import EngineEvent, StepReport
from ppo_engine.run_directory import RunDirectory, RunFile
from ppo_engine.trainer import Trainer

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class StopSignal:
    """Whether SIGTERM has come; it asks for a pause."""

    is_set: bool = False

    def listen(self) -> None:
        """From now on SIGTERM sets the flag instead of ending the process."""
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True


def main(arguments: list[str]) -> int:
    """Run what the file asks for; the process's exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m ppo_engine RUN.json\n")
        return InvalidConfig.exit_code
    _die_with_parent()
    stop_signal = StopSignal()
    stop_signal.listen()
    try:
        run = RunFile.load(Path(arguments[0]))
    except InvalidConfig as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    directory = RunDirectory(run.folder)
    try:
        code = _run(run, directory, stop_signal)
    except Exception as error:  # noqa: BLE001 - the outermost place: every fault becomes an exit
        failure = _as_engine_error(error)
        traceback.print_exception(error)  # stderr, which the supervisor keeps for the operator
        with suppress(OSError):  # a full disk has no room for this either; the code still tells
            directory.write_exit(failure.exit_code, failure.code, failure)
        return failure.exit_code
    directory.write_exit(code, "stopped" if code else "done")
    return code


def _as_engine_error(error: Exception) -> EngineError:
    """The fault in the engine's words; bare `EngineError` for what it did not foresee.

    What libraries say may name folders of this machine, so it goes to the log and not to users.
    """
    if isinstance(error, EngineError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory(
            "memory ran out; lower micro_batch_size, max_response_tokens or max_prompt_tokens"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return DiskFull(f"a file could not be written: {error.strerror}")
    return EngineError(
        f"the engine failed in a way it did not foresee ({type(error).__name__}); "
        "the worker's log holds the trace"
    )


def _run(run: RunFile, directory: RunDirectory, stop_signal: StopSignal) -> int:
    transformers_logging.disable_progress_bar()
    if run.device == "cpu":
        torch.use_deterministic_algorithms(mode=True)  # resumed runs are to be bit-identical
    if run.kind == "train":
        return _train(run, directory, stop_signal)
    _sample(run)
    return 0


def _train(run: RunFile, directory: RunDirectory, stop_signal: StopSignal) -> int:
    config = TrainConfig.from_dict(run.content["config"])
    trainer = _make_trainer(run, config)
    if (saved := run.path(run.content["resume_from"])) is not None:
        _resume(trainer, saved, directory)
    reports: list[StepReport] = []
    for report in trainer.steps():
        directory.write_step(report)
        reports = [*reports[:1], report]
        request = "pause" if stop_signal.is_set else directory.stop_request()
        is_last = report.step == config.total_steps
        if request == "cancel":
            return STOPPED_EXIT_CODE
        if request == "pause" or is_last or report.step % config.checkpoint_interval == 0:
            folder = run.folder / f"ck-{report.step}"
            digest = save_checkpoint(trainer, folder, run.base_model)
            directory.write_checkpoint(report.step, folder, digest)
        if request == "pause" and not is_last:
            return STOPPED_EXIT_CODE
    _export(run, trainer, reports, directory)
    return 0


def _make_trainer(run: RunFile, config: TrainConfig) -> Trainer:
    scorer = build_grader(run.content["reward"])
    base = _load_base(run, config.precision)
    train, validation = (
        _load_prompts(run, base, name, config.max_prompt_tokens) for name in ("train", "validation")
    )
    policy = Policy(base, config.lora, temperature=config.temperature, seed=run.seed)
    return Trainer(policy, scorer, train, config, seed=run.seed, validation=validation)


def _load_base(run: RunFile, precision: str) -> BaseModel:
    return BaseModel.load(run.folder / run.base_model.path, precision=precision, device=run.device)


def _load_prompts(
    run: RunFile, base: BaseModel, name: str, max_prompt_tokens: int
) -> list[EncodedPrompt]:
    path = run.path(run.content["data"].get(name))
    if path is None:
        return []
    return load_prompts(path, base.tokenizer, max_prompt_tokens=max_prompt_tokens)


def _resume(trainer: Trainer, checkpoint: Path, directory: RunDirectory) -> None:
    """Go on from a checkpoint; tell if the result cannot be bit-identical."""
    changed = restore_checkpoint(trainer, checkpoint)
    if changed:
        names = ", ".join(sorted(changed))
        event = EngineEvent(
            level="warn",
            code="resume.not_identical",
            message=f"resumed in another environment ({names} differ): results may differ slightly",
            data=changed,
        )
        directory.write_event(trainer.progress.step, event)


def _export(
    run: RunFile, trainer: Trainer, reports: list[StepReport], directory: RunDirectory
) -> None:
    summary = RunSummary(
        job_id=run.job_id,
        seed=run.seed,
        config=trainer.config.to_dict(),
        reward=run.content["reward"],
        first=reports[0].values if reports else {},
        last=reports[-1].values if reports else {},
    )
    step = trainer.progress.step
    folder = run.folder / "final"
    digest = export_result(trainer.policy, folder, run.base_model, summary, step=step)
    directory.write_final(step, folder, digest)


def _sample(run: RunFile) -> None:
    """Answers of the base and, if one is named, of an adapter; into `answers.jsonl`."""
    wanted = run.content
    scorer = build_grader(wanted["reward"])
    base = _load_base(run, wanted["precision"])
    prompts = _load_prompts(run, base, "validation", wanted["max_prompt_tokens"])

    def answers(model: Any) -> Any:
        return sample_answers(
            CausalPolicy(base, model, temperature=wanted["temperature"]),
            scorer,
            prompts,
            samples_per_prompt=wanted["samples_per_prompt"],
            max_response_tokens=wanted["max_response_tokens"],
            seed=run.seed,
        )

    before = answers(base.model)
    adapter = run.path(wanted["adapter"])
    after = None if adapter is None else answers(load_adapter(base, adapter))
    write_comparison(run.folder, prompts, before, after)


def _die_with_parent() -> None:
    """If stdin is a pipe, its end means that the supervisor is gone: exit at once."""
    descriptor = sys.stdin.fileno()
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return

    def watch() -> None:
        # Not through sys.stdin: its lock would be held when the interpreter shuts down.
        while os.read(descriptor, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
