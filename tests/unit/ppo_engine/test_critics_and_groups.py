"""Critics, groups of responses, truncated ones and importance weights, in small runs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ppo_engine.config import AdvantageEstimator, Critic, TrainConfig
from ppo_engine.export import ADAPTER_WEIGHTS, BaseModelRef, write_adapter
from ppo_engine.policy import Policy
from ppo_engine.rollout import Rollout, Samples
from ppo_engine.sampling import Sampler
from ppo_engine.trainer import Trainer
from tests.tiny_run import tiny_config, tiny_policy, tiny_prompts, tiny_trainer

ROUNDING = 1e-5
"""Of fp32 products in another shape."""
BASE = BaseModelRef(id="tests/tiny-random", path="unused", sha256="0" * 64)
SMALL = tiny_config(
    batch_size=4, minibatches=2, epochs=1, max_response_tokens=6, total_steps=2, eval_interval=1000
)
SOME_STOP = tuple(range(0, 258, 4))


def with_critic(critic: Critic, config: TrainConfig = SMALL) -> TrainConfig:
    return dataclasses.replace(config, critic=critic)


def without_critic(estimator: AdvantageEstimator) -> TrainConfig:
    return dataclasses.replace(SMALL, advantage_estimator=estimator, batch_size=2, group_size=3)


def trainer_of(folder: Path, config: TrainConfig = SMALL, *, seed: int = 0) -> Trainer:
    """Some of its responses stop by themselves, some are cut."""
    trainer = tiny_trainer(folder, config, seed=seed)
    trainer.policy.base = dataclasses.replace(trainer.policy.base, stop_ids=SOME_STOP)
    return trainer


def rollout_of(trainer: Trainer) -> Rollout:
    prompts, samples = trainer._sample()
    return trainer._estimate(samples, trainer._score(prompts, samples))


def samples_of(policy: Policy, *, group_size: int = 1) -> Samples:
    policy.base = dataclasses.replace(policy.base, stop_ids=SOME_STOP)
    sampler = Sampler(policy=policy, max_response_tokens=6)
    prompts = tiny_prompts(policy.base)
    return sampler.sample(prompts, torch.Generator().manual_seed(3), group_size=group_size)


def shake(parameters: dict[str, Any], *, seed: int = 5) -> None:
    """Move weights off their start, where much is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def inputs_of(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    return samples.tokens, samples.attention_mask, samples.response_mask


@pytest.mark.parametrize("critic", Critic)
def test_only_a_shared_head_teaches_the_adapter(tiny_model, critic: Critic) -> None:
    policy = tiny_policy(tiny_model, with_critic(critic))
    samples = samples_of(policy)
    shake(policy.adapter_parameters() | policy.value_parameters())

    total = policy.evaluate(*inputs_of(samples)).values.square().sum()

    of_adapter, of_critic = (each.gradients_of(total) for each in policy.trained_weights())
    assert {bool(each.any()) for each in of_adapter.values()} == {critic is Critic.SHARED_HEAD}
    assert all(each.any() for each in of_critic.values())


def test_a_critics_adapter_is_not_the_policys(tiny_model) -> None:
    policy = tiny_policy(tiny_model, with_critic(Critic.ADAPTER))
    samples = samples_of(policy)
    shake(policy.adapter_parameters())
    mine, theirs = policy.adapter_parameters(), policy.value_parameters()
    before = policy.estimate(*inputs_of(samples))

    shake(theirs)

    after = policy.estimate(*inputs_of(samples))
    assert len(theirs) == len(mine) + 2  # an adapter of the same layers, and the head
    assert not {id(p) for p in mine.values()} & {id(p) for p in theirs.values()}
    for name in ("logprobs", "entropy", "kl_reference_logprobs", "kl_exact"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert not torch.allclose(before.values, after.values)


def test_a_policys_adapter_leaves_the_critics_values_alone(tiny_model) -> None:
    policy = tiny_policy(tiny_model, with_critic(Critic.ADAPTER))
    samples = samples_of(policy)
    shake(policy.value_parameters())
    before = policy.estimate(*inputs_of(samples))

    shake(policy.adapter_parameters())

    after = policy.estimate(*inputs_of(samples))
    assert torch.equal(before.values, after.values)
    assert torch.equal(before.last_values, after.last_values)
    assert not torch.allclose(before.logprobs, after.logprobs)


def test_the_exported_adapter_is_the_policys_and_loads_in_peft(tiny_model, tmp_path) -> None:
    policy = tiny_policy(tiny_model, with_critic(Critic.ADAPTER))
    samples = samples_of(policy)
    shake(policy.adapter_parameters() | policy.value_parameters())
    write_adapter(policy, tmp_path / "adapter", BASE)

    stored = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()

    mine = {n.replace(".default", ""): p for n, p in policy.adapter_parameters().items()}
    assert stored.keys() == mine.keys()
    assert all(torch.equal(stored[name], p) for name, p in mine.items())
    tokens, attention_mask, response_mask = inputs_of(samples)
    with torch.no_grad():
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=tokens, attention_mask=attention_mask.long(), position_ids=positions
        ).logits
    columns = response_mask.shape[1]
    log_p = torch.log_softmax(logits[:, -columns - 1 : -1], dim=-1)
    expected = log_p.gather(2, tokens[:, -columns:, None]).squeeze(2)
    found = policy.estimate(tokens, attention_mask, response_mask).logprobs
    torch.testing.assert_close(found[response_mask], expected[response_mask], rtol=0, atol=ROUNDING)


def test_rloo_compares_the_responses_of_one_prompt(tiny_model) -> None:
    config = dataclasses.replace(
        without_critic(AdvantageEstimator.RLOO), kl_coef=0.0, standardize_advantages=False
    )
    rollout = rollout_of(trainer_of(tiny_model, config))

    mask = rollout.samples.response_mask
    scores = rollout.scores / rollout.scores.double().std(correction=0)
    for group in (slice(0, 3), slice(3, 6)):
        expected = 1.5 * (scores[group] - scores[group].mean())
        for row, advantage in zip(range(6)[group], expected, strict=True):
            found = rollout.advantages[row][mask[row]]
            torch.testing.assert_close(
                found, advantage.float().expand_as(found), rtol=0, atol=ROUNDING
            )
    assert rollout.advantages.any()


def test_responses_of_one_prompt_stand_next_to_each_other(tiny_model) -> None:
    policy = tiny_policy(tiny_model)
    prompts = tiny_prompts(policy.base)

    samples = samples_of(policy, group_size=3)

    assert samples.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    columns = samples.prompt_columns
    for row, (tokens, mask) in enumerate(zip(samples.tokens, samples.attention_mask, strict=True)):
        read = tokens[:columns][mask[:columns]].tolist()
        assert tuple(read) == prompts[row // 3].token_ids
    assert len(set(samples.texts)) > 4  # each is a draw of its own


def test_passes_walk_over_the_responses_of_all_groups(tiny_model) -> None:
    config = dataclasses.replace(
        SMALL, batch_size=2, group_size=3, minibatches=3, stored_samples=100
    )

    report = next(trainer_of(tiny_model, config).steps())

    assert [each.sums.sequences for each in report.passes] == [2, 2, 2]
    assert [sample["row"] for sample in report.samples] == list(range(6))
    lines = [sample["prompt_id"] for sample in report.samples]
    assert lines[:3] == lines[:1] * 3
    assert lines[3:] == lines[3:4] * 3
    assert lines[0] != lines[3]


@pytest.mark.parametrize("critic", Critic)
def test_last_values_are_those_of_the_state_after_the_last_token(
    tiny_model, critic: Critic
) -> None:
    policy = tiny_policy(tiny_model, with_critic(critic))
    samples = samples_of(policy)
    shake(policy.adapter_parameters() | policy.value_parameters())
    tokens, attention_mask, response_mask = inputs_of(samples)
    lengths = response_mask.sum(dim=1)
    assert len(lengths.unique()) > 1

    found = policy.estimate(tokens, attention_mask, response_mask).last_values

    more = torch.zeros(len(tokens), 1, dtype=torch.long)
    longer = torch.cat([response_mask, more.bool()], dim=1)
    rows = torch.arange(len(tokens))
    longer[rows, lengths] = True  # as if one more token had been sampled
    extended = policy.estimate(
        torch.cat([tokens, more], dim=1),
        torch.cat([attention_mask[:, : samples.prompt_columns], longer], dim=1),
        longer,
    )
    torch.testing.assert_close(found, extended.values[rows, lengths], rtol=0, atol=ROUNDING)
    assert found.std() > 0.01


def test_bootstrapping_credits_truncated_rows_with_the_value_of_going_on(tiny_model) -> None:
    rollouts = []
    for bootstrap in (False, True):
        config = dataclasses.replace(SMALL, gamma=0.9, bootstrap_truncated=bootstrap)
        trainer = trainer_of(tiny_model, config)
        with torch.no_grad():
            trainer.policy.value_head.weight.fill_(0.1)
        rollouts.append(rollout_of(trainer))
    plain, bootstrapped = rollouts

    samples = plain.samples
    last_values = trainer.policy.estimate(*inputs_of(samples)).last_values
    difference = bootstrapped.rewards - plain.rewards
    assert {True, False} == set(samples.is_truncated.tolist())
    for row, is_truncated in enumerate(samples.is_truncated.tolist()):
        last = int(samples.response_mask[row].sum()) - 1
        credit = 0.9 * last_values[row].item() if is_truncated else 0.0
        expected = torch.zeros(samples.response_mask.shape[1])
        expected[last] = credit
        torch.testing.assert_close(difference[row], expected, rtol=0, atol=ROUNDING)


def test_masked_truncated_rows_count_nowhere(tiny_model) -> None:
    config = dataclasses.replace(SMALL, mask_truncated=True, stored_samples=100)

    report = next(trainer_of(tiny_model, config).steps())

    stopped = [s["tokens"] for s in report.samples if s["finish_reason"] == "stop"]
    assert 0 < len(stopped) < len(report.samples)
    assert report.values["tokens"] == sum(stopped)
    assert report.values["sequences"] == len(stopped)
    assert report.passes[0].values["log_ratio_abs_max"] == 0.0
    # What the user sees of responses and rewards still covers all of them.
    every = [s["tokens"] for s in report.samples]
    assert report.values["response_tokens_mean"] == sum(every) / len(every)


def test_masked_advantages_are_standardized_over_what_is_left(tiny_model) -> None:
    rollout = rollout_of(trainer_of(tiny_model, dataclasses.replace(SMALL, mask_truncated=True)))

    kept = rollout.advantages[rollout.loss_mask]
    assert kept.mean().item() == pytest.approx(0.0, abs=ROUNDING)
    assert kept.std().item() == pytest.approx(1.0, abs=1e-4)
    assert not rollout.advantages[~rollout.loss_mask].any()


def test_a_rollout_of_another_adapter_version_is_refused(tiny_model) -> None:
    rollout = rollout_of(trainer_of(tiny_model))

    with pytest.raises(ValueError, match="sampled by adapter version 0, evaluated by 1"):
        dataclasses.replace(rollout, adapter_version=1)


def test_responses_sampled_before_an_optimizer_step_are_refused(tiny_model) -> None:
    trainer = trainer_of(tiny_model)
    next(trainer.steps())
    prompts, samples = trainer._sample()
    assert samples.adapter_version == 2  # one per pass
    trainer.policy.adapter_version += 1

    with pytest.raises(ValueError, match="adapter version"):
        trainer._estimate(samples, trainer._score(prompts, samples))


@pytest.mark.parametrize("critic", Critic)
def test_padding_moves_nothing_whatever_it_holds(tiny_model, critic: Critic) -> None:
    policy = tiny_policy(tiny_model, with_critic(critic))
    samples = samples_of(policy)
    shake(policy.adapter_parameters() | policy.value_parameters())
    tokens, attention_mask, response_mask = inputs_of(samples)
    garbage = torch.where(attention_mask, tokens, torch.arange(tokens.shape[1]) % 250)

    clean = policy.estimate(tokens, attention_mask, response_mask)
    dirty = policy.estimate(garbage, attention_mask, response_mask)

    assert not torch.equal(tokens, garbage)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(clean, dirty, strict=True))
    for columns in (1, 3, 30):
        pad = torch.full((len(tokens), columns), 7)
        wide = policy.estimate(
            torch.cat([pad, tokens], dim=1),
            torch.cat([torch.zeros_like(pad).bool(), attention_mask], dim=1),
            response_mask,
        )
        # All but the boundary, which is as wide as the batch, and empty here.
        for ours, theirs in zip(clean[:-1], wide[:-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
