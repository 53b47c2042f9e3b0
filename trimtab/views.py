"""What the terminal shows: progress, tables and sentences.  Texts of models are shown as text only.

Nothing here asks a server or reads a file.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

QUIET, BUSY, TIGHT = 0.01, 0.10, 0.30
"""Clip fractions at which the verdict changes (`docs/ppo.md`)."""

_DEAD = 1e-4
_ONE_SIDED = 5.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_COLUMNS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One training step, as its metrics tell it; None where a number is missing."""

    step: int
    at: float
    reward: float | None
    kl: float | None
    clipped: float | None
    clipped_high: float | None
    clipped_low: float | None

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Self:
        """The point of a `metrics` item of the stream."""
        values = item["values"]
        return cls(
            step=item["step"],
            at=item["created_at"],
            reward=values.get("reward_mean"),
            kl=values.get("kl_reference_per_sequence"),
            clipped=values.get("policy_clip_fraction"),
            clipped_high=values.get("policy_clip_fraction_high"),
            clipped_low=values.get("policy_clip_fraction_low"),
        )


@dataclass(slots=True)
class History:
    """The steps of one job so far."""

    total_steps: int
    points: list[Point] = field(default_factory=list)

    def add(self, point: Point) -> None:
        """Take in a step; one that a resumed attempt repeats replaces what followed it."""
        while self.points and self.points[-1].step >= point.step:
            self.points.pop()
        self.points.append(point)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.points[-1].step if self.points else 0

    def seconds_left(self) -> float | None:
        """Time to the last step at the pace so far; None before there is one."""
        if len(self.points) < 2:
            return None
        first, last = self.points[0], self.points[-1]
        pace = (last.at - first.at) / max(1, last.step - first.step)
        return pace * (self.total_steps - last.step)


class Progress(Protocol):
    """Shows a running job."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, history: History) -> None:
        """Show the newest step of the history."""

    def say(self, sentence: str) -> None:
        """Show something that happened."""


def progress_for(console: Console) -> Progress:
    """A moving picture on a terminal, a line per step anywhere else."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class PlainProgress:
    """One line per step."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def show(self, history: History) -> None:
        """Print the newest step."""
        self.say(step_line(history))

    def say(self, sentence: str) -> None:
        """Print the sentence."""
        self._console.print(Text(plain(sentence)), soft_wrap=True)


class LiveProgress:
    """A bar with the time left and three curves, drawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, history: History) -> None:
        """Draw the job anew."""
        self._live.update(job_picture(history))

    def say(self, sentence: str) -> None:
        """Print the sentence above the picture."""
        self._console.print(Text(plain(sentence)))


def step_line(history: History) -> str:
    """Step, time left, reward, KL and clip fraction of the newest step."""
    point = history.points[-1]
    width = len(str(history.total_steps))
    return (
        f"step {point.step:>{width}}/{history.total_steps}"
        f"  left {duration(history.seconds_left()):>7}"
        f"  reward {number(point.reward, '+.3f')}"
        f"  KL {number(point.kl, '.2f')}"
        f"  clipped {percent(point.clipped)}"
    )


def job_picture(history: History) -> RenderableType:
    """Bar, time left and the curves of reward, KL and clip fraction."""
    point = history.points[-1]
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(f"step {point.step}/{history.total_steps}", style="bold"),
        ProgressBar(total=history.total_steps, completed=point.step, width=40),
        Text(f"{duration(history.seconds_left())} left"),
    )
    curves = Table.grid(padding=(0, 2))
    for name, shown, values in (
        ("reward", number(point.reward, "+.3f"), [p.reward for p in history.points]),
        ("KL to the base", f"{number(point.kl, '.2f')} nats", [p.kl for p in history.points]),
        ("clipped tokens", percent(point.clipped), [p.clipped for p in history.points]),
    ):
        curves.add_row(Text(name), Text(shown, style="bold"), Text(sparkline(values)))
    return Group(head, curves)


