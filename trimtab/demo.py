"""`trimtab demo`: a real PPO job on this machine, from the model to the adapter and its proof."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from trimtab import model_cache
from trimtab.client import Client
from trimtab.errors import Cancelled, Failed, TrimtabError
from trimtab.home import DEMO_MODEL, SHIPPED, Home, command
from trimtab.stack import SECRETS, Stack
from trimtab.views import (
    Comparison,
    History,
    Point,
    answers_table,
    clip_verdict,
    comparison_table,
    duration,
    plain,
    progress_for,
)

SAMPLES_PER_PROMPT = 8
_SHOWN_ANSWERS = 3
_TOLD_LEVELS = ("warn", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The demo with its settings; `run` it once."""

    home: Home
    models: Path
    out: Path
    """Where adapter, job and evaluation are left."""
    data: Path = SHIPPED
    steps: int | None = None
    """Training steps instead of those in `job.json`."""
    console: Console

    def run(self) -> bool:
        """Whether the reward on the held-out prompts rose beyond noise; all else is an error."""
        spec = self._spec()
        model = self._model(str(spec["model"]))
        with Stack(self.home, port=0, tell=self._tell) as stack:
            with Client(stack.url, stack.api_key) as client:
                started = time.monotonic()
                job, history = self._train(spec, stack, client)
                self._tell(f"the job took {duration(time.monotonic() - started)}")
                client.download(job["id"], self.out)
            self._tell("adapter downloaded, every sha256 verified")
        comparison = self._compare(job, model)
        self._report(job, history, comparison)
        return comparison.is_improved

    def _tell(self, sentence: str) -> None:
        self.console.print(Text(f"> {plain(sentence)}", style="dim"), soft_wrap=True)

    def _spec(self) -> dict[str, Any]:
        """The job request, without its files."""
        spec: dict[str, Any] = json.loads((self.data / "job.json").read_text(encoding="utf-8"))
        if self.steps is not None:
            spec["method"]["ppo"]["hyperparameters"]["max_steps"] = self.steps
        return spec

    def _model(self, name: str) -> Mapping[str, Any]:
        """The base model's entry in the cache; the demo's own model is fetched when it lacks."""
        if name == model_cache.SOURCES[DEMO_MODEL].model_id:
            model_cache.fetch(DEMO_MODEL, self.models, tell=self._tell)
        return model_cache.find(name, self.models)

    def _train(
        self, spec: dict[str, Any], stack: Stack, client: Client
    ) -> tuple[dict[str, Any], History]:
        """The finished job and its course."""
        self.out.mkdir(parents=True, exist_ok=True)
        spec["training_file"] = client.upload(self.data / "prompts.jsonl")["id"]
        spec["validation_file"] = client.upload(self.data / "heldout.jsonl")["id"]
        job = client.create_job(spec)
        (self.out / "job.json").write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
        self._tell(f"job {job['id']} is {job['status']} at {stack.url}")
        try:
            return self._follow(job, stack, client)
        except BaseException:
            with suppress(TrimtabError):  # what went wrong first is what matters
                client.cancel(job["id"])
            raise

    def _follow(
        self, job: dict[str, Any], stack: Stack, client: Client
    ) -> tuple[dict[str, Any], History]:
        """Show the job until it ends."""
        history = History(job["progress"]["total_steps"])
        with progress_for(self.console) as progress:
            for item in client.stream(job["id"], on_life=stack.check):
                if item["type"] == "metrics":
                    history.add(Point.of(item))
                    progress.show(history)
                elif item["type"] == "event" and item["level"] in _TOLD_LEVELS:
                    progress.say(f"{item['level']}: {item['message']}")
        job = client.job(job["id"])
        if job["status"] == "cancelled":
            raise Cancelled(f"job {job['id']} was cancelled")
        if job["status"] != "succeeded":
            error = job["error"] or {}
            raise Failed(
                f"job {job['id']} {job['status']}: {error.get('message')} [{error.get('code')}]"
            )
        return job, history

    def _compare(self, job: Mapping[str, Any], model: Mapping[str, Any]) -> Comparison:
        """Base against adapter, answered and scored by an engine process that loads both."""
        folder = self.out / "evaluation"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(self.data / "heldout.jsonl", folder / "heldout.jsonl")
        run = sampling_run(job, model, adapter=(self.out / "adapter").absolute())
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        self._tell("loading the adapter with peft; answering held-out prompts without and with it")
        run_engine(folder)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return Comparison.of(summary)

    def _report(self, job: Mapping[str, Any], history: History, comparison: Comparison) -> None:
        """What came out, and what to do next."""
        lines = (self.out / "evaluation" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
        answers = [json.loads(line) for line in lines if line]
        spread = range(0, len(answers), max(1, len(answers) // _SHOWN_ANSWERS))
        shown = [answers[index] for index in spread][:_SHOWN_ANSWERS]
        say = self.console.print
        say()
        say(answers_table(shown))
        say(comparison_table(comparison))
        say(Text(comparison.verdict(), style="bold"), soft_wrap=True)
        say(Text(clip_verdict(history.points, job["resolved"]["clip_range"])), soft_wrap=True)
        say()
        adapter = self.out.absolute() / "adapter"
        for line in (
            f"The adapter: {adapter} (load it with peft.PeftModel.from_pretrained)",
            f"The job, the evaluation and all digests lie beside it in {self.out.absolute()}",
            f"Start the service for real: {command('up')}",
        ):
            say(Text(line), soft_wrap=True)


def sampling_run(
    job: Mapping[str, Any], model: Mapping[str, Any], *, adapter: Path
) -> dict[str, Any]:
    """A run file of kind `sample` (`docs/trainer-protocol.md`) under the settings of the job."""
    resolved = job["resolved"]
    taken = ("max_prompt_tokens", "max_response_tokens", "temperature", "precision")
    return {
        "protocol_version": 1,
        "kind": "sample",
        "job_id": job["id"],
        "attempt": 1,
        "seed": job["seed"],
        "device": os.environ.get("TRIMTAB_DEVICE", "cpu"),
        "base_model": {name: model[name] for name in ("id", "path", "sha256")},
        "adapter": str(adapter),
        "data": {"validation": "heldout.jsonl"},
        "samples_per_prompt": SAMPLES_PER_PROMPT,
        "reward": job["method"]["ppo"]["reward"],
        "out": ".",
        **{name: resolved[name] for name in taken},
    }


def run_engine(folder: Path) -> None:
    """Run `folder`/run.json in the engine, without secrets; it dies with us, by our pipe to it."""
    command = [sys.executable, "-P", "-m", "ppo_engine", str(folder / "run.json")]
    public = {name: value for name, value in os.environ.items() if name not in SECRETS}
    environment = {**public, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        )
    with process:
        try:
            code = process.wait()
        finally:
            process.kill()
    if reason := _fault(folder, code):
        raise Failed(f"the engine could not answer the prompts: {reason} (log: {log.name})")


def _fault(folder: Path, code: int) -> str | None:
    """Why the run failed, None if it did not; `exit.json` wins over the code of the process."""
    end = folder / "exit.json"
    if not end.exists():
        return f"exit code {code} and no exit.json"
    ended = json.loads(end.read_text(encoding="utf-8"))
    if ended["code"] == 0:
        return None
    return str((ended["error"] or {}).get("message") or ended["reason"])
