"""What guards do to a run: each action, the state a rollback brings back, and what is told."""

import pytest
import torch

from ppo_engine.errors import GuardAbort
from ppo_engine.snapshot import optimizer_tensors
from ppo_engine.trainer import Trainer
from tests.guarded_run import (
    NEVER_AGAIN,
    after_tokens,
    column,
    is_same,
    learned,
    taken,
    told,
    trainer_of,
)

SEED_STRIDE = 1_000_003
"""Between the sampling seeds before and after a rollback."""


def test_scale_lr_halves_both_rates_of_later_steps(tiny_model) -> None:
    reports = taken(trainer_of(tiny_model, {"action": "scale_lr"}), 3)

    assert column(reports, "learning_rate") == [3e-3, 1.5e-3, 0.75e-3]
    assert column(reports, "value_learning_rate") == [1e-2, 0.5e-2, 0.25e-2]
    assert column(reports, "kl_coef") == [0.05] * 3
    fired = [told(report, "guard.fired") for report in reports]
    assert [[event.data["learning_rate_scale"] for event in events] for events in fired] == [
        [[1.0, 0.5]],
        [[0.5, 0.25]],
        [[0.25, 0.125]],
    ]
    assert fired[0][0].data["guard"] == "rules[0]"
    assert fired[0][0].level == "error"


def test_scale_kl_coef_pulls_half_again_as_hard(tiny_model) -> None:
    reports = taken(trainer_of(tiny_model, {"action": "scale_kl_coef"}), 3)

    assert column(reports, "kl_coef") == pytest.approx([0.05, 0.075, 0.1125])
    assert column(reports, "learning_rate") == [3e-3] * 3
    (event,) = told(reports[0], "guard.fired")
    assert event.data["kl_coef"] == pytest.approx([0.05, 0.075])


def test_without_a_kl_penalty_the_rate_is_cut_instead_and_that_is_said(tiny_model) -> None:
    reports = taken(trainer_of(tiny_model, {"action": "scale_kl_coef"}, kl_coef=0.0), 2)

    assert column(reports, "learning_rate") == [3e-3, 1.5e-3]
    assert column(reports, "kl_coef") == [0.0, 0.0]
    (event,) = told(reports[0], "guard.fired")
    assert event.data["action"] == "scale_kl_coef"
    assert event.data["instead"] == "scale_lr"
    assert event.data["learning_rate_scale"] == [1.0, 0.5]


def test_a_rollback_brings_back_the_last_good_state_bit_for_bit(tiny_model) -> None:
    rule = after_tokens(3, "rollback", cooldown=NEVER_AGAIN)
    trainer = trainer_of(
        tiny_model, rule, checkpoint_interval=2, kl_controller="adaptive", kl_horizon=2
    )
    steps = trainer.steps()
    next(steps), next(steps)
    good = learned(trainer)
    reward_std, beta = trainer.reward_std.state(), trainer.kl_controller.coef

    report = next(steps)

    assert is_same(learned(trainer), good)
    assert {x.item() for name, x in good.items() if name.endswith(".step")} == {2.0}
    assert trainer.reward_std.state() == reward_std
    assert trainer.reward_std.state()["count"] == 4
    assert trainer.kl_controller.coef == beta
    (event,) = told(report, "guard.fired")
    assert event.data["to_step"] == 2
    assert event.data["learning_rate_scale"] == [1.0, 0.5]
    expected = torch.Generator().manual_seed(SEED_STRIDE)
    assert torch.equal(trainer.generators["sampling"].get_state(), expected.get_state())
    after = next(steps)
    assert after.step == 4
    assert after.values["learning_rate"] == 1.5e-3
    assert after.values["kl_coef"] == beta
    assert not is_same(learned(trainer), good)


def test_the_good_state_is_a_copy_and_after_three_rollbacks_a_person_is_asked(tiny_model) -> None:
    trainer = trainer_of(tiny_model, after_tokens(3, "rollback"), checkpoint_interval=2)
    steps = trainer.steps()
    next(steps), next(steps)
    good = learned(trainer)

    restored = []
    for _ in range(3):
        report = next(steps)
        assert not report.wants_pause
        restored.append(is_same(learned(trainer), good))
    last = next(steps)

    assert restored == [True] * 3
    assert trainer.updater.learning_rate_scale == 1 / 8
    assert last.wants_pause
    assert not is_same(learned(trainer), good)
    (event,) = told(last, "guard.fired")
    assert (event.data["action"], event.data["rollbacks"]) == ("pause", [2, 2, 2])