def sparkline(values: Sequence[float | None]) -> str:
    """The last values as blocks of height, scaled to what is shown."""
    known = [value for value in values[-_SPARK_COLUMNS:] if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / span * top)] for value in known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Base against adapter on held-out prompts."""

    num_prompts: int
    samples_per_prompt: int
    base: Estimate
    adapter: Estimate
    difference: Estimate

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Self:
        """The comparison in a `summary.json`."""
        return cls(
            num_prompts=summary["prompts"],
            samples_per_prompt=summary["samples_per_prompt"],
            base=Estimate(**summary["base"]),
            adapter=Estimate(**summary["adapter"]),
            difference=Estimate(**summary["difference"]),
        )

    @property
    def is_improved(self) -> bool:
        """Whether the reward rose by more than twice the standard error of the difference."""
        return self.difference.mean > 2 * self.difference.standard_error

    def verdict(self) -> str:
        """What the numbers say, in one sentence."""
        times = self.difference.mean / self.difference.standard_error if self._has_noise else 0.0
        if self.is_improved:
            noise = f", {times:.0f} times its standard error" if self._has_noise else ""
            return f"The reward rose by {self.difference.mean:.3f}{noise}."
        return (
            f"The reward did NOT rise beyond the noise of the evaluation: {self.difference} "
            "(more than two standard errors are asked for)."
        )

    @property
    def _has_noise(self) -> bool:
        return self.difference.standard_error > 0


def comparison_table(comparison: Comparison) -> Table:
    """Mean reward before and after, with standard errors."""
    table = Table(
        title=f"Mean reward on {comparison.num_prompts} held-out prompts, "
        f"{comparison.samples_per_prompt} answers each",
        min_width=64,
    )
    table.add_column("model")
    table.add_column("mean ± standard error", justify="right")
    table.add_row("base", str(comparison.base))
    table.add_row("with the adapter", str(comparison.adapter))
    table.add_row("difference", str(comparison.difference), style="bold")
    return table


def answers_table(answers: Sequence[Mapping[str, Any]]) -> Table:
    """First answers of base and adapter side by side, with their scores."""
    table = Table(title="Answers before and after", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    table.add_column("base", ratio=3)
    table.add_column("with the adapter", ratio=3)
    for row in answers:
        table.add_row(
            Text(plain(row["prompt"])), _answer(row["base"][0]), _answer(row["adapter"][0])
        )
    return table


def _answer(answer: Mapping[str, Any]) -> Text:
    return Text.assemble((f"{answer['score']:+.2f}  ", "bold"), plain(answer["text"].strip()))


def clip_verdict(points: Sequence[Point], clip_range: float) -> str:
    """What clipping did in this run, in words."""
    clipped = [point.clipped for point in points if point.clipped is not None]
    if not clipped:
        return "Clipping: nothing was recorded."
    mean = statistics.fmean(clipped)
    opening = (
        f"Clipping: the range {clip_range:g} took the gradient from {percent(mean)} of the tokens "
        f"({percent(max(clipped))} in the busiest step): "
    )
    return opening + _clip_judgement(mean) + _clip_side(points)


def _clip_judgement(mean: float) -> str:
    if mean <= _DEAD:
        return "it never bound; the updates are too small for it to matter."
    if mean < QUIET:
        return "it seldom bound; the updates are small."
    if mean <= BUSY:
        return "a usual amount; it held single tokens back, not the learning."
    if mean <= TIGHT:
        return "a busy amount; larger updates would mostly be clipped away."
    return "too much; take a smaller learning rate, fewer epochs, or a wider range."


def _clip_side(points: Sequence[Point]) -> str:
    """A remark if one bound did nearly all the work."""
    high = sum(point.clipped_high or 0.0 for point in points)
    low = sum(point.clipped_low or 0.0 for point in points)
    if max(high, low) <= QUIET * len(points) or max(high, low) <= _ONE_SIDED * min(high, low):
        return ""
    bound = "upper" if high > low else "lower"
    return f" Nearly all of it at the {bound} bound."


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """A line per job."""
    table = Table()
    for column in ("job", "status", "step", "reward", "model"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        progress, latest = job.get("progress") or {}, job.get("latest") or {}
        table.add_row(
            plain(job["id"]),
            plain(job["status"]),
            f"{progress.get('step', 0)}/{progress.get('total_steps', '?')}",
            number(latest.get("reward_mean"), "+.3f"),
            Text(plain(job["model"])),
        )
    return table


def job_lines(job: Mapping[str, Any]) -> list[str]:
    """A job in a few lines."""
    progress, latest = job.get("progress") or {}, job.get("latest") or {}
    lines = [
        f"job      {job['id']}",
        f"status   {job['status']}" + _why(job),
        f"model    {job['model']}",
        f"step     {progress.get('step', 0)} of {progress.get('total_steps', '?')}",
        f"reward   {number(latest.get('reward_mean'), '+.3f')}",
        f"KL       {number(latest.get('kl_reference_per_sequence'), '.2f')} nats per response",
        f"clipped  {percent(latest.get('policy_clip_fraction'))} of the tokens",
    ]
    if error := job.get("error"):
        lines.append(f"error    {error.get('message')} [{error.get('code')}]")
    return [plain(line) for line in lines]


def _why(job: Mapping[str, Any]) -> str:
    """What goes on inside the status, or the limit at which a job stands."""
    if job.get("phase"):
        return f" ({job['phase']})"
    reached = (job.get("limits") or {}).get("reached")
    return f" (at its {reached})" if reached else ""


def models_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """A line per model in the cache."""
    table = Table()
    for column in ("id", "also called", "parameters", "context", "licence"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(
            Text(plain(entry["id"])),
            Text(plain(", ".join(entry["aliases"]))),
            f"{entry['parameters'] / 1e6:,.1f} M",
            str(entry["context_length"]),
            Text(plain(entry["licence"])),
        )
    return table


def plain(text: str) -> str:
    """The text without line breaks and control characters, which could move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def number(value: float | None, spec: str) -> str:
    """The number in this format, a dash where there is none."""
    return "-" if value is None else format(value, spec)


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Minutes and seconds, or hours and minutes."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
