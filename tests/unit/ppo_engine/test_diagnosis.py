"""Every syndrome on synthetic histories: when it is found, when it must not be, and since when."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_engine.diagnosis import Finding, Monitor, MonitorSettings, level_of
from ppo_engine.metrics import METRICS
from ppo_engine.syndromes import SYNDROMES, WATCHED, Code
from ppo_engine.verdicts import ClipVerdict

Values = dict[str, float | None]

HEALTHY: Mapping[str, float] = {
    "reward_mean": 0.3,
    "reward_std": 0.4,
    "reward_length_correlation": 0.1,
    "response_tokens_mean": 60.0,
    "truncated_response_fraction": 0.1,
    "kl_reference_per_sequence": 1.0,
    "kl_reference_per_token": 0.02,
    "entropy": 2.0,
    "reference_perplexity": 8.0,
    "distinct_2": 0.8,
    "repeated_4gram_fraction": 0.05,
    "longest_token_run_mean": 2.0,
    "identical_response_fraction": 0.05,
    "zero_advantage_group_fraction": 0.1,
    "update_kl_k3_max": 0.01,
    "ratio_max": 2.0,
    "policy_clip_fraction": 0.05,
    "ess_token": 0.97,
    "value_explained_variance": 0.4,
    "value_bias": 0.05,
    "return_std": 0.5,
    "value_clip_fraction": 0.1,
    "value_loss": 0.05,
    "grad_norm": 1.0,
    "log_ratio_abs_max": 0.7,
    "log_ratio_clamped_count": 0.0,
    "nonfinite_passes": 0.0,
    "sampler_mismatch_mean": 0.001,
    "sampler_mismatch_ratio": 1.001,
    "importance_weight_capped_fraction": 0.0,
}
SETTINGS: Mapping[str, Any] = {
    "kl_controller": "fixed",
    "target_kl_per_sequence": 6.0,
    "target_kl": 0.02,
    "group_size": 1,
    "has_critic": True,
    "value_clip_range": 0.2,
}
ADAPTIVE = {"kl_controller": "adaptive"}
GROUPS = {"group_size": 4, "has_critic": False}


def monitor(**changes: Any) -> Monitor:
    return Monitor(MonitorSettings(**{**SETTINGS, **changes}))


def healthy(**changes: float | None) -> Values:
    return {**HEALTHY, **changes}


def observe(watcher: Monitor, updates: Iterable[Values], *, first: int = 1) -> tuple[Finding, ...]:
    """What is found after the last update."""
    found: tuple[Finding, ...] = ()
    for step, values in enumerate(updates, start=first):
        found = watcher.observe(step, values)
    return found


def course(metric: str, values: Iterable[float | None]) -> list[Values]:
    """Updates in which one metric takes these values and nothing else happens."""
    return [healthy(**{metric: value}) for value in values]


@dataclass(frozen=True)
class Case:
    """Ten healthy updates, then these: what is said of the code at the end."""

    code: Code
    then: list[Values]
    level: str | None
    """None: it must not be found."""
    settings: dict[str, Any] = field(default_factory=dict)
    start: Values = field(default_factory=healthy)
    healthy_updates: int = 10
    metrics: tuple[str, ...] = ()
    """Those of the evidence, where it matters."""


def thrice(**changes: float | None) -> list[Values]:
    return [healthy(**changes)] * 3


def rising(metric: str, start: float, end: float) -> list[Values]:
    """Ten updates from one number to another, in even steps."""
    return course(metric, [start + (end - start) * i / 9 for i in range(10)])


def evaluated(held_out: list[float], reward: list[float], kl: list[float]) -> list[Values]:
    """Three updates of one reward and KL each, the last with a held-out reward; and so on."""
    return [
        healthy(reward_mean=r, kl_reference_per_sequence=k, valid_reward_mean=seen)
        for v, r, k in zip(held_out, reward, kl, strict=True)
        for seen in (None, None, v)
    ]


CASES = [
    # update_too_large: with target_kl 0.02 it warns above 0.03 and is critical above 0.1.
    Case("update_too_large", thrice(update_kl_k3_max=0.031), "warn"),
    Case("update_too_large", thrice(update_kl_k3_max=0.03), None),
    Case("update_too_large", thrice(update_kl_k3_max=0.11), "critical"),
    Case("update_too_large", thrice(update_kl_k3_max=0.031), "warn", {"target_kl": None}),
    Case("update_too_large", thrice(update_kl_k3_max=0.03), None, {"target_kl": None}),
    Case("update_too_large", thrice(update_kl_k3_max=0.29), None, {"target_kl": 0.2}),
    Case("update_too_large", thrice(update_kl_k3_max=0.31), "warn", {"target_kl": 0.2}),
    Case("update_too_large", thrice(update_kl_k3_max=0.61), "critical", {"target_kl": 0.2}),
    Case("update_too_large", thrice(ratio_max=10.1), "warn"),
    Case("update_too_large", thrice(ratio_max=10.0), None),
    Case("update_too_large", thrice(policy_clip_fraction=0.21), "warn"),
    Case("update_too_large", thrice(policy_clip_fraction=0.31), "critical"),
    Case("update_too_large", thrice(policy_clip_fraction=0.2), None),
    Case("update_too_large", thrice(ess_token=0.49), "warn"),
    Case("update_too_large", thrice(ess_token=0.5), None),
    Case("update_too_large", thrice(update_kl_k3_max=None), None),
    # kl_blow_up: a target only where the controller aims at it.
    Case("kl_blow_up", thrice(kl_reference_per_sequence=12.1), "warn", ADAPTIVE),
    Case("kl_blow_up", thrice(kl_reference_per_sequence=12.0), None, ADAPTIVE),
    Case("kl_blow_up", thrice(kl_reference_per_sequence=24.1), "critical", ADAPTIVE),
    Case("kl_blow_up", rising("kl_reference_per_sequence", 5.0, 12.0), "warn"),
    Case("kl_blow_up", rising("kl_reference_per_sequence", 5.0, 50.0), "critical"),
    Case("kl_blow_up", rising("kl_reference_per_sequence", 5.0, 10.0), None),
    Case("kl_blow_up", rising("kl_reference_per_sequence", 12.0, 12.5), None),
    Case("kl_blow_up", rising("kl_reference_per_sequence", 30.0, 20.0), None),
    Case("kl_blow_up", course("kl_reference_per_sequence", [12.0, 20.0] * 5), None),
    # Of 45 pairs 4 fall: τ = 37 / 45.
    Case(
        "kl_blow_up",
        course("kl_reference_per_sequence", [5.0, 7, 6, 9, 8, 11, 10, 13, 12, 14]),
        "warn",
    ),
    Case(
        "kl_blow_up",
        course("kl_reference_per_sequence", [5.0, 8.0, 11.0, 14.0, 17.0, 20.0, 23.0]),
        None,
        healthy_updates=0,
    ),
    Case("kl_blow_up", thrice(kl_reference_per_token=0.31), "warn"),
    Case("kl_blow_up", thrice(kl_reference_per_token=0.3), None),
    # negative_kl
    Case("negative_kl", thrice(kl_reference_per_sequence=-1.1), "critical"),
    Case("negative_kl", thrice(kl_reference_per_sequence=-1.0), None),
    Case("negative_kl", course("kl_reference_per_sequence", [-0.2] * 5), "warn"),
    Case("negative_kl", course("kl_reference_per_sequence", [-0.2] * 4), None),
    Case("negative_kl", course("kl_reference_per_sequence", [-0.2, -0.2, 0, -0.2, -0.2]), None),
    Case("negative_kl", course("kl_reference_per_sequence", [-0.001] * 9), None),
    # entropy_collapse: it starts at 2.0.
    Case("entropy_collapse", thrice(entropy=0.59), "warn"),
    Case("entropy_collapse", thrice(entropy=0.61), None),
    Case("entropy_collapse", thrice(entropy=0.19), "critical"),
    Case("entropy_collapse", thrice(distinct_2=0.39), "warn"),
    Case("entropy_collapse", thrice(distinct_2=0.41), None),
    Case("entropy_collapse", thrice(distinct_2=0.39, entropy=0.59), "critical"),
    Case("entropy_collapse", rising("entropy", 0.35, 0.15), "warn", start=healthy(entropy=0.4)),
    Case("entropy_collapse", rising("entropy", 0.35, 0.25), None, start=healthy(entropy=0.4)),
    Case("entropy_collapse", [healthy(entropy=0.15)] * 10, None, start=healthy(entropy=0.15)),
    # entropy_explosion
    Case("entropy_explosion", thrice(entropy=4.1), "warn"),
    Case("entropy_explosion", thrice(entropy=3.9), None),
    Case("entropy_explosion", thrice(entropy=4.1, reference_perplexity=16.1), "critical"),
    Case("entropy_explosion", thrice(reference_perplexity=40.0), None),
    # repetition: some models repeat themselves from the start.
    Case("repetition", thrice(repeated_4gram_fraction=0.21), "warn"),
    Case("repetition", thrice(repeated_4gram_fraction=0.41), "critical"),
    Case("repetition", thrice(repeated_4gram_fraction=0.2), None),
    Case(
        "repetition",
        thrice(repeated_4gram_fraction=0.41),
        None,
        start=healthy(repeated_4gram_fraction=0.3),
    ),
    Case("repetition", thrice(longest_token_run_mean=8.1), "warn"),
    Case("repetition", thrice(longest_token_run_mean=16.1), "critical"),
    Case("repetition", thrice(longest_token_run_mean=8.0), None),
    # reward_hacking: the held-out reward must show a tenth of the training reward's rise.
    Case("reward_hacking", evaluated([0.3, 0.3, 0.3], [0.3, 0.4, 0.6], [1.0, 2.0, 3.0]), "warn"),
    Case("reward_hacking", evaluated([0.3, 0.2, 0.1], [0.3, 0.4, 0.6], [1.0, 2.0, 3.0]), "warn"),
    Case("reward_hacking", evaluated([0.3, 0.4, 0.3], [0.3, 0.4, 0.6], [1.0, 2.0, 3.0]), None),
    Case("reward_hacking", evaluated([0.3, 0.3, 0.4], [0.3, 0.4, 0.6], [1.0, 2.0, 3.0]), None),
    Case("reward_hacking", evaluated([0.3, 0.3, 0.3], [0.3, 0.3, 0.45], [1.0, 2.0, 3.0]), None),
    Case("reward_hacking", evaluated([0.3, 0.3, 0.3], [0.3, 0.4, 0.6], [1.0, 1.0, 1.0]), None),
    Case("reward_hacking", evaluated([0.3, 0.3], [0.3, 0.9], [1.0, 3.0]), None),
    Case(
        "reward_hacking",
        thrice(reward_length_correlation=0.61, response_tokens_mean=91.0),
        "warn",
    ),
    Case("reward_hacking", thrice(reward_length_correlation=0.61, response_tokens_mean=89.0), None),
    Case("reward_hacking", thrice(reward_length_correlation=0.6, response_tokens_mean=91.0), None),
    Case("reward_hacking", thrice(identical_response_fraction=0.26), "warn"),
    Case("reward_hacking", thrice(identical_response_fraction=0.51), "critical"),
    Case("reward_hacking", thrice(identical_response_fraction=0.25), None),
    Case(
        "reward_hacking",
        thrice(
            identical_response_fraction=0.26,
            reward_length_correlation=0.61,
            response_tokens_mean=91.0,
        ),
        "critical",
    ),
    # length_explosion: it starts at 60 tokens, and a tenth of the answers is cut.
    Case("length_explosion", thrice(response_tokens_mean=121.0), "warn"),
    Case("length_explosion", thrice(response_tokens_mean=119.0), None),
    Case("length_explosion", thrice(response_tokens_mean=241.0), "critical"),
    Case("length_explosion", thrice(truncated_response_fraction=0.21), "warn"),
    Case("length_explosion", thrice(truncated_response_fraction=0.51), "critical"),
    Case("length_explosion", thrice(truncated_response_fraction=0.2), None),
    Case(
        "length_explosion",
        thrice(truncated_response_fraction=1.0),
        None,
        start=healthy(truncated_response_fraction=0.9),
    ),
    # length_collapse
    Case("length_collapse", thrice(response_tokens_mean=17.0), "warn"),
    Case("length_collapse", thrice(response_tokens_mean=19.0), None),
    Case("length_collapse", thrice(response_tokens_mean=5.0), "critical"),
    # value_divergence
    Case("value_divergence", course("value_explained_variance", [-0.1] * 5), "warn"),
    Case("value_divergence", course("value_explained_variance", [-0.1] * 4), None),
    Case("value_divergence", course("value_explained_variance", [0.0] * 5), None),
    Case(
        "value_divergence",
        course("value_explained_variance", [-0.1] * 9),
        None,
        healthy_updates=0,
        start=healthy(value_explained_variance=-0.1),
    ),
    Case("value_divergence", thrice(value_clip_fraction=0.51), "warn"),
    Case("value_divergence", thrice(value_clip_fraction=0.5), None),
    Case("value_divergence", thrice(value_clip_fraction=0.51), None, {"value_clip_range": None}),
    Case("value_divergence", thrice(value_clip_fraction=0.9), None, healthy_updates=0),
    Case("value_divergence", thrice(value_bias=-0.51), "warn"),
    Case("value_divergence", thrice(value_bias=0.5), None),
    Case("value_divergence", thrice(value_bias=0.5, return_std=0.0), None),
    Case("value_divergence", thrice(value_loss=0.51), "warn"),
    Case("value_divergence", thrice(value_loss=0.49), None),
    Case("value_divergence", thrice(value_loss=0.51, value_bias=0.51), "critical"),
    Case("value_divergence", thrice(value_loss=0.51), None, {"has_critic": False}),
    # sampler_mismatch
    Case("sampler_mismatch", thrice(sampler_mismatch_mean=0.021), "warn"),
    Case("sampler_mismatch", thrice(sampler_mismatch_mean=0.02), None),
    Case("sampler_mismatch", thrice(sampler_mismatch_ratio=1.021), "warn"),
    Case("sampler_mismatch", thrice(sampler_mismatch_ratio=1.051), "critical"),
    Case("sampler_mismatch", thrice(sampler_mismatch_ratio=1.02), None),
    Case("sampler_mismatch", thrice(importance_weight_capped_fraction=0.051), "warn"),
    Case("sampler_mismatch", thrice(importance_weight_capped_fraction=0.05), None),
    # zero_variance_reward
    Case("zero_variance_reward", thrice(reward_std=0.0), "critical"),
    Case("zero_variance_reward", course("reward_std", [0.0, 0.0]), None),
    Case("zero_variance_reward", course("reward_std", [0.0, 0.1, 0.0]), None),
    Case("zero_variance_reward", thrice(zero_advantage_group_fraction=0.51), "warn", GROUPS),
    Case("zero_variance_reward", thrice(zero_advantage_group_fraction=0.91), "critical", GROUPS),
    Case("zero_variance_reward", thrice(zero_advantage_group_fraction=0.5), None, GROUPS),
    Case("zero_variance_reward", thrice(zero_advantage_group_fraction=0.91), None),
    Case("zero_variance_reward", thrice(reward_limited_fraction=0.51), "warn"),
    Case("zero_variance_reward", thrice(reward_limited_fraction=0.91), "critical"),
    Case("zero_variance_reward", thrice(reward_limited_fraction=0.5), None),
    Case("zero_variance_reward", course("reward_limited_fraction", [1.0, 0.5, 1.0]), None),
    # numerics: told at once, critical when it comes again.
    Case("numerics", [healthy(nonfinite_passes=1.0)], "warn"),
    Case("numerics", [healthy(nonfinite_passes=1.0)] * 2, "critical"),
    Case("numerics", [healthy(grad_norm=None)] * 3, None),
    Case("numerics", [healthy(grad_norm=None)] * 3, None),
    Case("numerics", [healthy(nonfinite_passes=1.0), healthy(), healthy()], "warn"),
    Case("numerics", [healthy(nonfinite_passes=1.0), *[healthy()] * 3], None),
    Case("numerics", [healthy(log_ratio_abs_max=20.1)], "warn"),
    Case("numerics", [healthy(log_ratio_abs_max=20.0)], None),
    Case("numerics", [healthy(log_ratio_clamped_count=1.0)], "warn"),
    Case("numerics", [healthy(log_ratio_clamped_count=1.0)] * 2, "critical"),
    Case("numerics", [healthy(grad_norm=10.1)], "warn"),
    Case("numerics", [healthy(grad_norm=9.9)], None),
    Case("numerics", [healthy(grad_norm=10.1)], None, healthy_updates=4),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.code)
def test_a_syndrome_is_found_beyond_its_limit_and_not_before(case: Case) -> None:
    updates = [case.start] * case.healthy_updates + case.then

    found = observe(monitor(**case.settings), updates)

    assert {each.code: each.level for each in found}.get(case.code) == case.level


def test_every_syndrome_has_cases_of_both_kinds() -> None:
    told = {case.code for case in CASES if case.level} | {"clip"}
    silent = {case.code for case in CASES if case.level is None} | {"clip"}

    assert told == silent == set(SYNDROMES) == set(get_args(Code))


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_with_noise_shows_nothing(seed: int) -> None:
    noise = random.Random(seed)
    watcher = monitor()

    for step in range(1, 61):
        values: Values = {name: x * noise.uniform(0.6, 1.4) for name, x in HEALTHY.items()}
        values["sampler_mismatch_ratio"] = 1 + noise.uniform(0.0, 0.002)
        values["ess_token"] = noise.uniform(0.9, 1.0)
        values["kl_reference_per_sequence"] = noise.gauss(0.02 * step, 0.05)
        values["valid_reward_mean"] = noise.gauss(0.3, 0.05) if step % 10 == 0 else None

        assert watcher.observe(step, values) == ()


def test_nothing_known_shows_nothing() -> None:
    nothing: list[Values] = [{}, dict.fromkeys(HEALTHY)]

    assert observe(monitor(), nothing * 10) == ()


SPIKES = {
    "update_too_large": {"ratio_max": 1e6},
    "kl_blow_up": {"kl_reference_per_token": 9.0},
    "negative_kl": {"kl_reference_per_sequence": -9.0},
    "entropy_collapse": {"entropy": 0.0},
    "entropy_explosion": {"entropy": 99.0},
    "repetition": {"repeated_4gram_fraction": 1.0},
    "reward_hacking": {"identical_response_fraction": 1.0},
    "length_explosion": {"response_tokens_mean": 999.0},
    "length_collapse": {"response_tokens_mean": 0.0},
    "value_divergence": {"value_loss": 99.0},
    "sampler_mismatch": {"sampler_mismatch_ratio": 9.0},
    "zero_variance_reward": {"reward_std": 0.0},
}


@pytest.mark.parametrize("code", SPIKES)
def test_one_odd_update_raises_nothing(code: str) -> None:
    watcher = monitor()
    observe(watcher, [healthy()] * 10)

    odd = watcher.observe(11, healthy(**SPIKES[code]))
    after = [watcher.observe(step, healthy()) for step in (12, 13)]

    assert [odd, *after] == [(), (), ()]


def test_one_good_update_does_not_end_a_finding() -> None:
    watcher = monitor()
    bad = healthy(response_tokens_mean=200.0)
    observe(watcher, [healthy()] * 10)

    levels = [level_of(watcher.observe(s, v)) for s, v in enumerate([bad, bad, healthy(), bad], 11)]

    assert levels == ["ok", "warn", "warn", "warn"]


def test_a_finding_knows_since_when_it_is_there_without_a_break() -> None:
    """Two of three updates are odd from step 7 to 9, and again from step 13."""
    watcher, odd, fine = monitor(), healthy(ratio_max=50.0), healthy()
    updates = [*[fine] * 5, odd, odd, odd, fine, fine, fine, odd, odd, odd]

    since = [
        {each.since_step for each in watcher.observe(step, values)}
        for step, values in enumerate(updates, start=1)
    ]

    assert since == [*[set()] * 6, {7}, {7}, {7}, *[set()] * 3, {13}, {13}]


def test_the_first_five_updates_are_what_later_ones_are_compared_with() -> None:
    """The mean of 20, 40, 60, 80, 100 is 60; doubled it is 120."""
    start = course("response_tokens_mean", [20.0, 40.0, 60.0, 80.0, 100.0])

    below = observe(monitor(), [*start, *thrice(response_tokens_mean=119.0)])
    above = observe(monitor(), [*start, *thrice(response_tokens_mean=121.0)])

    assert [each.code for each in below] == []
    assert [(each.code, each.evidence[0].threshold) for each in above] == [
        ("length_explosion", 120.0)
    ]


def test_nothing_is_compared_before_the_first_five_updates_are_over() -> None:
    swing = course("response_tokens_mean", [10.0, 10.0, 10.0, 900.0, 900.0])

    assert observe(monitor(), swing) == ()


def test_a_jump_of_the_gradient_after_the_critics_warm_up_is_no_explosion() -> None:
    watcher = monitor()
    frozen = verdict("inactive_by_construction", cause="frozen_adapter")
    for step in range(1, 8):
        watcher.observe(step, healthy(grad_norm=0.01), frozen)

    found = [watcher.observe(step, healthy(grad_norm=1.0)) for step in range(8, 18)]

    assert found == [()] * 10


def test_the_usual_gradient_follows_slowly() -> None:
    """From 1 the mean moves to .9 + .1 · 11 = 2 with one update of 11; ten times that is 20."""
    watcher = monitor()
    observe(watcher, [*[healthy()] * 10, healthy(grad_norm=11.0), *[healthy(grad_norm=2.0)] * 3])

    quiet = watcher.observe(15, healthy(grad_norm=19.9))
    found = watcher.observe(16, healthy(grad_norm=(0.9 * 2 + 0.1 * 19.9) * 10 + 0.1))

    assert quiet == ()
    assert [each.code for each in found] == ["numerics"]


def verdict(name: Any, *, cause: Any = None, **numbers: float) -> ClipVerdict:
    return ClipVerdict(
        verdict=name,
        one_sided=False,
        sentence=f"It is {name}.",
        suggestion="Do something.",
        numbers=dict(numbers),
        cause=cause,
    )


@pytest.mark.parametrize(
    ("name", "numbers", "evidence", "param"),
    [
        ("inactive_by_construction", {}, ("policy_clip_fraction", 0.0, 0.0), "epochs"),
        (
            "numeric_noise",
            {"noise_log_ratio_abs_max": 0.3, "noise_limit": 0.1},
            ("log_ratio_abs_max", 0.3, 0.1),
            "precision",
        ),
        ("dead", {"update_kl_k3": 1e-7}, ("update_kl_k3", 1e-7, 1e-5), "learning_rate"),
        (
            "tight",
            {"policy_clip_fraction": 0.4, "clipped_advantage_mass": 0.6},
            ("policy_clip_fraction", 0.4, 0.3),
            "learning_rate",
        ),
        (
            "tight",
            {"policy_clip_fraction": 0.2, "clipped_advantage_mass": 0.6},
            ("clipped_advantage_mass", 0.6, 0.5),
            "learning_rate",
        ),
    ],
)
def test_a_clip_verdict_that_stays_for_three_updates_is_a_finding(
    name: str, numbers: dict[str, float], evidence: tuple[str, float, float], param: str
) -> None:
    watcher, bad = monitor(), verdict(name, **numbers)

    early = [watcher.observe(step, healthy(), bad) for step in (1, 2)]
    (found,) = watcher.observe(3, healthy(), bad)

    assert early == [(), ()]
    assert (found.code, found.level, found.since_step) == ("clip", "warn", 3)
    (shown,) = found.evidence
    assert (shown.metric, shown.value, shown.threshold) == evidence
    assert found.actions[0].param == param
    assert found.actions[0].text == "Do something."


@pytest.mark.parametrize(
    "verdicts",
    [
        [verdict("ok")] * 5,
        [verdict("tight"), verdict("tight"), None],
        [verdict("tight"), verdict("ok"), verdict("tight")],
        [verdict("dead"), verdict("tight"), verdict("tight")],
        [verdict("inactive_by_construction", cause="frozen_adapter")] * 5,
    ],
)
def test_other_clip_verdicts_are_no_finding(verdicts: list[ClipVerdict | None]) -> None:
    watcher = monitor()

    found = [watcher.observe(step, healthy(), each) for step, each in enumerate(verdicts, 1)]

    assert found == [()] * len(verdicts)


@pytest.mark.parametrize(
    "changes", [{"entropy": 0.1}, {"repeated_4gram_fraction": 0.9}], ids=["entropy", "repetition"]
)
def test_policy_collapse_is_called_by_its_name(changes: dict[str, float]) -> None:
    (found,) = observe(monitor(), [*[healthy()] * 10, *thrice(**changes)])

    assert "Policy collapse" in found.message


def all_findings() -> list[Finding]:
    """One finding of every case, and of a clip verdict."""
    found = []
    for case in CASES:
        updates = [case.start] * case.healthy_updates + case.then
        found += [
            each for each in observe(monitor(**case.settings), updates) if each.code == case.code
        ]
    watcher = monitor()
    for step in (1, 2, 3):
        clips = watcher.observe(step, healthy(), verdict("tight"))
    return [*found, *clips]


def test_every_finding_has_evidence_by_known_names_and_advice() -> None:
    for found in all_findings():
        assert found.message.endswith("."), found
        assert found.evidence, found
        assert found.actions, found
        assert {each.metric for each in found.evidence} <= set(METRICS), found
        assert all((each.kind == "setting") == (each.param is not None) for each in found.actions)


def test_a_finding_is_json() -> None:
    (found,) = observe(monitor(), [*[healthy()] * 10, *thrice(ratio_max=50.0)])

    told = json.loads(json.dumps(found.to_dict()))

    assert told == found.to_dict()
    assert (told["code"], told["level"], told["since_step"]) == ("update_too_large", "warn", 12)
    assert told["evidence"] == [
        {"metric": "ratio_max", "step": 13, "value": 50.0, "threshold": 10.0, "window": 3}
    ]
    assert told["actions"][1] == {
        "kind": "setting",
        "param": "learning_rate",
        "text": "Halve learning_rate.",
    }


def test_watched_metrics_are_metrics() -> None:
    assert WATCHED - set(METRICS) == set()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [([], "ok"), (["warn"], "warn"), (["warn", "critical"], "critical")],
)
def test_the_level_of_findings_is_the_worst(levels: list[Any], expected: str) -> None:
    found = [
        Finding(code="clip", level=level, since_step=1, message="It is.", evidence=(), actions=())
        for level in levels
    ]

    assert level_of(found) == expected


wild = st.fixed_dictionaries(
    {
        name: st.one_of(
            st.none(), st.just(x), st.floats(-100, 100, allow_subnormal=False), st.just(math.nan)
        )
        for name, x in {**HEALTHY, "valid_reward_mean": 0.3}.items()
    }
)
verdicts_drawn = st.sampled_from(
    [None, verdict("ok"), verdict("tight"), verdict("dead", cause="small_learning_rate")]
)


@settings(max_examples=60, deadline=None)
@given(
    updates=st.lists(st.tuples(wild, verdicts_drawn), min_size=2, max_size=25),
    middle=st.integers(1, 24),
    has_forgotten=st.booleans(),
)
def test_a_monitor_restored_in_the_middle_says_the_same(
    updates: list[tuple[Values, ClipVerdict | None]], middle: int, *, has_forgotten: bool
) -> None:
    whole, first = monitor(), monitor()
    for step, each in enumerate(updates[:middle], 1):
        whole.observe(step, *each)
        first.observe(step, *each)
    if has_forgotten:
        whole.forget_recent()
        first.forget_recent()

    second = monitor()
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))

    rest = list(enumerate(updates[middle:], middle + 1))
    assert [whole.observe(step, *each) for step, each in rest] == [
        second.observe(step, *each) for step, each in rest
    ]
    assert whole.state() == second.state()


def test_a_monitors_memory_is_bounded() -> None:
    watcher = monitor()
    sizes = []
    for updates in (20, 500):
        observe(watcher, [healthy(valid_reward_mean=0.3)] * updates)
        sizes.append(len(json.dumps(watcher.state())))

    assert sizes[1] - sizes[0] < 20


def test_what_a_monitor_forgot_no_longer_counts_but_its_start_does() -> None:
    watcher = monitor()
    observe(watcher, [*[healthy()] * 10, *thrice(response_tokens_mean=200.0)])

    watcher.forget_recent()
    at_once = watcher.observe(11, healthy(response_tokens_mean=200.0))
    again = watcher.observe(12, healthy(response_tokens_mean=200.0))

    assert at_once == ()
    assert [(each.code, each.since_step) for each in again] == [("length_explosion", 12)]
