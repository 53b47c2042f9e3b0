"""A run set up to collapse, with guards and without: what is told of it, and how it ends.

    python -m benchmarks.collapse [--steps 40] [--seed 1] [--device cpu] [--out collapse/]

A hundred times the usual learning rate, no KL penalty, practically no clipping, and a reward that
repeating a few kind words exploits.  Both runs start from the same weights, prompts and random
numbers; only the guards differ.  Leaves `collapse.json` and `collapse.md`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import engine_runs

HERE = Path(__file__).parent
PRESETS = {"without guards": "warn", "with guards": "strict"}
SHOWN = (
    *("reward_mean", "valid_reward_mean", "kl_reference_per_sequence", "entropy"),
    *("reference_perplexity", "distinct_2", "repeated_4gram_fraction", "update_kl_k3_max"),
)
"""What the table tells of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a run told."""

    values: list[dict[str, float | None]]
    """Of `SHOWN`, by step."""
    found: dict[str, int]
    """Step at which each finding first came."""
    words: dict[str, str]
    """What was said of it then."""
    actions: list[tuple[int, str]]
    """Step and action of each guard that fired."""
    answers: list[str]
    """Some of the last step."""

    @classmethod
    def of(cls, folder: Path) -> "Course":
        """The course of a run that has ended."""
        told = engine_runs.lines_of(folder, "metrics")
        events = engine_runs.lines_of(folder, "event")
        found: dict[str, int] = {}
        words: dict[str, str] = {}
        for event in events:
            for detail in event["data"].get("details", ()):
                found.setdefault(detail["code"], event["step"])
                words.setdefault(detail["code"], detail["message"])
        return cls(
            values=[{name: line["values"][name] for name in SHOWN} for line in told],
            found=found,
            words=words,
            actions=[
                (event["step"], event["data"]["action"])
                for event in events
                if event["code"] == "guard.fired"
            ],
            answers=engine_runs.samples_of(folder, told[-1]["step"]),
        )


def prepare(out: Path, *, seed: int, steps: int | None, device: str) -> dict[str, Path]:
    """A run directory for each preset."""
    folders = {}
    for name, preset in PRESETS.items():
        spec = json.loads((HERE / "collapse_job.json").read_text(encoding="utf-8"))
        hyperparameters = spec["method"]["ppo"]["hyperparameters"]
        hyperparameters["guards"] = {"preset": preset}
        if steps is not None:
            hyperparameters["max_steps"] = steps
        folder = out / "runs" / name.replace(" ", "-")
        folders[name] = engine_runs.prepare(folder, spec, seed=seed, device=device)
    return folders


def table(courses: Mapping[str, Course]) -> str:
    """First and last step of each run, then what was found and done."""
    lines = [f"| run | step | {' | '.join(SHOWN)} |", f"|---|---|{'---|' * len(SHOWN)}"]
    for name, course in courses.items():
        for step in (1, len(course.values)):
            row = (_number(course.values[step - 1][metric]) for metric in SHOWN)
            lines.append(f"| {name} | {step} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *_stories(courses)])


def _stories(courses: Mapping[str, Course]) -> Iterator[str]:
    for name, course in courses.items():
        found = ", ".join(f"`{code}` at step {step}" for code, step in course.found.items())
        done = ", ".join(f"{action} at step {step}" for step, action in course.actions)
        yield f"**{name}**: found {found or 'nothing'}; did {done or 'nothing'}.\n"
        yield from (f"> {answer!r}\n" for answer in course.answers[:2])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def write(out: Path, folders: Mapping[str, Path]) -> None:
    """What came out of runs that have ended."""
    courses = {name: Course.of(folder) for name, folder in folders.items()}
    stored = {name: asdict(course) for name, course in courses.items()}
    (out / "collapse.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
    text = table(courses)
    (out / "collapse.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Run twice, write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("collapse"))
    arguments = parser.parse_args()
    folders = prepare(
        arguments.out, seed=arguments.seed, steps=arguments.steps, device=arguments.device
    )
    engine_runs.run_all(folders.values(), parallel=arguments.parallel)
    write(arguments.out, folders)


if __name__ == "__main__":
    sys.exit(main())