def test_a_first_step_gone_wrong_leads_back_to_the_start(tiny_model) -> None:
    trainer = trainer_of(tiny_model, {"action": "rollback"})
    steps = trainer.steps()
    start = {name: x for name, x in learned(trainer).items() if "lora" in name}

    report = next(steps)

    assert told(report, "guard.fired")[0].data["to_step"] == 0
    now = learned(trainer)
    assert all(torch.equal(tensor, now[name]) for name, tensor in start.items())
    assert optimizer_tensors(trainer) == {}
    # The start is that of the first update: its scores are known, the critic answers their mean.
    assert trainer.reward_std.state()["count"] == trainer.config.batch_size
    assert trainer.policy.value_head.bias.item() != 0
    assert torch.count_nonzero(trainer.policy.value_head.weight) == 0


def test_pause_asks_for_a_pause_and_changes_nothing(tiny_model) -> None:
    pausing, plain = trainer_of(tiny_model, {"action": "pause"}), trainer_of(tiny_model)

    (paused,), (unpaused,) = taken(pausing, 1), taken(plain, 1)

    assert paused.wants_pause
    assert not unpaused.wants_pause
    assert is_same(learned(pausing), learned(plain))


def test_abort_ends_the_run_and_says_why(tiny_model) -> None:
    trainer = trainer_of(tiny_model, {"action": "abort"})

    with pytest.raises(GuardAbort, match=r"Aborted: entropy was .* by the job's own rules\[0\]"):
        next(trainer.steps())


def test_below_critical_a_rule_only_tells(tiny_model) -> None:
    rule = {"action": "abort", "warn": -1.0, "critical": 1e9}

    (report,) = taken(trainer_of(tiny_model, rule), 1)

    (event,) = told(report, "guard.fired")
    assert (event.level, event.data["action"]) == ("warn", "none")


MOVED = {"signal": "log_ratio_abs_max", "warn": 1e-9, "critical": 1e-8}
"""Every pass but the first, where nothing has moved."""
FOUR_PASSES = {"epochs": 2, "minibatches": 2}


def optimizer_steps(trainer: Trainer) -> set[float]:
    state = optimizer_tensors(trainer)
    return {x.item() for name, x in state.items() if name.endswith(".step")}


def test_stop_epochs_ends_the_passes_and_drops_the_gradient(tiny_model) -> None:
    trainer = trainer_of(tiny_model, {**MOVED, "action": "stop_epochs"}, **FOUR_PASSES)

    (report,) = taken(trainer, 1)

    assert [(each.epoch, each.minibatch) for each in report.passes] == [(0, 0), (0, 1)]
    assert [each.skipped for each in report.passes] == [False, True]
    assert optimizer_steps(trainer) == {1.0}
    assert report.values["skipped_passes"] == 1
    (event,) = told(report, "guard.fired")
    assert event.data["action"] == "stop_epochs"
    assert event.data["value"] == report.passes[1].values["log_ratio_abs_max"]


def test_skip_pass_leaves_out_each_pass_beyond_the_limit(tiny_model) -> None:
    trainer = trainer_of(tiny_model, {**MOVED, "action": "skip_pass"}, **FOUR_PASSES)

    (report,) = taken(trainer, 1)

    assert [each.skipped for each in report.passes] == [False, True, True, True]
    assert optimizer_steps(trainer) == {1.0}
    assert report.values["skipped_passes"] == 3
    assert len(told(report, "guard.fired")) == 3
    # Nothing is learned from a skipped pass: the second epoch finds the policy where it was.
    drift = [each.values["log_ratio_abs_max"] for each in report.passes]
    assert max(drift[2:]) >= drift[1] > 0


def test_a_pass_left_out_at_once_changes_no_weight(tiny_model) -> None:
    rule = {"signal": "tokens", "action": "stop_epochs"}
    trainer = trainer_of(tiny_model, rule, **FOUR_PASSES)
    start = {name: x for name, x in learned(trainer).items() if "lora" in name}

    (report,) = taken(trainer, 1)

    assert [each.skipped for each in report.passes] == [True]
    assert optimizer_steps(trainer) == set()
    now = learned(trainer)
    assert all(torch.equal(tensor, now[name]) for name, tensor in start.items())
