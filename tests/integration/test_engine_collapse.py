"""A run set up to collapse: it is found and named, and with guards it ends usable.

The same on the real model: `benchmarks/collapse.py`.
"""

from pathlib import Path
from statistics import median

import pytest

from ppo_engine.guards import GuardConfig
from ppo_engine.reports import EngineEvent, StepReport
from tests.tiny_run import tiny_config, tiny_trainer

SEEDS = (0, 1, 2)
"""Such a run is chaotic: another rounding, so another CPU, takes another path."""


def collapsing_run(model: Path, preset: str, seed: int) -> list[StepReport]:
    """A rate far too high, no KL penalty, practically no clipping, a reward easy to exploit."""
    config = tiny_config(
        total_steps=32,
        batch_size=16,
        micro_batch_size=16,
        minibatches=1,
        epochs=4,
        clip_low=0.99,
        clip_high=10.0,
        kl_coef=0.0,
        learning_rate=0.02,
        max_response_tokens=16,
        checkpoint_interval=1,
        eval_interval=4,
        guards=GuardConfig(preset=preset, rules=()),
    )
    return list(tiny_trainer(model, config, seed=seed).steps())


@pytest.fixture(scope="module")
def unguarded(tiny_model: Path) -> list[list[StepReport]]:
    return [collapsing_run(tiny_model, "warn", seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> list[list[StepReport]]:
    return [collapsing_run(tiny_model, "strict", seed) for seed in SEEDS]


def events_of(reports: list[StepReport], code: str) -> list[EngineEvent]:
    return [event for report in reports for event in report.events if event.code == code]


def last_median(runs: list[list[StepReport]], name: str) -> float:
    return median(run[-1].values[name] for run in runs)


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_the_collapse_is_found_and_named_with_its_evidence(
    unguarded: list[list[StepReport]], number: int
) -> None:
    run = unguarded[number]
    first, last = run[0].values, run[-1].values
    told = events_of(run, "diagnosis.changed")[-1]
    (finding,) = [one for one in told.data["details"] if one["code"] == "entropy_collapse"]

    # It did collapse: a few answers, with little left to say.
    assert last["entropy"] < 0.5 * first["entropy"]
    assert last["distinct_2"] < 0.5 * first["distinct_2"]
    assert {"kl_blow_up", "entropy_collapse"} <= set(told.data["findings"])
    assert told.data["level"] == "critical"
    assert "policy collapse" in finding["message"].lower()
    assert finding["evidence"]
    for evidence in finding["evidence"]:
        assert evidence["value"] < evidence["threshold"]
    assert finding["actions"]


def test_without_guards_nothing_is_done_about_it(unguarded: list[list[StepReport]]) -> None:
    for run in unguarded:
        assert len(run) == 32
        assert not events_of(run, "guard.fired")


def test_with_guards_the_same_run_ends_usable(
    unguarded: list[list[StepReport]], guarded: list[list[StepReport]]
) -> None:
    found = []
    for run in guarded:
        assert "rollback" in {event.data["action"] for event in events_of(run, "guard.fired")}
        assert run[-1].values["reward_mean"] > run[0].values["reward_mean"]
        found += events_of(run, "diagnosis.changed")[-1].data["findings"]

    # Most still say many things, and have learned all the same.
    for name in ("entropy", "distinct_2"):
        first = median(run[0].values[name] for run in guarded)
        assert last_median(guarded, name) > 0.35 * first
        assert last_median(guarded, name) > 1.5 * last_median(unguarded, name)
    assert last_median(guarded, "repeated_4gram_fraction") < 0.2
    assert found.count("entropy_collapse") < len(SEEDS) / 2
    assert found.count("repetition") < len(SEEDS) / 2


def test_both_runs_begin_alike(
    unguarded: list[list[StepReport]], guarded: list[list[StepReport]]
) -> None:
    names = ("reward_mean", "entropy", "policy_loss", "ratio_max")

    for without, with_guards in zip(unguarded, guarded, strict=True):
        for name in names:
            assert with_guards[0].values[name] == without[0].values[name]
