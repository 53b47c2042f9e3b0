"""Adapters of the top layers alone, and adapters that training starts from."""

import dataclasses

import pytest
import torch

from ppo_engine import decoder as engine
from ppo_engine.config import Critic, LoraConfig
from ppo_engine.decoder import Decoder
from ppo_engine.errors import InvalidConfig
from ppo_engine.export import BaseModelRef, read_adapter, write_adapter
from tests.tiny_run import tiny_config, tiny_policy, tiny_prompts, tiny_trainer

RELATIVE = 1e-5
"""Of the largest element: fp32 sums in another order."""
TOP = LoraConfig(rank=4, alpha=8.0, target_modules="auto", last_layers=1)


def shake(parameters, *, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def rollout_of(trainer):
    prompts, samples = trainer._sample()
    return trainer._estimate(samples, trainer._score(prompts, samples))


def evaluated(policy, rollout, *, boundary):
    samples = rollout.samples
    found = policy.evaluate(
        samples.tokens, samples.attention_mask, samples.response_mask, boundary=boundary
    )
    total = (found.logprobs * rollout.advantages).sum() + found.values.square().sum()
    gradients = [each.gradients_of(total).values() for each in policy.trained_weights()]
    return found, [each for of_weights in gradients for each in of_weights]


def test_only_the_top_layers_are_adapted(tiny_model):
    policy = tiny_policy(tiny_model, tiny_config(lora=TOP))

    assert policy.adapter_parameters()
    assert all(".layers.1." in name for name in policy.adapter_parameters())


def test_more_layers_than_the_model_has_are_refused(tiny_model):
    with pytest.raises(InvalidConfig, match="the model has 2 layers") as caught:
        tiny_policy(tiny_model, tiny_config(lora=dataclasses.replace(TOP, last_layers=3)))

    assert caught.value.param == "lora.layers"


@pytest.mark.parametrize("critic", [Critic.SHARED_HEAD, Critic.ADAPTER])
def test_kept_activations_change_neither_numbers_nor_gradients(tiny_model, monkeypatch, critic):
    trainer = tiny_trainer(tiny_model, tiny_config(lora=TOP, critic=critic))
    shake(trainer.policy.adapter_parameters() | trainer.policy.value_parameters())
    rollout = rollout_of(trainer)
    assert rollout.boundary.shape == (*rollout.samples.tokens.shape, 64)

    kept, of_kept = evaluated(trainer.policy, rollout, boundary=rollout.boundary)
    plain, of_plain = evaluated(trainer.policy, rollout, boundary=None)
    monkeypatch.setattr(Decoder, "supports", lambda _model: False)
    slow = tiny_policy(tiny_model, trainer.config)
    for ours, theirs in zip(
        (slow.adapter_parameters() | slow.value_parameters()).values(),
        (trainer.policy.adapter_parameters() | trainer.policy.value_parameters()).values(),
        strict=True,
    ):
        ours.data.copy_(theirs)
    expected, of_expected = evaluated(slow, rollout, boundary=None)

    assert torch.equal(kept.logprobs, plain.logprobs)
    assert torch.equal(kept.logprobs, rollout.old_logprobs)
    assert torch.equal(kept.values, plain.values)
    assert all(map(torch.equal, of_kept, of_plain))
    torch.testing.assert_close(kept.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    for ours, theirs in zip(of_kept, of_expected, strict=True):
        assert (ours - theirs).abs().max() <= RELATIVE * theirs.abs().max()


def test_passes_skip_the_layers_below(tiny_model, monkeypatch):
    trainer = tiny_trainer(tiny_model, tiny_config(lora=TOP))
    rollout = rollout_of(trainer)
    walked = []
    forward = engine._forward_layer
    monkeypatch.setattr(
        engine,
        "_forward_layer",
        lambda work, number, *rest, **more: (
            walked.append(number),
            forward(work, number, *rest, **more),
        )[1],
    )

    trainer.updater.learn(rollout, step=1, kl_coef=0.05, generator=torch.Generator().manual_seed(0))

    assert set(walked) == {1}


def test_a_whole_adapter_keeps_no_activations(tiny_model):
    rollout = rollout_of(tiny_trainer(tiny_model))

    assert rollout.boundary.numel() == 0
    assert rollout.boundary_of(torch.tensor([0])) is None


def test_the_first_ratio_is_one_with_an_adapter_of_the_top(tiny_model):
    for report in tiny_trainer(tiny_model, tiny_config(lora=TOP)).steps():
        assert report.passes[0].values["log_ratio_abs_max"] == 0.0


@pytest.mark.parametrize("is_ours", [True, False])
def test_training_that_starts_from_an_adapter_is_held_to_it(
    tiny_model, tmp_path, monkeypatch, is_ours
):
    monkeypatch.setattr(Decoder, "supports", lambda _model: is_ours)
    base = BaseModelRef(id="tests/tiny-random", path="unused", sha256="0" * 64)
    first = tiny_policy(tiny_model)
    shake(first.adapter_parameters())
    write_adapter(first, tmp_path / "adapter", base)
    trainer = tiny_trainer(tiny_model)
    read_adapter(trainer.policy, tmp_path / "adapter")
    trainer.policy.hold_to_present_adapter()
    samples = trainer._sampler.sample(
        tiny_prompts(trainer.policy.base), torch.Generator().manual_seed(0)
    )
    inputs = (samples.tokens, samples.attention_mask, samples.response_mask)
    start = first.estimate(*inputs)

    before = trainer.policy.estimate(*inputs)
    reports = list(trainer.steps())
    after = trainer.policy.estimate(*inputs)

    assert torch.equal(before.logprobs, start.logprobs)
    assert torch.equal(before.kl_reference_logprobs, start.logprobs)
    assert not before.kl_exact.any()
    assert not torch.allclose(start.kl_reference_logprobs, start.logprobs, atol=1e-3)
    assert reports[0].passes[0].values["log_ratio_abs_max"] == 0.0
    assert torch.equal(after.kl_reference_logprobs, start.logprobs)
    assert not torch.equal(after.logprobs, start.logprobs)
    assert not any("kl_reference" in name for name in trainer.policy.adapter_parameters())
    write_adapter(trainer.policy, tmp_path / "end", base)
    again = tiny_policy(tiny_model)
    read_adapter(again, tmp_path / "end")
    assert torch.equal(again.estimate(*inputs).logprobs, after.logprobs)
