"""What guards decide: presets, a user's own rules, quiet times, and the limits of going back."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_engine.diagnosis import Evidence, Finding
from ppo_engine.errors import InvalidConfig
from ppo_engine.guards import (
    Action,
    Firing,
    GuardConfig,
    GuardRule,
    Guards,
    pass_action,
)
from ppo_engine.syndromes import Code

CODES = get_args(Code)
RULE = {
    "signal": "reward_std",
    "window": 1,
    "warn": 1.0,
    "critical": 2.0,
    "cooldown": 0,
    "action": "pause",
}


def finding(code: Any, level: Any = "critical") -> Finding:
    return Finding(
        code=code,
        level=level,
        since_step=4,
        message="Something is wrong.",
        evidence=(Evidence(metric="entropy", step=5, value=0.1, threshold=0.2, window=3),),
        actions=(),
    )


def rule(**changes: Any) -> GuardRule:
    return GuardRule(**{**RULE, **changes})


def guards(preset: Any = "off", *rules: GuardRule) -> Guards:
    return Guards(GuardConfig(preset=preset, rules=rules))


def actions(fired: tuple[Firing, ...]) -> list[str]:
    return [each.action for each in fired]


def decisions(guard: Guards, values: list[float | None], signal: str = "reward_std") -> list[Any]:
    """The one action of each update, or None."""
    fired = [guard.decide(step, (), {signal: value}) for step, value in enumerate(values, 1)]
    return [each[0].action if each else None for each in fired]


@pytest.mark.parametrize("preset", ["off", "warn"])
@pytest.mark.parametrize("level", ["warn", "critical"])
def test_off_and_warn_do_nothing_about_findings(preset: str, level: str) -> None:
    assert guards(preset).decide(5, [finding(code, level) for code in CODES], {}) == ()


@pytest.mark.parametrize("level", ["warn", "critical"])
@pytest.mark.parametrize("code", CODES)
def test_standard_only_pauses_on_a_critical_negative_kl(code: str, level: str) -> None:
    fired = guards("standard").decide(5, [finding(code, level)], {})

    assert actions(fired) == (["pause"] if (code, level) == ("negative_kl", "critical") else [])


STRICT = {
    "update_too_large": ("scale_lr", "rollback"),
    "kl_blow_up": ("scale_kl_coef", "rollback"),
    "negative_kl": ("pause", "pause"),
    "entropy_collapse": (None, "rollback"),
    "entropy_explosion": ("scale_lr", "scale_lr"),
    "repetition": (None, "rollback"),
    "reward_hacking": ("scale_kl_coef", "rollback"),
    "length_explosion": (None, None),
    "length_collapse": (None, None),
    "value_divergence": (None, "rollback"),
    "clip": (None, None),
    "sampler_mismatch": (None, "pause"),
    "zero_variance_reward": (None, "pause"),
    "numerics": (None, "rollback"),
}


@pytest.mark.parametrize("code", CODES)
def test_strict_acts_by_code_and_level(code: str) -> None:
    warn, critical = STRICT[code]

    mild = guards("strict").decide(5, [finding(code, "warn")], {})
    severe = guards("strict").decide(5, [finding(code, "critical")], {})

    assert actions(mild) == ([] if warn is None else [warn])
    assert actions(severe) == ([] if critical is None else [critical])


def test_a_firing_tells_its_rule_its_step_and_the_evidence() -> None:
    (fired,) = guards("strict").decide(5, [finding("kl_blow_up", "warn")], {})

    assert (fired.rule, fired.level) == ("strict.kl_blow_up", "warn")
    assert fired.message.endswith("Something is wrong.")
    assert json.loads(json.dumps(fired.data)) == {
        "step": 5,
        "finding": "kl_blow_up",
        "since_step": 4,
        "evidence": [{"metric": "entropy", "step": 5, "value": 0.1, "threshold": 0.2, "window": 3}],
        "also": [],
    }


def test_a_presets_rule_stays_quiet_for_three_updates() -> None:
    guard = guards("strict")

    fired = [
        actions(guard.decide(step, [finding("kl_blow_up", "warn")], {})) for step in range(1, 10)
    ]

    acts = ["scale_kl_coef"]
    assert fired == [acts, [], [], [], acts, [], [], [], acts]


def test_a_critical_finding_is_not_quiet_because_of_a_warning() -> None:
    guard = guards("strict")
    guard.decide(1, [finding("kl_blow_up", "warn")], {})

    assert actions(guard.decide(2, [finding("kl_blow_up", "critical")], {})) == ["rollback"]


def test_a_warning_is_quiet_after_a_critical_finding() -> None:
    guard = guards("strict")
    guard.decide(1, [finding("kl_blow_up", "critical")], {})

    assert guard.decide(2, [finding("kl_blow_up", "warn")], {}) == ()


def test_quiet_times_are_counted_in_updates_though_steps_go_back() -> None:
    guard = guards("strict")
    guard.decide(9, [finding("kl_blow_up", "critical")], {})
    guard.note_rollback(4)

    fired = [actions(guard.decide(s, [finding("kl_blow_up")], {})) for s in (5, 6, 7, 8)]

    assert fired == [[], [], [], ["rollback"]]


def test_the_same_action_is_asked_for_once_a_step_and_both_rules_are_quiet_then() -> None:
    guard = guards("strict")
    both = [finding("update_too_large", "warn"), finding("entropy_explosion", "critical")]

    (fired,) = guard.decide(1, both, {})

    assert (fired.rule, fired.action) == ("strict.entropy_explosion", "scale_lr")
    assert fired.data["also"] == ["strict.update_too_large"]
    assert guard.decide(2, both, {}) == ()


def test_a_rollback_supersedes_all_but_warnings() -> None:
    guard = guards("strict", rule(), rule(critical=99.0))
    found = [finding("negative_kl"), finding("kl_blow_up"), finding("reward_hacking", "warn")]

    fired = guard.decide(1, found, {"reward_std": 5.0})

    assert actions(fired) == ["rollback", "none"]


def test_what_was_superseded_is_not_quiet() -> None:
    guard = guards("strict")
    guard.decide(1, [finding("negative_kl"), finding("kl_blow_up")], {})

    assert actions(guard.decide(2, [finding("negative_kl")], {})) == ["pause"]


def test_there_is_one_rollback_a_step() -> None:
    (fired,) = guards("strict").decide(1, [finding("kl_blow_up"), finding("repetition")], {})

    assert (fired.rule, fired.data["also"]) == ("strict.kl_blow_up", ["strict.repetition"])


def test_a_users_abort_goes_before_a_rollback() -> None:
    guard = guards("strict", rule(action="abort"))

    fired = guard.decide(1, [finding("kl_blow_up")], {"reward_std": 2.0})

    assert actions(fired) == ["abort"]


def test_after_three_rollbacks_a_further_one_becomes_a_pause() -> None:
    guard = guards("strict")
    told = []
    for code in ("kl_blow_up", "repetition", "numerics", "reward_hacking"):
        (fired,) = guard.decide(9, [finding(code)], {})
        told.append(fired)
        if fired.action == "rollback":
            guard.note_rollback(6)

    assert actions(tuple(told)) == ["rollback", "rollback", "rollback", "pause"]
    assert told[3].data["rollbacks"] == [6, 6, 6]
    assert "3 times" in told[3].message


def test_only_rollbacks_that_took_place_count() -> None:
    guard = guards("strict")

    fired = [guard.decide(1, [finding("kl_blow_up")], {}) for _ in range(17)]

    assert [actions(each) for each in fired[::4]] == [["rollback"]] * 5


def test_a_run_is_good_three_updates_after_a_critical_finding() -> None:
    guard = guards()
    good = [guard.is_good]

    for findings in ([], [finding("clip", "warn")], [finding("clip")], [], [], []):
        guard.decide(1, findings, {})
        good.append(guard.is_good)

    assert good == [True, True, True, False, False, False, True]


def test_a_run_is_not_good_right_after_a_rollback() -> None:
    guard = guards("off", rule(action="rollback"))
    good = []

    for value in (5.0, 0.0, 0.0, 0.0):
        if guard.decide(1, [], {"reward_std": value}):
            guard.note_rollback(0)
        good.append(guard.is_good)

    assert good == [False, False, False, True]


@pytest.mark.parametrize("preset", ["off", "warn", "standard", "strict"])
def test_a_users_rule_tells_from_warn_on_and_acts_from_critical_on(preset: str) -> None:
    guard = guards(preset, rule(warn=1.0, critical=2.0, action="scale_lr"))

    assert decisions(guard, [0.99, 1.0, 1.99, 2.0]) == [None, "none", "none", "scale_lr"]


def test_low_values_are_bad_if_warn_is_above_critical() -> None:
    guard = guards("off", rule(warn=2.0, critical=1.0, action="abort"))

    assert decisions(guard, [2.01, 2.0, 1.01, 1.0]) == [None, "none", "none", "abort"]


def test_a_rule_judges_the_mean_of_its_window_once_it_is_full() -> None:
    guard = guards("off", rule(window=3))

    assert decisions(guard, [9.0, 0.0, 0.0, 0.0, 3.0]) == [None, None, "pause", None, "none"]


def test_unknown_values_neither_count_nor_fire() -> None:
    """Of 2, unknown, NaN and 2 the last fills a window of two."""
    guard = guards("off", rule(window=2))

    fired = decisions(guard, [2.0, None, float("nan"), 2.0, None])

    assert fired == [None, None, None, "pause", None]


def test_a_users_rule_keeps_its_own_cooldown() -> None:
    guard = guards("off", rule(cooldown=2))

    assert decisions(guard, [5.0] * 7) == ["pause", None, None, "pause", None, None, "pause"]


def test_a_rollback_empties_the_windows() -> None:
    guard = guards("off", rule(window=2))
    decisions(guard, [5.0])

    guard.note_rollback(0)

    assert decisions(guard, [5.0, 5.0]) == [None, "pause"]


def test_a_users_firing_tells_its_numbers() -> None:
    guard = guards("off", rule(warn=9.0, critical=10.0), rule(window=2, action="abort"))
    guard.decide(1, (), {"reward_std": 3.0})

    (fired,) = guard.decide(2, (), {"reward_std": 4.0})

    assert (fired.rule, fired.level, fired.action) == ("rules[1]", "critical", "abort")
    assert fired.data == {
        "step": 2,
        "signal": "reward_std",
        "value": 3.5,
        "threshold": 2.0,
        "window": 2,
        "also": [],
    }
    assert "reward_std was 3.5, the mean of 2 values, at or above 2" in fired.message


def passes(*rules: GuardRule) -> GuardConfig:
    return GuardConfig(preset="off", rules=rules)


RATIO = {"signal": "ratio_max", "warn": 3.0, "critical": 5.0}


@pytest.mark.parametrize(("value", "acts"), [(4.99, False), (5.0, True), (None, False)])
def test_a_pass_is_judged_by_its_own_value_alone(value: float | None, *, acts: bool) -> None:
    config = passes(rule(**RATIO, action="skip_pass", window=9, cooldown=9))

    for _ in range(2):
        fired = pass_action(config, {"ratio_max": value})

        assert (fired is not None) is acts
        assert fired is None or fired.action == "skip_pass"


def test_ending_the_epochs_goes_before_skipping_a_pass() -> None:
    config = passes(rule(**RATIO, action="skip_pass"), rule(**RATIO, action="stop_epochs"))

    fired = pass_action(config, {"ratio_max": 6.0})

    assert fired is not None
    assert (fired.rule, fired.action, fired.data["window"]) == ("rules[1]", "stop_epochs", 1)


def test_rules_of_passes_and_of_updates_do_not_meddle() -> None:
    of_pass, of_update = rule(**RATIO, action="skip_pass"), rule(**RATIO, action="pause")

    assert pass_action(passes(of_update), {"ratio_max": 6.0}) is None
    assert guards("off", of_pass).decide(1, (), {"ratio_max": 6.0}) == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"warn": 2.0}, "must differ"),
        ({"signal": "reward"}, "no metric is called 'reward'"),
        ({"action": "explode"}, "action must be one of"),
        ({"action": "skip_pass", "signal": "reward_mean"}, "metric of passes"),
        ({"action": "stop_epochs", "signal": "entropy"}, "metric of passes"),
        ({"window": 0}, "window"),
        ({"window": 1001}, "window"),
        ({"cooldown": -1}, "cooldown"),
        ({"warn": float("nan")}, "finite"),
        ({"critical": float("inf")}, "finite"),
    ],
)
def test_a_rule_without_meaning_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfig, match=says) as refusal:
        rule(**changes)

    assert refusal.value.param == "guards"


@pytest.mark.parametrize("signal", ["update_kl_k3", "ratio_q99", "grad_norm"])
def test_metrics_of_passes_can_end_epochs(signal: str) -> None:
    assert rule(signal=signal, action="stop_epochs").signal == signal


def test_the_time_of_a_part_is_a_signal_too() -> None:
    assert rule(signal="seconds.sample").signal == "seconds.sample"


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "brave", "rules": []},
        {"preset": "off"},
        {"preset": "off", "rules": [], "more": 1},
        {"preset": "off", "rules": [{"signal": "entropy"}]},
        {"preset": "off", "rules": 5},
        {"preset": "off", "rules": [{**RULE, "window": "3"}]},
        {"preset": "off", "rules": [{**RULE, "signal": 3}]},
        {"preset": "off", "rules": [RULE] * 33},
    ],
)
def test_guards_that_cannot_be_read_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        GuardConfig.from_dict(fields)

    assert refusal.value.param == "guards"


def test_guards_survive_json() -> None:
    config = GuardConfig(preset="strict", rules=(rule(), rule(signal="entropy", warn=3.0)))

    assert GuardConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("preset", "rules", "expected"),
    [
        ("off", (), False),
        ("warn", (), False),
        ("standard", (), False),
        ("strict", (), True),
        ("off", (rule(action="rollback"),), True),
        ("standard", (rule(action="pause"),), False),
    ],
)
def test_it_is_known_beforehand_whether_a_run_may_go_back(
    preset: Any, rules: tuple[GuardRule, ...], *, expected: bool
) -> None:
    assert GuardConfig(preset=preset, rules=rules).can_roll_back is expected


drawn_findings = st.lists(
    st.builds(finding, st.sampled_from(CODES), st.sampled_from(["warn", "critical"])), max_size=4
)
drawn_values = st.fixed_dictionaries({"reward_std": st.none() | st.floats(0, 4)})


def run(guard: Guards, updates: list[Any], *, first: int = 1) -> list[tuple[Firing, ...]]:
    """What fires; every rollback is carried out."""
    told = []
    for step, (findings, values) in enumerate(updates, first):
        told.append(guard.decide(step, findings, values))
        if "rollback" in actions(told[-1]):
            guard.note_rollback(step)
    return told


@settings(max_examples=60, deadline=None)
@given(
    updates=st.lists(st.tuples(drawn_findings, drawn_values), min_size=2, max_size=12),
    middle=st.integers(1, 11),
    actions_drawn=st.lists(
        st.sampled_from([each for each in get_args(Action) if "_" not in each]), max_size=3
    ),
)
def test_guards_restored_in_the_middle_decide_the_same(
    updates: list[Any], middle: int, actions_drawn: list[Any]
) -> None:
    rules = [rule(action=action, window=2, cooldown=1) for action in actions_drawn]
    whole, first, second = (guards("strict", *rules) for _ in range(3))
    run(whole, updates[:middle])
    run(first, updates[:middle])

    second.load(json.loads(json.dumps(first.state())))
    rest = updates[middle:]

    assert run(second, rest, first=middle + 1) == run(whole, rest, first=middle + 1)
    assert (second.is_good, second.state()) == (whole.is_good, whole.state())


def test_loading_a_state_does_not_tie_it_to_the_guards() -> None:
    guard = guards("off", rule(window=2))
    decisions(guard, [1.0])
    state = guard.state()
    before = json.dumps(state)

    guard.load(state)
    decisions(guard, [5.0, 5.0])
    guard.note_rollback(1)

    assert json.dumps(state) == before
