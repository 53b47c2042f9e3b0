"""`python -m ppo_engine RUN.json`: one run of the engine in a process of its own.

Exit codes: `errors.py`.  Everything else it has to say goes into the run directory.
"""

import dataclasses
import errno
import os
import re
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ppo_engine import native
from ppo_engine.answers import load_adapter, sample_answers, write_comparison
from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.config import TrainConfig
from ppo_engine.errors import (
    STOPPED_EXIT_CODE,
    DiskFull,
    EngineError,
    InvalidConfig,
    OutOfMemory,
    SelfCheckFailed,
)
from ppo_engine.export import RunSummary, export_result, read_adapter
from ppo_engine.graders.catalog import build_grader
from ppo_engine.health import self_check_event
from ppo_engine.machine import (
    faster_precision,
    free_bytes,
    gemm_gflops,
    micro_batch_rows,
    step_bytes,
)
from ppo_engine.policy import BaseModel, CausalPolicy, Policy
from ppo_engine.prompts import EncodedPrompt, load_prompts
from ppo_engine.reports import EngineEvent, StepReport
from ppo_engine.run_directory import RunDirectory, RunFile, write_exit
from ppo_engine.trainer import Trainer

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(rf"os error ({'|'.join(map(str, _DISK_ERRORS))})\b")
"""How safetensors, written in Rust, words the same."""
_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""PyTorch has no exception of its own for a CPU's memory, only these words."""


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
    try:
        run = RunFile.load(Path(arguments[0]))
    except InvalidConfig as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    try:
        end = _run(run)
    except Exception as error:  # noqa: BLE001 - the outermost place: every fault becomes an exit
        traceback.print_exception(error)  # stderr, which the supervisor keeps for the operator
        return _end(run, _as_engine_error(error))
    return _end(run, end)


class Ending(StrEnum):
    """How a run ends that does not fail: the `reason` in `exit.json`."""

    DONE = "done"
    STOPPED = "stopped"
    PAUSED_BY_GUARD = "paused_by_guard"

    @property
    def exit_code(self) -> int:
        """Of the process."""
        return 0 if self is Ending.DONE else STOPPED_EXIT_CODE


def _end(run: RunFile, end: Ending | EngineError) -> int:
    """Write how it ended.  A full disk has no room for that either; then the code alone tells."""
    with suppress(OSError):
        if isinstance(end, EngineError):
            write_exit(run.folder, end.exit_code, end.code, end)
        else:
            write_exit(run.folder, end.exit_code, end.value)
    return end.exit_code


