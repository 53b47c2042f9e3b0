import math

import pytest
import torch

from ppo_engine.config import AdvantageEstimator
from ppo_engine.decoder import Decoder
from ppo_engine.errors import NonfiniteLoss, RewardFailed
from ppo_engine.snapshot import optimizer_tensors
from ppo_engine.update import learning_rate_factor
from tests.tiny_run import AsciiShare, tiny_config, tiny_trainer


class Constant:
    def __init__(self, *scores: float) -> None:
        self._scores = scores

    def grade(self, texts, _items):
        return [self._scores[i % len(self._scores)] for i in range(len(texts))]


def _weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.policy.adapter_parameters().values()]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_the_first_ratio_of_every_update_is_exactly_one(tiny_model, micro_batch_size):
    trainer = tiny_trainer(tiny_model, tiny_config(micro_batch_size=micro_batch_size))

    for report in trainer.steps():
        first = report.passes[0].values
        assert (first["ratio_min"], first["ratio_max"]) == (1.0, 1.0)
        assert first["log_ratio_abs_max"] == 0.0
        assert first["update_kl_k3"] == 0.0
        assert first["policy_clip_fraction"] == 0.0


def test_a_fresh_adapter_has_no_distance_to_the_reference(tiny_model):
    report = next(tiny_trainer(tiny_model).steps())

    assert report.values["kl_reference_per_sequence"] == 0.0
    assert report.values["kl_reference_per_token"] == 0.0


def test_later_passes_do_move_the_ratio(tiny_model):
    report = next(tiny_trainer(tiny_model).steps())

    assert report.passes[-1].values["log_ratio_abs_max"] > 1e-3


def test_a_learning_rate_of_zero_keeps_every_ratio_at_one(tiny_model):
    config = tiny_config(learning_rate=0.0, value_learning_rate=0.0)

    for report in tiny_trainer(tiny_model, config).steps():
        assert [p.values["log_ratio_abs_max"] for p in report.passes] == [0.0] * 4


def test_dropout_in_the_base_is_off_in_every_pass(tiny_model):
    trainer = tiny_trainer(tiny_model)
    trainer.policy.base.model.config.attention_dropout = 0.1

    report = next(trainer.steps())

    assert report.passes[0].values["log_ratio_abs_max"] == 0.0


@pytest.mark.parametrize("estimator", [AdvantageEstimator.RLOO, AdvantageEstimator.GRPO])
def test_without_a_critic_the_adapter_alone_is_trained(tiny_model, estimator) -> None:
    config = tiny_config(advantage_estimator=estimator, group_size=3, lam=1.0)
    trainer = tiny_trainer(tiny_model, config)

    report = next(trainer.steps())

    assert report.values["learning_rate"] == config.learning_rate
    assert report.values["value_learning_rate"] is None
    assert {name.rsplit(".", 1)[-1] for name in optimizer_tensors(trainer)} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert all("lora_" in name for name in optimizer_tensors(trainer))


def test_an_update_makes_epochs_times_minibatches_optimizer_steps(tiny_model):
    trainer = tiny_trainer(tiny_model, tiny_config(epochs=3, minibatches=3))

    report = next(trainer.steps())

    assert optimizer_tensors(trainer)["value_head.weight.step"] == 9
    assert [(p.epoch, p.minibatch) for p in report.passes] == [
        (epoch, minibatch) for epoch in range(3) for minibatch in range(3)
    ]


def test_the_split_into_micro_batches_changes_nothing_but_rounding(tiny_model):
    _assert_micro_batches_change_nothing(tiny_model)


def test_rows_that_fill_a_micro_batch_up_change_nothing(tiny_model, monkeypatch):
    # Only transformers' forward pass needs them: it has one shape.
    monkeypatch.setattr(Decoder, "supports", lambda _model: False)

    _assert_micro_batches_change_nothing(tiny_model)


def _assert_micro_batches_change_nothing(tiny_model):
    weights = []
    for size in (1, 2, 3):
        trainer = tiny_trainer(tiny_model, tiny_config(micro_batch_size=size))
        next(trainer.steps())
        weights.append(_weights(trainer))

    for other in weights[1:]:
        for ours, theirs in zip(weights[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_the_base_is_bit_identical_after_training(tiny_model):
    trainer = tiny_trainer(tiny_model)
    frozen = {
        name: p.detach().clone()
        for name, p in trainer.policy.model.named_parameters()
        if "lora_" not in name
    }

    for _ in trainer.steps():
        pass

    after = dict(trainer.policy.model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in frozen.items())


def test_target_kl_ends_the_passes_and_drops_the_gradient_that_went_too_far(tiny_model):
    trainer = tiny_trainer(tiny_model, tiny_config(target_kl=1e-6, epochs=4))

    report = next(trainer.steps())

    stopped = report.passes[-1]
    assert len(report.passes) < 8
    assert stopped.values["update_kl_k3"] > 1.5e-6
    assert all(p.values["update_kl_k3"] <= 1.5e-6 for p in report.passes[:-1])
    assert optimizer_tensors(trainer)["value_head.weight.step"] == len(report.passes) - 1
    fired = [event for event in report.events if event.code == "guard.fired"]
    assert [event.data["epoch"] for event in fired] == [stopped.epoch]
    assert [p.skipped for p in report.passes] == [False] * (len(report.passes) - 1) + [True]


def test_without_a_target_kl_no_pass_is_left_out(tiny_model):
    trainer = tiny_trainer(tiny_model, tiny_config(target_kl=None, learning_rate=0.05))

    assert len(next(trainer.steps()).passes) == 4


def test_a_lasting_nonfinite_loss_ends_the_run_and_touches_no_weight(tiny_model):
    trainer = tiny_trainer(tiny_model)
    steps = trainer.steps()
    next(steps)
    before = _weights(trainer)
    with torch.no_grad():
        trainer.policy.value_head.weight.fill_(math.inf)

    with pytest.raises(NonfiniteLoss, match="3 passes in a row"):
        next(steps)

    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))


