"""Longer runs with each critic: what learns, and what must stay as it is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.config import AdvantageEstimator, Critic, TrainConfig
from ppo_engine.export import BaseModelRef
from ppo_engine.reports import StepReport
from ppo_engine.rollout import Samples
from ppo_engine.sampling import Sampler
from ppo_engine.trainer import Trainer
from tests.guarded_run import is_same, learned
from tests.tiny_run import tiny_config, tiny_trainer

ROUNDING = 1e-5
"""Of fp32 products in another shape."""
BASE = BaseModelRef(id="tests/tiny-random", path="unused", sha256="0" * 64)
SMALL = tiny_config(
    batch_size=4, minibatches=2, epochs=1, max_response_tokens=6, total_steps=2, eval_interval=1000
)


def trainer_of(folder: Path, config: TrainConfig = SMALL) -> Trainer:
    """Some of its responses stop by themselves, some are cut."""
    trainer = tiny_trainer(folder, config)
    trainer.policy.base = dataclasses.replace(trainer.policy.base, stop_ids=tuple(range(0, 258, 4)))
    return trainer


@pytest.mark.parametrize("critic", Critic)
def test_the_base_is_bit_identical_after_five_updates(tiny_model, critic: Critic) -> None:
    config = tiny_config(critic=critic, total_steps=5, batch_size=4, max_response_tokens=6)
    trainer = tiny_trainer(tiny_model, config)
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in trainer.policy.model.named_parameters()
        if "lora_" not in name
    }

    reports = list(trainer.steps())

    after = dict(trainer.policy.model.named_parameters())
    assert len(reports) == 5
    assert len(frozen) == 21
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
    assert not any(after[name].requires_grad for name in frozen)


def test_a_warm_up_trains_the_critics_adapter_and_not_the_policys(tiny_model) -> None:
    config = tiny_config(critic=Critic.ADAPTER, critic_warmup_steps=2, total_steps=3)
    trainer = tiny_trainer(tiny_model, config)
    policy = trainer.policy
    start = {
        name: p.detach().clone()
        for name, p in (policy.adapter_parameters() | policy.value_parameters()).items()
    }

    def unmoved(parameters) -> int:
        return sum(torch.equal(p, start[name]) for name, p in parameters.items())

    steps = trainer.steps()
    next(steps), next(steps)

    assert unmoved(policy.adapter_parameters()) == len(policy.adapter_parameters())
    assert unmoved(policy.value_parameters()) == 0
    next(steps)
    assert unmoved(policy.adapter_parameters()) == 0


def test_a_detached_head_leaves_the_policy_to_the_policy_term(tiny_model) -> None:
    """However much the value loss weighs, the first pass moves the adapter the same way."""
    gradients = []
    for value_coef in (0.0, 100.0):
        config = tiny_config(
            critic=Critic.DETACHED_HEAD, value_coef=value_coef, max_grad_norm=1e9, epochs=1
        )
        trainer = tiny_trainer(tiny_model, dataclasses.replace(config, minibatches=1))
        with torch.no_grad():
            trainer.policy.value_head.weight.fill_(0.1)
        next(trainer.steps())
        gradients.append([p.detach() for p in trainer.policy.adapter_parameters().values()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("critic", Critic)
def test_an_update_trains_every_tensor(tiny_model, critic: Critic) -> None:
    trainer = trainer_of(tiny_model, dataclasses.replace(SMALL, critic=critic))
    steps = trainer.steps()
    next(steps)  # the first passes only bring what is zero off zero
    before = learned(trainer)

    next(steps)

    after = learned(trainer)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_critics_adapter_survives_a_checkpoint(tiny_model, tmp_path) -> None:
    config = dataclasses.replace(SMALL, critic=Critic.ADAPTER)
    whole = trainer_of(tiny_model, config)
    steps = whole.steps()
    next(steps)
    save_checkpoint(whole, tmp_path / "ck", BASE)
    saved = learned(whole)
    next(steps)
    resumed = trainer_of(tiny_model, config)
    with torch.no_grad():
        for parameter in resumed.policy.value_parameters().values():
            parameter.add_(0.1)

    restore_checkpoint(resumed, tmp_path / "ck")

    assert is_same(learned(resumed), saved)
    next(resumed.steps())
    assert is_same(learned(resumed), learned(whole))
    assert not is_same(learned(resumed), saved)


@pytest.mark.parametrize("estimator", [AdvantageEstimator.RLOO, AdvantageEstimator.GRPO])
def test_estimators_of_groups_have_no_critic(tiny_model, estimator: AdvantageEstimator) -> None:
    config = dataclasses.replace(SMALL, advantage_estimator=estimator, batch_size=2, group_size=3)
    trainer = trainer_of(tiny_model, config)
    steps = trainer.steps()

    reports = [next(steps), next(steps)]

    assert trainer.policy.value_parameters() == {}
    for report in reports:
        for name in (
            *("value_loss", "value_explained_variance", "value_bias", "return_std"),
            *("value_clip_fraction", "value_out_of_range_fraction", "value_learning_rate"),
        ):
            assert report.values[name] is None
        assert report.passes[0].values["log_ratio_abs_max"] == 0.0
    assert reports[0].passes[1].values["log_ratio_abs_max"] > 0
    assert reports[0].values["zero_advantage_group_fraction"] is not None


@dataclasses.dataclass(frozen=True)
class ExactSampler:
    """Records what the trainer itself computes, plus a shift."""

    trainer: Trainer
    inner: Sampler
    shift: float = 0.0

    def sample(self, *args: Any, **settings: Any) -> Samples:
        samples = self.inner.sample(*args, **settings)
        recomputed = self.trainer._evaluate(samples).logprobs
        shifted = torch.where(samples.response_mask, recomputed + self.shift, 0.0)
        return dataclasses.replace(samples, behavior_logprobs=shifted)


def weighted(folder: Path, cap: float | None, *, shift: float = 0.0) -> tuple[Trainer, StepReport]:
    """One pass over raw advantages, whose mean is not 0."""
    config = dataclasses.replace(
        SMALL, importance_weight_cap=cap, minibatches=1, standardize_advantages=False
    )
    trainer = trainer_of(folder, config)
    trainer._sampler = ExactSampler(trainer, trainer._sampler, shift)
    return trainer, next(trainer.steps())


@pytest.fixture(scope="module")
def unweighted(tiny_model) -> tuple[Trainer, StepReport]:
    return weighted(tiny_model, None)


def test_weights_of_an_exact_sampler_change_nothing(tiny_model, unweighted) -> None:
    plain, plain_report = unweighted

    same, report = weighted(tiny_model, 1e9)

    assert is_same(learned(plain), learned(same))
    assert report.values["importance_weight_mean"] == 1.0
    assert report.values["importance_weight_max"] == 1.0
    assert report.values["importance_weight_capped_fraction"] == 0.0
    assert plain_report.values["importance_weight_mean"] is None


@pytest.mark.parametrize(
    ("cap", "shift", "weight", "capped"),
    [(1e9, -0.005, 1.005013, 0.0), (1e9, 0.005, 0.995012, 0.0), (0.5, 0.0, 0.5, 1.0)],
)
def test_weights_multiply_the_objective_alone(
    tiny_model, unweighted, cap: float, shift: float, weight: float, capped: float
) -> None:
    plain = unweighted[1].values

    values = weighted(tiny_model, cap, shift=shift)[1].values

    assert values["importance_weight_mean"] == pytest.approx(weight, rel=ROUNDING)
    assert values["importance_weight_capped_fraction"] == capped
    assert abs(plain["policy_loss"]) > 0.01
    assert values["policy_loss"] == pytest.approx(weight * plain["policy_loss"], rel=1e-4)
    for name in ("value_loss", "surrogate_objective", "policy_clip_fraction", "entropy"):
        assert values[name] == plain[name]