def _as_engine_error(error: Exception) -> EngineError:
    """The fault in the engine's words; bare `EngineError` for what it did not foresee.

    What libraries say may name folders of this machine, so it goes to the log and not to users.
    """
    if isinstance(error, EngineError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error):
        return OutOfMemory(
            "memory ran out; lower micro_batch_size, max_response_tokens or max_prompt_tokens"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return DiskFull(f"a file could not be written: {error.strerror}")
    if isinstance(error, SafetensorError) and _OS_ERROR.search(str(error)):
        return DiskFull("a file could not be written: no space left")
    return EngineError(
        f"the engine failed in a way it did not foresee ({type(error).__name__}); "
        "the worker's log holds the trace"
    )


def _run(run: RunFile) -> Ending:
    transformers_logging.disable_progress_bar()
    if run.device == "cpu":
        torch.use_deterministic_algorithms(mode=True)  # resumed runs are to be bit-identical
    if run.kind == "train":
        return _train(run)
    _sample(run)
    return Ending.DONE


def _train(run: RunFile) -> Ending:
    stop_signal = StopSignal()
    stop_signal.listen()
    directory = RunDirectory(run.folder)
    trainer = _make_trainer(run, directory)
    config = trainer.config
    if (saved := run.path(run.content["resume_from"])) is not None:
        _resume(trainer, saved, directory)
    reports: list[StepReport] = []
    for report in _steps(trainer, directory):
        directory.write_step(report)
        reports = [*reports[:1], report]
        request = directory.stop_request() or ("pause" if stop_signal.is_set else None)
        if request == "cancel":
            return Ending.STOPPED
        is_complete = report.step == config.total_steps
        wants_pause = (request == "pause" or report.wants_pause) and not is_complete
        is_last = is_complete or (request == "finish" and not wants_pause)
        if wants_pause or is_last or report.step % config.checkpoint_interval == 0:
            folder = run.folder / f"ck-{report.step}"
            digest = save_checkpoint(trainer, folder, run.base_model)
            directory.write_checkpoint(report.step, folder, digest, is_good=trainer.health.is_good)
        if wants_pause:
            return Ending.PAUSED_BY_GUARD if report.wants_pause else Ending.STOPPED
        if is_last:
            break
    _export(run, trainer, reports, directory)
    return Ending.DONE


def _steps(trainer: Trainer, directory: RunDirectory) -> Iterator[StepReport]:
    """The trainer's reports; a failed self-check is told before it ends the run."""
    try:
        yield from trainer.steps()
    except SelfCheckFailed:
        if trainer.checked is not None:
            directory.write_event(0, self_check_event(trainer.checked))
        raise


def _make_trainer(run: RunFile, directory: RunDirectory) -> Trainer:
    settings = dict(run.content["config"])
    left_open = [name for name in _MEASURED if settings.get(name) == _AUTO]
    scorer = build_grader(run.content["reward"])
    speeds: dict[str, float] = {}
    if "precision" in left_open:
        speeds = gemm_gflops(run.device)
        settings["precision"] = faster_precision(speeds)
    if "micro_batch_size" in left_open:
        settings["micro_batch_size"] = 1  # until the model and the prompts are known
    config = TrainConfig.from_dict(settings)
    base = _load_base(run, config.precision)
    train, validation = (
        _load_prompts(run, base, name, config.max_prompt_tokens) for name in ("train", "validation")
    )
    longest = max(len(prompt.token_ids) for prompt in train) + config.max_response_tokens
    if "micro_batch_size" in left_open:
        rows = micro_batch_rows(
            base.model, run.device, longest_row=longest, minibatch_size=config.minibatch_size
        )
        config = dataclasses.replace(config, micro_batch_size=rows)
    if left_open:
        needed = step_bytes(
            base.model,
            run.device,
            responses=config.batch_size * config.group_size,
            micro_batch_rows=config.micro_batch_size,
            longest_row=longest,
            response_tokens=config.max_response_tokens,
        )
        memory = Memory(needed=needed, free=free_bytes(run.device))
        directory.write_event(0, _measured_event(config, left_open, speeds, memory))
    policy = Policy(
        base,
        config.lora,
        temperature=config.temperature,
        seed=run.seed,
        critic=config.critic if config.has_critic else None,
    )
    if run.start_adapter is not None:
        read_adapter(policy, run.folder / run.start_adapter)
        policy.hold_to_present_adapter()
    return Trainer(policy, scorer, train, config, seed=run.seed, validation=validation)


_AUTO = "auto"
_MEASURED = ("precision", "micro_batch_size")
"""Settings that a run file may leave to the engine."""
_FILES = {"train": "training_file", "validation": "validation_file"}


class Memory(NamedTuple):
    """In bytes."""

    needed: int
    """By a step, on top of the model; estimated."""
    free: int

    def __str__(self) -> str:
        needed, free = (number / 2**30 for number in self)
        text = f"a step needs about {needed:.1f} GiB on top of the model, {free:.1f} GiB are free"
        if self.is_enough:
            return text
        return f"{text}: lower batch_size, micro_batch_size or max_response_tokens"

    @property
    def is_enough(self) -> bool:
        """Whether it may be expected to fit."""
        return self.needed <= self.free


def _measured_event(
    config: TrainConfig, left_open: list[str], speeds: dict[str, float], memory: Memory
) -> EngineEvent:
    """Tells what was left to this machine, so that later attempts take the same."""
    found = {name: getattr(config, name) for name in left_open}
    words = ", ".join(f"{name} {value}" for name, value in found.items())
    if speeds:
        words += " ({fp32:.0f} GFLOP/s in fp32, {bf16:.0f} in bf16)".format(**speeds)
    return EngineEvent(
        level="info" if memory.is_enough else "warn",
        code="settings.measured",
        message=f"chosen for this machine: {words}; {memory}",
        data=found
        | {"kernels": native.variant()}
        | {f"gflops.{name}": round(value, 1) for name, value in speeds.items()}
        | {f"memory.{name}_bytes": value for name, value in memory._asdict().items()},
    )


def _load_base(run: RunFile, precision: str) -> BaseModel:
    return BaseModel.load(run.folder / run.base_model.path, precision=precision, device=run.device)


def _load_prompts(
    run: RunFile, base: BaseModel, name: str, max_prompt_tokens: int
) -> list[EncodedPrompt]:
    path = run.path(run.content["data"].get(name))
    if path is None:
        return []
    return load_prompts(
        path, base.tokenizer, max_prompt_tokens=max_prompt_tokens, param=_FILES[name]
    )


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
    if sys.stdin is None:  # closed by whoever started us
        return
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
