"""What the sweep concludes; the sweep itself is a benchmark."""

import dataclasses

import pytest

from benchmarks.clip_sweep import (
    PRACTICALLY_OFF,
    Outcome,
    grouped,
    outcome_of,
    range_settings,
    recommend,
    table,
)


def outcome(name: str, seed: int, held_out_reward: float) -> Outcome:
    return Outcome(
        range=name,
        seed=seed,
        status="succeeded",
        steps=24,
        held_out_reward=held_out_reward,
        reward=0.5,
        kl=3.0,
        entropy=2.0,
        clip_fraction=0.1,
        largest_update_kl=0.02,
        largest_ratio=2.0,
        findings=(),
        seconds_per_step=1.0,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.2", {"clip_range": 0.2, "clip_range_high": 0.2}),
        ("0.2:0.28", {"clip_range": 0.2, "clip_range_high": 0.28}),
        ("off", PRACTICALLY_OFF),
    ],
)
def test_a_range_is_read_as_it_is_written(name, expected):
    assert range_settings(name) == expected


def test_a_lead_that_every_seed_shows_is_clear():
    # Seeds differ by far more than ranges do, but each seed says the same.
    rows = [outcome("0.1", seed, seed + 0.10) for seed in (1, 2, 3)]
    rows += [outcome("0.2", seed, seed + 0.20 + 0.001 * seed) for seed in (1, 2, 3)]

    advice = recommend(rows)

    assert (advice.range, advice.confidence) == ("0.2", "clear")


def test_a_lead_within_chance_is_none():
    rows = [outcome("0.1", seed, lead) for seed, lead in ((1, 0.5), (2, 0.1), (3, 0.3))]
    rows += [outcome("0.2", seed, lead) for seed, lead in ((1, 0.1), (2, 0.5), (3, 0.33))]

    advice = recommend(rows)

    # Leads of 0.2 over 0.1: -0.4, 0.4, 0.03; mean 0.01, standard error 0.23.
    assert (advice.range, advice.confidence) == ("0.2", "none")
    assert "+0.010 ± 0.231 over 3 seeds" in advice.sentence


def test_a_lead_that_three_seeds_make_likely_is_leaning():
    # Leads 0.0, 0.1, 0.2: mean 0.1, standard error 0.1/√3 = 0.0577, so 1.73 of them.
    rows = [outcome("a", seed, 0.0) for seed in (1, 2, 3)]
    rows += [outcome("b", seed, lead) for seed, lead in ((1, 0.0), (2, 0.1), (3, 0.2))]

    assert recommend(rows).confidence == "leaning"


def test_one_seed_tells_nothing():
    advice = recommend([outcome("0.1", 1, 0.1), outcome("0.2", 1, 0.9)])

    assert (advice.range, advice.confidence) == ("0.2", "unknown")
    assert "1 seed cannot tell" in advice.sentence


def test_pairs_are_made_by_seed_in_whatever_order_jobs_ended():
    rows = [outcome("a", seed, float(seed)) for seed in (3, 1, 2)]
    rows += [outcome("b", seed, seed + 0.1) for seed in (2, 3, 1)]

    assert [each.seed for each in grouped(rows)["a"]] == [1, 2, 3]
    assert recommend(rows).confidence == "clear"


def test_the_table_has_a_row_per_range():
    rows = [outcome("0.1", seed, 0.1 * seed) for seed in (1, 2)]
    rows.append(dataclasses.replace(outcome("off", 1, 0.4), findings=("repetition",)))

    lines = table(rows).splitlines()

    assert len(lines) == 4
    # Mean of 0.1 and 0.2, and their standard error: 0.0707/√2.
    assert lines[2].startswith("| 0.1 | 0.150 ± 0.050 |")
    assert "| repetition |" in lines[3]


def test_an_outcome_is_read_off_what_the_api_says():
    series = {
        "valid_reward_mean": [None, 0.3, 0.6],
        "reward_mean": [0.0, 0.3, 0.6],
        "kl_reference_per_sequence": [0.0, 1.0, 2.0],
        "entropy": [3.0, 2.0, 1.0],
        "policy_clip_fraction": [0.0, 0.1, 0.2],
        "update_kl_k3_max": [0.01, 0.3, 0.02],
        "ratio_max": [1.0, 7.0, 2.0],
        **{f"seconds.{part}": [1.0, 2.0, 9.0] for part in ("sample", "score", "estimate", "learn")},
    }
    job = {"metadata": {"range": "0.2"}, "seed": 4, "status": "succeeded"}
    events = [
        {"code": "diagnosis.changed", "data": {"findings": ["repetition", "clip"]}},
        {"code": "guard.fired", "data": {}},
        {"code": "diagnosis.changed", "data": {"findings": ["clip"]}},
    ]

    found = outcome_of(job, {"series": series}, events)

    assert found.held_out_reward == 0.6
    assert found.reward == pytest.approx(0.3)
    assert (found.largest_update_kl, found.largest_ratio) == (0.3, 7.0)
    assert found.findings == ("clip", "repetition")
    assert found.seconds_per_step == 8.0


def test_without_held_out_prompts_the_training_reward_decides():
    rows = [
        dataclasses.replace(outcome(name, seed, 0.0), held_out_reward=None, reward=reward + seed)
        for name, reward in (("0.1", 0.2), ("0.2", 0.4))
        for seed in (1, 2, 3)
    ]

    assert recommend(rows).range == "0.2"
    assert table(rows).splitlines()[2].startswith("| 0.1 | – |")