def test_the_critics_warm_up_leaves_the_adapter_alone(tiny_model):
    trainer = tiny_trainer(tiny_model, tiny_config(critic_warmup_steps=2, total_steps=3))
    before = _weights(trainer)
    head = trainer.policy.value_head.weight.detach().clone()
    steps = trainer.steps()

    warm = [next(steps), next(steps)]

    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))
    assert not torch.equal(head, trainer.policy.value_head.weight)
    assert all(p.values["log_ratio_abs_max"] == 0.0 for report in warm for p in report.passes)
    next(steps)
    assert any(not torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))


def test_equal_rewards_without_a_kl_penalty_teach_the_policy_nothing(tiny_model):
    config = tiny_config(kl_coef=0.0, value_coef=0.0)
    trainer = tiny_trainer(tiny_model, config, scorer=Constant(1.0))
    before = _weights(trainer)

    next(trainer.steps())

    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))


def test_a_tiny_model_learns_to_write_ascii(tiny_model):
    config = tiny_config(
        total_steps=40, batch_size=32, micro_batch_size=16, kl_coef=0.0, max_response_tokens=12
    )
    rewards = [
        report.values["reward_mean"]
        for report in tiny_trainer(tiny_model, config, scorer=AsciiShare()).steps()
    ]

    assert sum(rewards[:3]) / 3 < 0.6
    assert sum(rewards[-3:]) / 3 > 0.9


def test_rewards_arrive_raw_in_the_report(tiny_model):
    trainer = tiny_trainer(tiny_model, scorer=Constant(0.0, -1.0))

    values = next(trainer.steps()).values

    assert values["reward_mean"] == -0.5
    assert values["reward_std"] == 0.5


class Raises:
    def grade(self, _texts, _items):
        raise KeyError("no such word")


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        (Constant(0.5, math.nan), "reward of answer 1 is nan"),
        (Constant(math.inf), "reward of answer 0 is inf"),
        (Raises(), "raised KeyError"),
    ],
)
def test_a_broken_reward_is_the_rewards_failure(tiny_model, scorer, reason):
    trainer = tiny_trainer(tiny_model, scorer=scorer)

    with pytest.raises(RewardFailed, match=reason):
        next(trainer.steps())

    assert trainer.progress.step == 0


def test_a_reward_that_miscounts_is_the_rewards_failure(tiny_model):
    class OneShort:
        def grade(self, texts, _items):
            return [0.0] * (len(texts) - 1)

    with pytest.raises(RewardFailed, match="5 numbers for 6 answers"):
        next(tiny_trainer(tiny_model, scorer=OneShort()).steps())


def test_validation_happens_at_its_interval_and_at_the_end(tiny_model):
    config = tiny_config(eval_interval=3, total_steps=4)

    values = [r.values["valid_reward_mean"] for r in tiny_trainer(tiny_model, config).steps()]

    assert [value is None for value in values] == [True, True, False, False]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1.0, 1.0, 0.75, 0.25]),
    ],
)
def test_the_learning_rate_follows_updates(schedule, expected):
    config = tiny_config(total_steps=5, warmup_fraction=0.4, lr_schedule=schedule)

    factors = [learning_rate_factor(config, step) for step in range(1, 6)]

    assert factors == pytest.approx(expected)


def test_the_critic_starts_at_the_mean_scaled_reward(tiny_model):
    trainer = tiny_trainer(tiny_model, tiny_config(value_learning_rate=0.0))

    next(trainer.steps())

    scores = torch.tensor([0.0, 1.0] * 3)
    assert trainer.policy.value_head.bias.item() != 0.0
    trainer = tiny_trainer(
        tiny_model, tiny_config(value_learning_rate=0.0), scorer=Constant(0.0, 1.0)
    )
    next(trainer.steps())
    expected = (scores / scores.std(correction=0)).mean()
    assert trainer.policy.value_head.bias.item() == pytest.approx(expected.item())
