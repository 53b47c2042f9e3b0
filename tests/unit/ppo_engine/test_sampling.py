import pytest
import torch

from ppo_engine.errors import ModelLoadFailed
from ppo_engine.policy import BaseModel
from ppo_engine.sampling import Sampler, draw
from tests.tiny_run import tiny_config, tiny_policy, tiny_prompts

# One cached token at a time and all at once are other matrix shapes: fp32 rounding.
LOGPROB_TOLERANCE = 1e-4


def _sampled(tiny_model, *, temperature=1.0, seed=0, max_response_tokens=12):
    policy = tiny_policy(tiny_model, tiny_config(temperature=temperature))
    sampler = Sampler(policy=policy, max_response_tokens=max_response_tokens)
    prompts = tiny_prompts(policy.base, ["Hi", "a longer prompt than that", "?", "Go"] * 8)
    return policy, sampler.sample(prompts, torch.Generator().manual_seed(seed))


def test_recorded_log_probabilities_are_those_of_one_forward_pass(tiny_model):
    for temperature in (1.0, 0.7):
        policy, samples = _sampled(tiny_model, temperature=temperature)

        with torch.no_grad():
            evaluated = policy.evaluate(
                samples.tokens, samples.attention_mask, samples.response_mask
            )

        torch.testing.assert_close(
            evaluated.logprobs, samples.behavior_logprobs, rtol=0, atol=LOGPROB_TOLERANCE
        )


def test_a_response_ends_with_its_first_stop_token(tiny_model):
    policy, samples = _sampled(tiny_model, max_response_tokens=200)
    (stop,) = policy.base.stop_ids
    stopped = 0
    for row in range(len(samples.tokens)):
        answer = samples.tokens[row, samples.prompt_columns :][samples.response_mask[row]].tolist()
        assert stop not in answer[:-1]
        assert (answer[-1] == stop) != bool(samples.is_truncated[row])
        stopped += answer[-1] == stop

    assert stopped > 0


def test_padding_is_never_a_real_token_though_it_equals_the_stop_token(tiny_model):
    policy, samples = _sampled(tiny_model, max_response_tokens=200)
    columns = samples.prompt_columns

    assert policy.base.pad_id in policy.base.stop_ids
    assert torch.equal(samples.attention_mask[:, columns:], samples.response_mask)
    lengths = [
        len(p.token_ids) for p in tiny_prompts(policy.base, ["Hi", "a longer prompt than that"])
    ]
    assert samples.attention_mask[:2, :columns].sum(dim=1).tolist() == lengths


def test_padding_on_the_left_changes_no_log_probability(tiny_model):
    policy, samples = _sampled(tiny_model)
    pad = torch.full((len(samples.tokens), 5), 7)

    with torch.no_grad():
        narrow = policy.evaluate(samples.tokens, samples.attention_mask, samples.response_mask)
        wide = policy.evaluate(
            torch.cat([pad, samples.tokens], dim=1),
            torch.cat([torch.zeros_like(pad, dtype=torch.bool), samples.attention_mask], dim=1),
            samples.response_mask,
        )

    torch.testing.assert_close(narrow.logprobs, wide.logprobs, rtol=0, atol=LOGPROB_TOLERANCE)


def test_garbage_in_padded_columns_changes_not_a_bit(tiny_model):
    policy, samples = _sampled(tiny_model)
    garbage = torch.where(samples.attention_mask, samples.tokens, 200)

    with torch.no_grad():
        clean = policy.evaluate(samples.tokens, samples.attention_mask, samples.response_mask)
        dirty = policy.evaluate(garbage, samples.attention_mask, samples.response_mask)

    assert torch.equal(clean.logprobs, dirty.logprobs)
    assert torch.equal(clean.values, dirty.values)


def test_the_same_seed_samples_the_same_answers(tiny_model):
    first, second = (_sampled(tiny_model, seed=4)[1] for _ in range(2))
    other = _sampled(tiny_model, seed=5)[1]

    assert first.texts == second.texts
    assert first.texts != other.texts


def test_draws_follow_the_probabilities_and_never_land_on_zero():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(40_000, -1)

    uniform = torch.rand(len(probabilities), generator=torch.Generator().manual_seed(0))
    drawn = draw(probabilities, uniform)

    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    assert shares[[0, 2, 5]].tolist() == [0.0, 0.0, 0.0]
    # Five standard errors of a share of one half.
    assert torch.allclose(shares[[1, 3, 4]], torch.tensor([0.5, 0.3, 0.2]), atol=0.0125)


def test_a_draw_is_where_the_sums_of_a_long_row_exceed_the_number():
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.rand(300, 1300, generator=generator)
    probabilities[:, 500:1100] = 0  # more than a block, and not at its edges
    probabilities[0::2, 1200:] = 0
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    uniform = torch.rand(300, generator=generator)
    uniform[:4] = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24])

    drawn = draw(probabilities, uniform)

    sums = probabilities.double().cumsum(dim=1)
    at = sums.gather(1, drawn[:, None]).squeeze(1)
    share = probabilities.double().gather(1, drawn[:, None]).squeeze(1)
    assert (share > 0).all()
    # fp32 sums of a thousand numbers.
    assert (at - share - 1e-5 <= uniform).all()
    assert (uniform <= at + 1e-5).all()


def test_the_reference_ignores_the_adapter(tiny_model):
    policy, samples = _sampled(tiny_model)
    inputs = (samples.tokens, samples.attention_mask, samples.response_mask)
    with torch.no_grad():
        before = policy.evaluate(*inputs).logprobs
        for name, parameter in policy.adapter_parameters().items():
            if "lora_B" in name:
                parameter.fill_(0.1)
        changed = policy.evaluate(*inputs).logprobs
        reference = policy.estimate(*inputs).kl_reference_logprobs
        after = policy.evaluate(*inputs).logprobs

    assert torch.equal(reference, before)
    assert not torch.allclose(changed, before, atol=0.1)
    assert torch.equal(after, changed)


def test_the_base_loads_no_pickle(tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelLoadFailed, match="cannot be loaded"):
        BaseModel.load(tmp_path, precision="fp32", device="cpu")


def test_a_damaged_model_is_refused_without_naming_its_folder(tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a model")

    with pytest.raises(ModelLoadFailed) as caught:
        BaseModel.load(tmp_path, precision="fp32", device="cpu")

    assert str(tmp_path) not in caught.value.message
