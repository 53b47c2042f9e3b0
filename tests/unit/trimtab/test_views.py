import io
import json
from typing import Any

import pytest
from rich.console import Console

from trimtab.demo import SHIPPED
from trimtab.views import (
    Comparison,
    Estimate,
    History,
    LiveProgress,
    PlainProgress,
    Point,
    answers_table,
    clip_verdict,
    comparison_table,
    duration,
    job_lines,
    plain,
    progress_for,
    sparkline,
    step_line,
)


def point(step: int, *, at: float = 0.0, **values: float | None) -> Point:
    known: dict[str, Any] = {
        "reward": 0.25,
        "kl": 1.5,
        "clipped": 0.05,
        "clipped_high": 0.03,
        "clipped_low": 0.02,
    }
    return Point(step=step, at=at, **{**known, **values})


def rendered(*things: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    for thing in things:
        console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def comparison(difference: float, standard_error: float) -> Comparison:
    return Comparison(
        num_prompts=16,
        samples_per_prompt=8,
        base=Estimate(mean=0.3, standard_error=0.04),
        adapter=Estimate(mean=0.3 + difference, standard_error=0.03),
        difference=Estimate(mean=difference, standard_error=standard_error),
    )


def test_a_line_tells_step_time_reward_kl_and_clip_fraction() -> None:
    history = History(30)
    history.add(point(1, at=100))
    history.add(point(3, at=120))

    assert step_line(history) == ("step  3/30  left  4m 30s  reward +0.250  KL 1.50  clipped 5.0 %")


def test_missing_numbers_are_dashes() -> None:
    history = History(9)
    history.add(point(1, reward=None, kl=None, clipped=None))

    assert step_line(history) == "step 1/9  left       -  reward -  KL -  clipped -"


def test_time_left_follows_the_pace_so_far() -> None:
    history = History(10)
    history.add(point(1, at=50))
    history.add(point(2, at=57))
    history.add(point(5, at=70))

    assert history.seconds_left() == pytest.approx(25.0)  # 5 seconds a step, 5 to go


def test_a_repeated_step_replaces_what_followed_it() -> None:
    history = History(10)
    for step in (1, 2, 3, 2):
        history.add(point(step))

    assert [each.step for each in history.points] == [1, 2]


def test_a_stream_item_becomes_a_point() -> None:
    item = {
        "type": "metrics",
        "step": 4,
        "created_at": 1795600000,
        "values": {"reward_mean": 0.5, "kl_reference_per_sequence": None},
    }

    found = Point.of(item)

    assert (found.step, found.at, found.reward, found.kl) == (4, 1795600000, 0.5, None)


def test_without_a_terminal_progress_is_lines() -> None:
    console = Console(file=io.StringIO())

    assert isinstance(progress_for(console), PlainProgress)
    assert isinstance(progress_for(Console(force_terminal=True)), LiveProgress)


def test_plain_progress_prints_one_line_per_step_whatever_the_width() -> None:
    console = Console(file=io.StringIO(), width=20)
    history = History(2)

    with progress_for(console) as progress:
        for step in (1, 2):
            history.add(point(step))
            progress.show(history)

    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 2


def test_live_progress_shows_the_newest_step() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    history = History(7)
    history.add(point(6))

    with progress_for(console) as progress:
        progress.show(history)

    assert isinstance(console.file, io.StringIO)
    assert "step 6/7" in console.file.getvalue()
    assert "clipped tokens" in console.file.getvalue()


def test_a_sparkline_spans_low_to_high() -> None:
    assert sparkline([0.0, None, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([None]) == ""


@pytest.mark.parametrize(
    ("difference", "standard_error", "is_improved"),
    [(0.3, 0.05, True), (0.1, 0.05, False), (0.09, 0.05, False), (-0.3, 0.05, False)],
)
def test_an_improvement_is_more_than_two_standard_errors(
    difference: float, standard_error: float, *, is_improved: bool
) -> None:
    found = comparison(difference, standard_error)

    assert found.is_improved is is_improved
    assert ("did NOT rise" in found.verdict()) is not is_improved


def test_the_table_shows_means_with_standard_errors() -> None:
    text = rendered(comparison_table(comparison(0.3, 0.05)))

    for shown in ("16 held-out prompts", "8 answers each", "+0.300 ± 0.040", "+0.600 ± 0.030"):
        assert shown in text


def test_a_summary_becomes_a_comparison() -> None:
    summary = {
        "prompts": 2,
        "samples_per_prompt": 4,
        "base": {"mean": 0.1, "standard_error": 0.01},
        "adapter": {"mean": 0.4, "standard_error": 0.02},
        "difference": {"mean": 0.3, "standard_error": 0.03},
    }

    assert Comparison.of(summary).difference == Estimate(mean=0.3, standard_error=0.03)


def test_answers_are_shown_side_by_side_as_text_only() -> None:
    row = {
        "prompt": "How was it?",
        "base": [{"text": "[red]bad[/red]\x1b[2J", "score": -0.5}],
        "adapter": [{"text": "Wonderful\n\nindeed", "score": 0.75}],
    }

    text = rendered(answers_table([row]))

    assert "[red]bad[/red]" in text
    assert "\x1b" not in text
    assert "-0.50" in text
    assert "+0.75" in text


def test_plain_text_has_no_control_characters() -> None:
    assert plain("a\x1b[31m\nb\u202ec\x9bd é") == "a [31m b c d é"


@pytest.mark.parametrize(
    ("clipped", "words"),
    [
        (0.0, "never bound"),
        (0.005, "seldom bound"),
        (0.05, "a usual amount"),
        (0.2, "a busy amount"),
        (0.4, "too much"),
    ],
)
def test_the_clip_verdict_follows_the_fraction(clipped: float, words: str) -> None:
    points = [point(step, clipped=clipped, clipped_high=0.0, clipped_low=0.0) for step in (1, 2)]

    assert words in clip_verdict(points, 0.2)


def test_the_clip_verdict_tells_mean_maximum_and_side() -> None:
    points = [
        point(1, clipped=0.02, clipped_high=0.02, clipped_low=0.0),
        point(2, clipped=0.06, clipped_high=0.06, clipped_low=0.0),
    ]

    sentence = clip_verdict(points, 0.2)

    assert "the range 0.2 took the gradient from 4.0 % of the tokens" in sentence
    assert "6.0 % in the busiest step" in sentence
    assert "at the upper bound" in sentence


def test_balanced_clipping_names_no_side() -> None:
    assert "Nearly all of it" not in clip_verdict([point(1)], 0.2)


def test_no_recorded_clipping_is_said() -> None:
    assert clip_verdict([point(1, clipped=None)], 0.2) == "Clipping: nothing was recorded."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0m 00s"), (59.6, "1m 00s"), (3599, "59m 59s"), (3661, "1h 01m")],
)
def test_durations_read_like_a_clock(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_failed_job_tells_why() -> None:
    job = {
        "id": "ftjob-1",
        "status": "failed",
        "model": "m",
        "progress": {"step": 2, "total_steps": 9},
        "latest": None,
        "error": {"code": "reward_failed", "message": "The grader answered with NaN."},
    }

    lines = job_lines(job)

    assert "step     2 of 9" in lines
    assert lines[-1] == "error    The grader answered with NaN. [reward_failed]"


@pytest.mark.parametrize(
    ("phase", "reached", "line"),
    [
        ("training", None, "status   paused (training)"),
        (None, "max_generated_tokens", "status   paused (at its max_generated_tokens)"),
        (None, None, "status   paused"),
    ],
)
def test_a_job_tells_what_goes_on_in_its_state(
    phase: str | None, reached: str | None, line: str
) -> None:
    job = {"id": "j", "status": "paused", "model": "m", "phase": phase}

    assert job_lines(job | {"limits": {"reached": reached}})[1] == line
    assert job_lines(job | {"limits": None})[1] == line.replace(
        " (at its max_generated_tokens)", ""
    )


def test_the_shipped_prompts_are_64_and_16_and_share_none() -> None:
    def prompts(name: str) -> list[str]:
        lines = (SHIPPED / name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        assert all(row[-1]["role"] == "user" for row in rows)
        return [row[-1]["content"] for row in rows]

    training, heldout = prompts("prompts.jsonl"), prompts("heldout.jsonl")

    assert (len(set(training)), len(set(heldout))) == (64, 16)
    assert not set(training) & set(heldout)


def test_the_shipped_job_names_no_files_of_its_own() -> None:
    spec = json.loads((SHIPPED / "job.json").read_text(encoding="utf-8"))

    assert spec["method"]["type"] == "ppo"
    assert not {"training_file", "validation_file"} & set(spec)
