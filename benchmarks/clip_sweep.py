"""The same job at several clip ranges, and practically without clipping, side by side.

    python -m benchmarks.clip_sweep --ranges 0.05 0.1 0.2 0.4 off --seeds 1 2 3 --out sweep/

Every range is trained with the same seeds: real jobs over HTTP that share `metadata.sweep`.  The
service is started for it, unless `--url` and `--key` name a running one; `--engine` runs the same
jobs without the service, `--parallel` at a time.  Leaves `sweep.json`, `sweep.md` and, where
matplotlib is installed, `sweep.svg`.

What a recorded run says of other ranges is answered without training by `/clip/sweep`; this script
answers what training with them does.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import engine_runs
from trimtab.client import Client
from trimtab.home import Home, models_folder
from trimtab.stack import Stack
from trimtab.state import StateHome

HERE = Path(__file__).parent
OFF = "off"
PRACTICALLY_OFF = {"clip_range": 0.99, "clip_range_high": 10.0}
"""Bounds 0.01 and 11: with them next to nothing is ever clipped."""
LAST_STEPS = 5
"""Steps at the end whose mean stands for "final"."""
POLL_SECONDS = 2.0
CLEAR = {3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}
"""Standard errors a lead over so many seeds must exceed to be clear: Student's t at 95 %."""
LEANING = 1.0
"""Standard errors beyond which a lead is called likely."""
ENOUGH_SEEDS = 3
PARTS = ("sample", "score", "estimate", "learn")
COLUMNS = (
    *("clip range", "held-out reward", "reward", "KL, nats per response", "entropy", "clipped"),
    *("largest update KL", "largest ratio", "findings", "seconds per step"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one job came to."""

    range: str
    seed: int
    status: str
    steps: int
    """Steps that were looked at."""
    held_out_reward: float | None
    """Mean reward on prompts that were not trained on, at the end; None if never measured."""
    reward: float
    """Of the training prompts; like all below, mean over the last steps unless said otherwise."""
    kl: float
    """Nats per response to the reference."""
    entropy: float
    """Nats per token."""
    clip_fraction: float
    """Mean over all steps."""
    largest_update_kl: float
    """Of any pass, nats per token."""
    largest_ratio: float
    """Of any token."""
    findings: tuple[str, ...]
    """Codes of everything the diagnosis found on the way."""
    seconds_per_step: float
    """Median."""

    @property
    def judged(self) -> float:
        """What ranges are compared by: the held-out reward, else that of the training prompts."""
        return self.reward if self.held_out_reward is None else self.held_out_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Which range to take, and how sure that is."""

    range: str
    confidence: str
    sentence: str


def range_settings(name: str) -> dict[str, float]:
    """Hyperparameters of a range given as `0.2`, `0.2:0.28` (low:high) or `off`."""
    if name == OFF:
        return PRACTICALLY_OFF
    low, _, high = name.partition(":")
    return {"clip_range": float(low), "clip_range_high": float(high or low)}


def outcome_of(
    job: Mapping[str, Any], metrics: Mapping[str, Any], events: Iterable[Mapping[str, Any]]
) -> Outcome:
    """The figures of a finished job, from what the API says of it."""

    def known(name: str) -> list[float]:
        return [value for value in metrics["series"][name] if value is not None]

    def final(name: str) -> float:
        return statistics.fmean(known(name)[-LAST_STEPS:])

    changes = [event for event in events if event["code"] == "diagnosis.changed"]
    return Outcome(
        range=job["metadata"]["range"],
        seed=job["seed"],
        status=job["status"],
        steps=len(metrics["series"]["reward_mean"]),
        held_out_reward=(known("valid_reward_mean") or [None])[-1],
        reward=final("reward_mean"),
        kl=final("kl_reference_per_sequence"),
        entropy=final("entropy"),
        clip_fraction=statistics.fmean(known("policy_clip_fraction")),
        largest_update_kl=max(known("update_kl_k3_max")),
        largest_ratio=max(known("ratio_max")),
        findings=tuple(sorted({code for each in changes for code in each["data"]["findings"]})),
        seconds_per_step=statistics.median(
            sum(parts) for parts in zip(*(known(f"seconds.{part}") for part in PARTS), strict=True)
        ),
    )


def recommend(outcomes: Sequence[Outcome]) -> Recommendation:
    """The range with the best reward, judged against the next one seed by seed.

    Seeds are shared, so what makes one seed luckier than another drops out of the differences.
    """
    by_range = grouped(outcomes)
    means = {
        name: statistics.fmean(each.judged for each in rows) for name, rows in by_range.items()
    }
    best, *others = sorted(means, key=means.__getitem__, reverse=True)
    if not others:
        return Recommendation(range=best, confidence="none", sentence="Only one range was tried.")
    rival = others[0]
    pairs = zip(by_range[best], by_range[rival], strict=True)
    leads = [mine.judged - theirs.judged for mine, theirs in pairs]
    lead = statistics.fmean(leads)
    if len(leads) < ENOUGH_SEEDS:
        return Recommendation(
            range=best,
            confidence="unknown",
            sentence=f"{best} ended highest, {lead:+.3f} ahead of {rival}, but {len(leads)} seed"
            f"{'s' if len(leads) > 1 else ''} cannot tell that from luck: use at least "
            f"{ENOUGH_SEEDS}.",
        )
    error = statistics.stdev(leads) / math.sqrt(len(leads))
    size = math.inf if error == 0 else lead / error
    clear = CLEAR.get(len(leads), min(CLEAR.values()))
    confidence = "clear" if size > clear else "leaning" if size > LEANING else "none"
    words = {
        "clear": f"{best} is better than {rival}, the next",
        "leaning": f"{best} is probably better than {rival}, the next",
        "none": f"{best} ended highest, but no better than {rival} as far as these seeds can tell",
    }
    return Recommendation(
        range=best,
        confidence=confidence,
        sentence=f"{words[confidence]}: {lead:+.3f} ± {error:.3f} over {len(leads)} seeds.",
    )


def grouped(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """By range in the order given, each sorted by seed."""
    found: dict[str, list[Outcome]] = {}
    for each in sorted(outcomes, key=lambda each: each.seed):
        found.setdefault(each.range, []).append(each)
    order = list(dict.fromkeys(each.range for each in outcomes))
    return {name: found[name] for name in order}


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown row per range: means over the seeds, the standard error where seeds allow it."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for name, rows in grouped(outcomes).items():
        findings = sorted({code for each in rows for code in each.findings})
        lines.append(
            f"| {name} | {_spread([each.held_out_reward for each in rows])} "
            f"| {_spread([each.reward for each in rows])} "
            f"| {_spread([each.kl for each in rows], digits=1)} "
            f"| {_spread([each.entropy for each in rows], digits=2)} "
            f"| {statistics.fmean(each.clip_fraction for each in rows):.1%} "
            f"| {max(each.largest_update_kl for each in rows):.3f} "
            f"| {max(each.largest_ratio for each in rows):.1f} "
            f"| {', '.join(findings) or 'none'} "
            f"| {statistics.median(each.seconds_per_step for each in rows):.1f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float | None], *, digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    values = known
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def run(
    client: Client, names: Sequence[str], seeds: Sequence[int], steps: int | None
) -> tuple[list[Outcome], dict[str, Any]]:
    """All jobs of the sweep, and the reward curves by range and seed."""
    spec = json.loads((HERE / "clip_sweep_job.json").read_text(encoding="utf-8"))
    spec["training_file"] = client.upload(engine_runs.PROMPTS / "prompts.jsonl")["id"]
    spec["validation_file"] = client.upload(engine_runs.PROMPTS / "heldout.jsonl")["id"]
    sweep = time.strftime("clip-%Y%m%d-%H%M%S")
    jobs = [
        client.create_job(_job(spec, name, seed, sweep, steps)) for seed in seeds for name in names
    ]
    outcomes, curves = [], {}
    for job in jobs:
        ended = wait(client, job["id"])
        metrics = client.metrics(job["id"])
        outcome = outcome_of(ended, metrics, client.events(job["id"], limit=1000))
        outcomes.append(outcome)
        curves[f"{outcome.range}, seed {outcome.seed}"] = metrics["series"]["reward_mean"]
        print(f"{outcome.range:>9} seed {outcome.seed}: {outcome.judged:.3f}", flush=True)
    return outcomes, curves


def run_engine(
    folder: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    *,
    device: str,
    parallel: int,
) -> tuple[list[Outcome], dict[str, Any]]:
    """The same jobs by the engine alone, in run directories below `folder`."""
    spec = json.loads((HERE / "clip_sweep_job.json").read_text(encoding="utf-8"))
    jobs = {
        engine_runs.prepare(
            folder / f"{name.replace(':', '-')}-seed-{seed}",
            _job(spec, name, seed, folder.name, steps),
            seed=seed,
            device=device,
        ): (name, seed)
        for seed in seeds
        for name in names
    }
    engine_runs.run_all(jobs, parallel=parallel)
    return collect(jobs)


def collect(
    jobs: Mapping[Path, tuple[str, int]], *, steps: int | None = None
) -> tuple[list[Outcome], dict[str, Any]]:
    """Outcomes and reward curves of runs, from what they told in their first `steps` steps."""
    outcomes, curves = [], {}
    for folder, (name, seed) in jobs.items():
        told = [line["values"] for line in engine_runs.lines_of(folder, "metrics")][:steps]
        series = {metric: [values[metric] for values in told] for metric in told[0]}
        job = {"metadata": {"range": name}, "seed": seed, "status": "succeeded"}
        events = engine_runs.lines_of(folder, "event")
        within = [event for event in events if event["step"] <= len(told)]
        outcomes.append(outcome_of(job, {"series": series}, within))
        curves[f"{name}, seed {seed}"] = series["reward_mean"]
    return outcomes, curves


def _job(
    spec: Mapping[str, Any], name: str, seed: int, sweep: str, steps: int | None
) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(json.dumps(spec))
    settings = job["method"]["ppo"]["hyperparameters"]
    settings.update(range_settings(name))
    if steps is not None:
        settings |= {"max_steps": steps, "eval_interval": steps}
    return {**job, "seed": seed, "metadata": {"sweep": sweep, "range": name}}


def wait(client: Client, job_id: str) -> dict[str, Any]:
    """The job once it has ended well; anything else is an error."""
    while True:
        job: dict[str, Any] = client.job(job_id)
        if job["status"] == "succeeded":
            return job
        if job["status"] not in ("validating_files", "queued", "running"):
            raise SystemExit(f"job {job_id} {job['status']}: {job['error']}")
        time.sleep(POLL_SECONDS)


@contextmanager
def service(url: str | None, key: str | None, workers: int) -> Iterator[Client]:
    """A client of the service named, or of one started in a home that is thrown away."""
    with ExitStack() as opened:
        if url is None or key is None:
            home = Home(Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="sweep-"))))
            opened.callback(StateHome(home.path).remove)
            environment = {**os.environ, "TRIMTAB_MODELS": str(models_folder())}
            stack = opened.enter_context(
                Stack(home, port=0, num_workers=workers, environment=environment, tell=print)
            )
            url, key = stack.url, stack.api_key
        yield opened.enter_context(Client(url, key))


def draw(outcomes: Sequence[Outcome], target: Path) -> None:
    """Held-out reward, KL and clipped share by range, a dot per seed."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra of its own

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    by_range = grouped(outcomes)
    panels = (
        ("reward", lambda each: each.judged),
        ("KL to the reference, nats per response", lambda each: each.kl),
        ("clipped tokens, share", lambda each: each.clip_fraction),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for place, rows in enumerate(by_range.values()):
            values = [value(each) for each in rows]
            axis.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
            axis.plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, "-k")
        axis.set_xticks(range(len(by_range)), list(by_range))
        axis.set_xlabel("clip range")
        axis.set_title(title, fontsize=9)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranges", nargs="+", default=["0.05", "0.1", "0.2", "0.4", OFF])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--url")
    parser.add_argument("--key")
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time")
    parser.add_argument("--engine", action="store_true", help="without the service")
    parser.add_argument("--device", default="cpu", help="of --engine")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, of --engine")
    parser.add_argument("--out", type=Path, default=Path("sweep"))
    arguments = parser.parse_args()
    what = (arguments.ranges, arguments.seeds, arguments.steps)
    if arguments.engine:
        outcomes, curves = run_engine(
            arguments.out / "runs", *what, device=arguments.device, parallel=arguments.parallel
        )
    else:
        with service(arguments.url, arguments.key, arguments.workers) as client:
            outcomes, curves = run(client, *what)
    write(arguments.out, outcomes, curves)


def write(out: Path, outcomes: Sequence[Outcome], curves: Mapping[str, Any]) -> None:
    """Table, figures and figure."""
    advice = recommend(outcomes)
    out.mkdir(parents=True, exist_ok=True)
    text = f"{table(outcomes)}\n\n{advice.sentence}\n"
    (out / "sweep.md").write_text(text, encoding="utf-8")
    stored = {
        "outcomes": [asdict(each) for each in outcomes],
        "recommendation": asdict(advice),
        "reward_mean": curves,
    }
    (out / "sweep.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    try:
        draw(outcomes, out / "sweep.svg")
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -e '.[bench]')")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
