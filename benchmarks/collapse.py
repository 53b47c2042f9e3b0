"""A run set up to collapse, with guards and without: what is told of it, and how it ends.

    python benchmarks/collapse.py [--steps 40] [--seed 1] [--out collapse/]

A hundred times the usual learning rate, no KL penalty, practically no clipping, and a reward that
repeating a few kind words exploits.  Both runs start from the same weights, prompts and random
numbers; only the guards differ.  Leaves `collapse.json` and `collapse.md`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.spec import parse_spec, resolve
from ppo_engine.config import TrainConfig
from ppo_engine.graders.catalog import build_grader
from ppo_engine.policy import BaseModel, Policy
from ppo_engine.prompts import load_prompts
from ppo_engine.reports import StepReport
from ppo_engine.trainer import Trainer
from trimtab.demo import SHIPPED
from trimtab.home import models_folder
from trimtab.model_cache import find
from worker.translate import engine_config

HERE = Path(__file__).parent
SHOWN = (
    *("reward_mean", "valid_reward_mean", "kl_reference_per_sequence", "entropy"),
    *("reference_perplexity", "distinct_2", "repeated_4gram_fraction", "update_kl_k3_max"),
)
"""What the table tells of a step."""


@dataclass(slots=True)
class Course:
    """What a run told."""

    preset: str
    values: list[dict[str, float | None]] = field(default_factory=list)
    """Of `SHOWN`, by step."""
    diagnoses: list[dict[str, Any]] = field(default_factory=list)
    """Step, findings and their words, each time they changed."""
    firings: list[dict[str, Any]] = field(default_factory=list)
    """Step, guard, action and its outcome."""
    answers: list[str] = field(default_factory=list)
    """Two answers of the last step."""

    def take(self, report: StepReport) -> None:
        """Note a step."""
        self.values.append({name: report.values[name] for name in SHOWN})
        for event in report.events:
            told = {"step": report.step, "message": event.message, **event.data}
            if event.code == "diagnosis.changed":
                self.diagnoses.append(told)
            elif event.code == "guard.fired":
                self.firings.append(told)
        self.answers = [sample["completion"] for sample in report.samples]

    @property
    def found(self) -> dict[str, int]:
        """Step at which each finding first came."""
        first: dict[str, int] = {}
        for each in self.diagnoses:
            for code in each["findings"]:
                first.setdefault(code, each["step"])
        return first


def settings(preset: str, steps: int | None) -> tuple[TrainConfig, dict[str, Any]]:
    """The engine's settings and the reward, from the job request."""
    spec = json.loads((HERE / "collapse_job.json").read_text(encoding="utf-8"))
    hyperparameters = spec["method"]["ppo"]["hyperparameters"]
    hyperparameters["guards"] = {"preset": preset}
    if steps is not None:
        hyperparameters["max_steps"] = steps
    resolved = resolve(parse_spec(spec), prompts=64)
    return TrainConfig.from_dict(engine_config(resolved)), resolved.reward


def train(model: Mapping[str, Any], preset: str, *, steps: int | None, seed: int) -> Course:
    """One run to its end, or to the pause a guard asks for."""
    config, reward = settings(preset, steps)
    base = BaseModel.load(Path(model["path"]), precision=config.precision, device="cpu")
    policy = Policy(
        base, config.lora, temperature=config.temperature, seed=seed, critic=config.critic
    )
    train_prompts, held_out = (
        load_prompts(SHIPPED / name, base.tokenizer, max_prompt_tokens=config.max_prompt_tokens)
        for name in ("prompts.jsonl", "heldout.jsonl")
    )
    trainer = Trainer(
        policy, build_grader(reward), train_prompts, config, seed=seed, validation=held_out
    )
    course = Course(preset)
    for report in trainer.steps():
        course.take(report)
        print(_line(preset, report), flush=True)
        if report.wants_pause:
            break
    return course


def _line(preset: str, report: StepReport) -> str:
    values = report.values
    findings = [e.data["findings"] for e in report.events if e.code == "diagnosis.changed"]
    actions = [e.data["action"] for e in report.events if e.code == "guard.fired"]
    return (
        f"{preset:>7} {report.step:>3}: reward {values['reward_mean']:.2f}, "
        f"KL {values['kl_reference_per_sequence']:.1f}, entropy {values['entropy']:.2f} "
        f"{findings or ''} {actions or ''}"
    )


def table(courses: Mapping[str, Course]) -> str:
    """First and last step of each run, then what was found and done."""
    lines = [
        f"| run | step | {' | '.join(SHOWN)} |",
        f"|---|---|{'---|' * len(SHOWN)}",
    ]
    for name, course in courses.items():
        for step in (1, len(course.values)):
            row = (_number(course.values[step - 1][metric]) for metric in SHOWN)
            lines.append(f"| {name} | {step} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *_stories(courses)])


def _stories(courses: Mapping[str, Course]) -> Iterator[str]:
    for name, course in courses.items():
        found = ", ".join(f"`{code}` at step {step}" for code, step in course.found.items())
        done = ", ".join(f"{each['action']} at step {each['step']}" for each in course.firings)
        yield f"**{name}**: found {found or 'nothing'}; did {done or 'nothing'}.\n"
        yield from (f"> {answer!r}\n" for answer in course.answers)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def main() -> None:
    """Run twice, write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("collapse"))
    arguments = parser.parse_args()
    model = find("smollm2-135m-instruct", models_folder())
    courses = {
        name: train(model, preset, steps=arguments.steps, seed=arguments.seed)
        for name, preset in (("without guards", "warn"), ("with guards", "strict"))
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = {name: asdict(course) for name, course in courses.items()}
    (arguments.out / "collapse.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
    text = table(courses)
    (arguments.out / "collapse.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
