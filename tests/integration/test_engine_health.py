"""Runs that watch themselves, over several updates and through a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.export import BaseModelRef
from ppo_engine.reports import StepReport
from ppo_engine.trainer import Trainer
from tests.guarded_run import NEVER_AGAIN, after_tokens, is_same, learned, taken, told, trainer_of

BASE = BaseModelRef(id="tests/tiny-random", path="unused", sha256="0" * 64)
TIMES = ("seconds.", "tokens_per_second", "peak_memory_bytes")


def test_a_halved_rate_is_what_the_optimizer_uses(tiny_model) -> None:
    slowed = trainer_of(tiny_model, {"action": "scale_lr", "cooldown": NEVER_AGAIN})
    plain = trainer_of(tiny_model)
    for trainer in (slowed, plain):
        taken(trainer, 1)
    before = learned(plain)
    assert is_same(before, learned(slowed))

    moves = []
    for trainer in (slowed, plain):
        next(trainer.steps())
        after = learned(trainer)
        name = "value_head.bias"
        moves.append((after[name] - before[name]).item())

    # The same samples and gradients: Adam's move is proportional to the rate.
    assert moves[0] == pytest.approx(moves[1] / 2, rel=1e-4)


def test_good_states_are_kept_at_checkpoints_where_a_rollback_is_possible(tiny_model) -> None:
    may = trainer_of(tiny_model, after_tokens(1000, "rollback"), checkpoint_interval=2)
    may_not = trainer_of(tiny_model, after_tokens(1000, "pause"), checkpoint_interval=2)

    kept = [may.health.last_good.step for _ in may.steps()]
    taken(may_not, 2)

    assert kept == [0, 2, 2, 4, 4, 6]
    assert may_not.health.last_good is None


def test_after_a_rollback_no_state_is_good_for_a_while(tiny_model) -> None:
    rule = after_tokens(2, "rollback", cooldown=NEVER_AGAIN)
    trainer = trainer_of(tiny_model, rule)

    kept = [trainer.health.last_good.step for _ in trainer.steps()]

    assert kept == [1, 1, 1, 1, 5, 6]


class Flat:
    """One reward for all at first, later different ones."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def grade(self, texts, _items):
        self._left -= 1
        return [0.5 if self._left >= 0 else float(row) for row in range(len(texts))]


def test_a_diagnosis_is_told_when_it_changes_and_then_not_again(tiny_model) -> None:
    trainer = trainer_of(tiny_model, scorer=Flat(5), learning_rate=1e-5)

    reports = [[event.data for event in told(r, "diagnosis.changed")] for r in trainer.steps()]

    codes = [[each["findings"] for each in events] for events in reports]
    assert all(len(events) <= 1 for events in codes)
    (came,) = (i for i, found in enumerate(codes) if found and "zero_variance_reward" in found[0])
    assert came == 2  # after three updates running
    assert not any(codes[3:5])
    assert "zero_variance_reward" not in codes[5][0]


class Lofty:
    """Rewards that differ little for their size."""

    def grade(self, texts, _items):
        return [1000.0 + row for row in range(len(texts))]


@pytest.mark.parametrize(
    ("scaling", "expected"), [("running_std", ["reward_limited_fraction"]), ("none", [])]
)
def test_rewards_that_scaling_made_alike_are_told(
    tiny_model, scaling: str, expected: list[str]
) -> None:
    trainer = trainer_of(tiny_model, scorer=Lofty(), learning_rate=1e-5, reward_scaling=scaling)

    reports = taken(trainer, 3)

    signals = [
        evidence["metric"]
        for event in told(reports[-1], "diagnosis.changed")
        for finding in event.data["details"]
        if finding["code"] == "zero_variance_reward"
        for evidence in finding["evidence"]
    ]
    assert reports[-1].values["reward_std"] > 0  # as the grader gave them, they differ
    assert signals == expected


FAR = {"learning_rate": 0.5, "epochs": 2, "target_kl": 1e-4, "kl_coef": 0.0}
"""Updates that go much too far."""


def test_the_preset_warn_tells_what_strict_acts_on_but_does_nothing(tiny_model) -> None:
    warned, strict = (
        trainer_of(tiny_model, preset=preset, scorer=Flat(0), **FAR)
        for preset in ("warn", "strict")
    )
    off = trainer_of(tiny_model, preset="off", scorer=Flat(0), **FAR)

    heard, acted, ignored = (taken(each, 2) for each in (warned, strict, off))

    def by_guards(reports: list[StepReport]) -> list[str]:
        fired = [event.data["guard"] for report in reports for event in told(report, "guard.fired")]
        return [guard for guard in fired if guard != "target_kl"]

    assert by_guards(heard) == by_guards(ignored) == []
    assert "strict.update_too_large" in by_guards(acted)
    findings = [event.data["findings"] for r in heard for event in told(r, "diagnosis.changed")]
    assert any("update_too_large" in each for each in findings)
    assert is_same(learned(warned), learned(off))
    assert not is_same(learned(strict), learned(off))


STRICT = {
    "preset": "strict",
    "total_steps": 7,
    "checkpoint_interval": 2,
    "kl_controller": "adaptive",
    "kl_horizon": 10,
}
GOES_BACK = after_tokens(4, "rollback", cooldown=NEVER_AGAIN)


def told_by(report: StepReport) -> Any:
    """Everything a report says but how long it took."""
    values = {name: x for name, x in report.values.items() if not name.startswith(TIMES)}
    events = [event for event in report.events if event.code != "self_check.passed"]
    passes = [each.stored_values() for each in report.passes]
    return values, events, passes, report.samples, report.tokens, report.wants_pause


def files_of(trainer: Trainer, folder: Path) -> Any:
    save_checkpoint(trainer, folder, BASE)
    return json.loads((folder / "manifest.json").read_text())["files"]


@pytest.fixture(scope="module")
def whole(tiny_model) -> tuple[Trainer, list[Any]]:
    """A run that nobody interrupts, and what it told."""
    trainer = trainer_of(tiny_model, GOES_BACK, **STRICT)
    return trainer, [told_by(report) for report in trainer.steps()]


@pytest.mark.parametrize("saved_after", [1, 3, 4, 5])
def test_a_run_that_goes_back_ends_the_same_though_it_was_interrupted(
    tiny_model, tmp_path, whole, saved_after: int
) -> None:
    """Before and after the rollback, which comes after step 4 and leads to step 2."""
    uninterrupted, expected = whole
    interrupted = trainer_of(tiny_model, GOES_BACK, **STRICT)
    steps = interrupted.steps()
    found = [told_by(next(steps)) for _ in range(saved_after)]
    save_checkpoint(interrupted, tmp_path / "ck", BASE)
    next(steps)  # work after the checkpoint is lost

    resumed = trainer_of(tiny_model, GOES_BACK, **STRICT)
    restore_checkpoint(resumed, tmp_path / "ck")
    found += [told_by(report) for report in resumed.steps()]

    fired = [event.data for _, events, *_ in expected for event in events]
    assert [data["to_step"] for data in fired if data.get("action") == "rollback"] == [2]
    assert found == expected
    assert is_same(learned(resumed), learned(uninterrupted))
    assert files_of(resumed, tmp_path / "a") == files_of(uninterrupted, tmp_path / "b")
