"""The check before the first update: what it finds, and that it leaves no trace."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_engine.checkpoint import restore_checkpoint, save_checkpoint
from ppo_engine.config import AdvantageEstimator, Critic, TrainConfig
from ppo_engine.decoder import Decoder
from ppo_engine.errors import SelfCheckFailed
from ppo_engine.export import BaseModelRef
from ppo_engine.policy import BaseModel, CausalPolicy, Policy
from ppo_engine.reports import EngineEvent, StepReport
from ppo_engine.sampling import Sampler
from ppo_engine.selfcheck import self_check
from ppo_engine.trainer import Trainer
from tests.tiny_run import AsciiShare, tiny_config, tiny_prompts, tiny_trainer

BASE = BaseModelRef(id="tests/tiny-random", path="unused", sha256="0" * 64)
SINGLE = 1e-6
OFTEN, NEVER = tuple(range(0, 258, 3)), (9999,)
"""Tokens that end a response."""
CONFIG = tiny_config(batch_size=4, minibatches=1, epochs=1, max_response_tokens=5)
RLOO = tiny_config(
    batch_size=2,
    group_size=2,
    minibatches=1,
    epochs=1,
    max_response_tokens=5,
    advantage_estimator=AdvantageEstimator.RLOO,
)


class Constant:
    def grade(self, texts, _items):
        return [0.5] * len(texts)


def trainer_of(
    folder: Any,
    config: TrainConfig = CONFIG,
    *,
    kind: type[Policy] = Policy,
    scorer: Any = None,
    stop_ids: tuple[int, ...] = OFTEN,
) -> Trainer:
    """A trainer with this kind of policy; of its responses some stop by themselves."""
    base = BaseModel.load(folder, precision=config.precision, device="cpu")
    base = dataclasses.replace(base, stop_ids=stop_ids)
    critic = config.critic if config.has_critic else None
    policy = kind(base, config.lora, temperature=config.temperature, seed=0, critic=critic)
    return Trainer(policy, scorer or AsciiShare(), tiny_prompts(base), config, seed=0)


def checked(report: StepReport) -> list[EngineEvent]:
    return [event for event in report.events if event.code.startswith("self_check")]


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that the check could leave changed."""
    weights = dict(trainer.policy.model.named_parameters())
    weights |= dict(trainer.policy.value_head.named_parameters(prefix="head"))
    return {
        "weights": {name: p.detach().clone() for name, p in weights.items()},
        "trainable": {name: p.requires_grad for name, p in weights.items()},
        "gradients": {name for name, p in weights.items() if p.grad is not None},
        "generators": [each.get_state() for each in trainer.generators.values()],
        "global generator": torch.get_rng_state(),
        "optimizer": len(trainer.optimizer.state),
        "version": trainer.policy.adapter_version,
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


@pytest.mark.parametrize(
    "config",
    [*(dataclasses.replace(CONFIG, critic=critic) for critic in Critic), RLOO],
    ids=[*Critic, "rloo"],
)
def test_a_fresh_run_passes_and_nothing_is_left_changed(tiny_model, config: TrainConfig) -> None:
    trainer = trainer_of(tiny_model, config)
    prompts, samples = trainer._sample()
    rollout = trainer._estimate(samples, trainer._score(prompts, samples))
    before = state_of(trainer)

    found = self_check(trainer.policy, rollout, config, generator=torch.Generator().manual_seed(2))

    assert found.failures == ()
    assert found.warnings == ()
    assert found.noise == 0.0
    after = state_of(trainer)
    assert {name for name in before if not same(before[name], after[name])} == set()


def test_its_numbers_are_in_the_first_report(tiny_model) -> None:
    steps = trainer_of(tiny_model).steps()

    first, second = next(steps), next(steps)

    (event,) = checked(first)
    assert (event.code, event.level) == ("self_check.passed", "info")
    assert event.message == "The self-check passed."
    told = event.data
    assert told["tokens"] == first.passes[0].sums.tokens  # of all rows
    for name in (
        *("log_ratio_abs_max", "update_kl_k3", "out_of_range_fraction"),
        "kl_reference_abs_max",
    ):
        assert told[name] == 0.0
    assert 0 < told["sampler_mismatch_mean"] <= told["sampler_mismatch_max"] < 1e-4
    assert told["sampler_mismatch_mean"] == pytest.approx(
        first.values["sampler_mismatch_mean"], rel=1e-3
    )
    assert told["tensors_without_gradient"] == 0
    assert told["such_as"] == []
    assert told["responses"] == 4
    assert told["stopped_responses"] == 4 * first.values["stopped_response_fraction"]
    assert told["score_std"] == pytest.approx(first.values["reward_std"], rel=SINGLE)
    assert told["peak_memory_bytes"] > 0
    assert told["failures"] == told["warnings"] == []
    assert checked(second) == []


def refused(trainer: Trainer) -> str:
    with pytest.raises(SelfCheckFailed) as caught:
        next(trainer.steps())
    assert trainer.progress.step == 0
    return caught.value.message


def test_an_adapter_that_is_not_fresh_is_refused(tiny_model) -> None:
    trainer = trainer_of(tiny_model)
    with torch.no_grad():
        for name, parameter in trainer.policy.adapter_parameters().items():
            if "lora_B" in name:
                parameter.fill_(0.01)

    message = refused(trainer)

    assert "a fresh adapter must equal the reference" in message
    assert "no usable gradient" not in message


def test_a_sampler_of_another_temperature_is_refused(tiny_model) -> None:
    trainer = trainer_of(tiny_model)
    policy = trainer.policy
    other = CausalPolicy(policy.base, policy.model, temperature=0.5)
    trainer._sampler = Sampler(policy=other, max_response_tokens=5)

    message = refused(trainer)

    assert "the sampler's log-probabilities differ from the trainer's" in message
    assert "fresh adapter" not in message


class Deaf(Policy):
    """No gradient of its log-probabilities reaches anything, that of its values does."""

    def evaluate(self, *args, **settings):
        found = super().evaluate(*args, **settings)
        return found._replace(logprobs=found.logprobs.detach())


def test_log_probabilities_without_a_gradient_are_refused(tiny_model) -> None:
    trainer = trainer_of(tiny_model, kind=Deaf)

    message = refused(trainer)

    tensors = len(trainer.policy.adapter_parameters())
    assert f"no usable gradient reaches {tensors} trainable tensors" in message


def test_one_tensor_that_no_gradient_reaches_is_named(tiny_model, monkeypatch) -> None:
    # Only transformers' forward pass calls the hook.
    monkeypatch.setattr(Decoder, "supports", lambda _model: False)
    trainer = trainer_of(tiny_model)
    (name,) = (n for n in trainer.policy.adapter_parameters() if "layers.1.mlp.up_proj.lora_A" in n)
    module = trainer.policy.model.get_submodule(name.removesuffix(".weight"))
    module.register_forward_hook(lambda _module, _inputs, output: output.detach())

    message = refused(trainer)

    assert f"no usable gradient reaches 1 trainable tensors, such as {name}" in message


@pytest.mark.parametrize("critic", [Critic.SHARED_HEAD, Critic.ADAPTER])
def test_a_frozen_tensor_is_named(tiny_model, critic: Critic) -> None:
    trainer = trainer_of(tiny_model, dataclasses.replace(CONFIG, critic=critic))
    name, parameter = list(trainer.policy.value_parameters().items())[-1]
    parameter.requires_grad_(requires_grad=False)

    message = refused(trainer)

    assert f"reaches 1 trainable tensors, such as {name}" in message
    assert not parameter.requires_grad  # nothing is left changed, here neither


def test_a_constant_reward_only_warns(tiny_model) -> None:
    report = next(trainer_of(tiny_model, scorer=Constant()).steps())

    (event,) = checked(report)
    assert (event.code, event.level) == ("self_check.passed", "warn")
    assert event.data["score_std"] == 0.0
    (warning,) = event.data["warnings"]
    assert "all responses got the same reward" in warning
    assert warning in event.message


def test_responses_that_never_stop_only_warn(tiny_model) -> None:
    report = next(trainer_of(tiny_model, stop_ids=NEVER).steps())

    (event,) = checked(report)
    assert (event.code, event.level) == ("self_check.passed", "warn")
    assert event.data["stopped_responses"] == 0
    (warning,) = event.data["warnings"]
    assert "no response ended by itself" in warning


class Noisy(Policy):
    """What it says in a pass is a little off what it said before."""

    def evaluate(self, tokens, attention_mask, response_mask, **settings):
        found = super().evaluate(tokens, attention_mask, response_mask, **settings)
        return found._replace(logprobs=found.logprobs + 0.001 * response_mask)


def test_rounding_is_measured_and_kept_in_mind(tiny_model) -> None:
    report = next(trainer_of(tiny_model, kind=Noisy).steps())

    (event,) = checked(report)
    assert event.level == "warn"
    assert event.data["log_ratio_abs_max"] == pytest.approx(0.001, rel=1e-3)
    assert event.data["update_kl_k3"] == pytest.approx(0.001**2 / 2, rel=0.01)
    (warning,) = event.data["warnings"]
    assert "rounding alone moves log-ratios" in warning
    assert report.values["noise_limit"] == pytest.approx(0.001, rel=1e-3)


def test_a_resumed_run_is_not_checked_again(tiny_model, tmp_path) -> None:
    first = tiny_trainer(tiny_model, CONFIG)
    steps = first.steps()
    assert len(checked(next(steps))) == 1
    save_checkpoint(first, tmp_path / "ck", BASE)
    resumed = tiny_trainer(tiny_model, CONFIG)
    restore_checkpoint(resumed, tmp_path / "ck")

    report = next(resumed.steps())

    assert report.step == 2
    assert checked(report) == []
