"""Both ways of generating, against transformers' `generate` and against each other."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ppo_engine import generation as engine
from ppo_engine import native
from ppo_engine.decoder import Decoder
from ppo_engine.generation import Patience
from ppo_engine.products import is_packable
from ppo_engine.sampling import Sampler
from tests.tiny_run import tiny_config, tiny_policy, tiny_prompts

TOLERANCE = 1e-4
"""Scores of one cached token at a time and of all at once: fp32 rounding."""
BEGINNING = "every one of these prompts begins in the same way, "
PROMPTS = [BEGINNING + "Hi", BEGINNING + "a longer end", BEGINNING + "?", BEGINNING + "go on then"]
UNLIKE = ["Hi", "a prompt that is longer than the others are", "?", "Go on"]


KINDS = {"rows": engine._RowLinear, "columns": engine._ColumnLinear}
if is_packable(torch.device("cpu"), torch.float32):
    KINDS["packed"] = engine._PackedLinear
BF16_KINDS = {"rows": engine._RowLinear, "columns": engine._ColumnLinear}
if is_packable(torch.device("cpu"), torch.bfloat16):
    BF16_KINDS["packed"] = engine._PackedLinear
if native.product_kernels_for(torch.empty(0, dtype=torch.bfloat16)) is not None:
    BF16_KINDS["native"] = engine._NativeLinear
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-6}
"""Of the largest element."""


@pytest.fixture(params=[*KINDS, "no kernels", "transformers"])
def policy(request, tiny_model, monkeypatch):
    if request.param == "transformers":
        monkeypatch.setattr(Decoder, "supports", lambda _model: False)
    elif request.param == "no kernels":
        monkeypatch.setattr(native, "_kernels", dict)
    else:
        monkeypatch.setattr(engine, "_kind_for", lambda _decoder: KINDS[request.param])
    policy = tiny_policy(tiny_model, tiny_config())
    assert policy.packs == (request.param != "transformers")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.adapter_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def padded(policy, texts):
    sampler = Sampler(policy=policy, max_response_tokens=10)
    return sampler._left_padded(tiny_prompts(policy.base, texts))


@pytest.mark.parametrize("texts", [PROMPTS, UNLIKE, UNLIKE[:1]])
@torch.no_grad()
def test_the_likeliest_answers_are_those_of_generate(policy, texts):
    tokens, attention_mask = padded(policy, texts)
    expected = policy.model.generate(
        input_ids=tokens,
        attention_mask=attention_mask.long(),
        do_sample=False,
        max_new_tokens=10,
        min_new_tokens=10,
        suppress_tokens=list(policy.base.stop_ids),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )

    generation = policy.generation(max_response_tokens=10)
    scores = generation.start(tokens, attention_mask, copies=1)
    for column, their_scores in enumerate(expected.scores):
        scores[:, list(policy.base.stop_ids)] = -torch.inf
        torch.testing.assert_close(scores, their_scores, rtol=0, atol=TOLERANCE)
        chosen = expected.sequences[:, tokens.shape[1] + column]
        assert torch.equal(scores.argmax(dim=1), chosen)
        if column < 9:
            scores = generation.step(chosen)


@pytest.mark.parametrize("texts", [PROMPTS, UNLIKE])
@torch.no_grad()
def test_copies_and_dropped_rows_change_no_score(policy, texts):
    tokens, attention_mask = padded(policy, texts)
    forced = torch.randint(2, 250, (9, 12), generator=torch.Generator().manual_seed(3))
    apart = policy.generation(max_response_tokens=10)
    rows = torch.arange(4).repeat_interleave(3)
    expected = [apart.start(tokens[rows], attention_mask[rows], copies=1)]
    expected += [apart.step(each) for each in forced]

    generation = policy.generation(max_response_tokens=10)
    found = generation.start(tokens, attention_mask, copies=3)
    left = torch.arange(12)
    for column, each in enumerate(forced):
        torch.testing.assert_close(found, expected[column][left], rtol=0, atol=TOLERANCE)
        if column in (2, 5):
            kept = torch.arange(len(left))[column % 2 :: 2]
            generation.keep(kept)
            left = left[kept]
        found = generation.step(each[left])
    torch.testing.assert_close(found, expected[-1][left], rtol=0, atol=TOLERANCE)
    assert len(left) == 3


def test_both_ways_draw_the_same_answers(tiny_model, monkeypatch):
    answers = []
    for is_ours in (True, False):
        monkeypatch.setattr(Decoder, "supports", lambda _model, is_ours=is_ours: is_ours)
        policy = tiny_policy(tiny_model, tiny_config())
        assert policy.packs == is_ours
        sampler = Sampler(policy=policy, max_response_tokens=60)
        prompts = tiny_prompts(policy.base, UNLIKE * 3)
        answers.append(sampler.sample(prompts, torch.Generator().manual_seed(4), group_size=2))

    ours, theirs = answers
    assert torch.equal(ours.tokens, theirs.tokens)
    assert 0 < int(theirs.is_truncated.sum()) < len(theirs.is_truncated)
    torch.testing.assert_close(
        ours.behavior_logprobs, theirs.behavior_logprobs, rtol=0, atol=TOLERANCE
    )


def test_how_often_ends_are_looked_at_changes_no_answer(tiny_model, monkeypatch):
    answers = []
    for patience in (Patience(steps=1, share=0.125), Patience(steps=8, share=0.5)):
        monkeypatch.setattr(engine, "_STEP_BY_STEP", patience)
        policy = tiny_policy(tiny_model, tiny_config())
        policy.base = dataclasses.replace(policy.base, stop_ids=tuple(range(0, 258, 9)))
        sampler = Sampler(policy=policy, max_response_tokens=200)
        prompts = tiny_prompts(policy.base, UNLIKE * 3)
        # Until all have ended: not at a number of tokens that is looked at.
        answers.append(sampler.sample(prompts, torch.Generator().manual_seed(9)))

    often, seldom = answers
    assert not often.is_truncated.any()
    assert often.response_mask.shape[1] % 8 != 0
    assert torch.equal(often.tokens, seldom.tokens)
    torch.testing.assert_close(
        often.behavior_logprobs, seldom.behavior_logprobs, rtol=0, atol=TOLERANCE
    )


WAYS = [(kind, torch.float32) for kind in KINDS.values()]
WAYS += [(kind, torch.bfloat16) for kind in BF16_KINDS.values()]


@pytest.mark.parametrize(
    ("kind", "dtype"), WAYS, ids=[*KINDS, *(f"{name} in bf16" for name in BF16_KINDS)]
)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_every_way_to_multiply_gives_what_separate_products_do(bias, kind, dtype):
    config = Qwen2Config if bias else LlamaConfig
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    settings = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"])
    peft = get_peft_model(model, settings)
    for parameter in peft.parameters():
        torch.nn.init.normal_(parameter)
    decoder = Decoder(peft.get_base_model().to(dtype))
    for layer, of_layer in zip(decoder.layers, decoder.group_adapters("default"), strict=True):
        for group, adapters in zip(layer.groups, of_layer, strict=True):
            inputs = torch.randn(5, group.weight.shape[1], dtype=dtype)
            onto = torch.randn(5, len(group.weight), dtype=dtype)
            expected = inputs.double() @ group.weight.double().t()
            if group.bias is not None:
                expected += group.bias.double()
            for columns, (a, b, scale) in group.adapters("default"):
                expected[:, columns] += scale * inputs.double() @ a.double().t() @ b.double().t()
            linear = kind(group, adapters)

            for found, wanted in (
                (linear.outputs(inputs), expected),
                (linear.outputs(inputs, onto=onto), expected + onto),
            ):
                assert found.dtype == dtype
                apart = (found.double() - wanted).abs().max() / wanted.abs().max()
                assert apart < ROUNDING[dtype]


@pytest.mark.parametrize("way", ["kernels", "no kernels"])
@torch.no_grad()
def test_in_bf16_the_scores_are_those_of_fp32_but_for_its_rounding(tiny_model, monkeypatch, way):
    if way == "no kernels":
        monkeypatch.setattr(native, "_kernels", dict)
    found = {}
    for precision in ("fp32", "bf16"):
        policy = tiny_policy(tiny_model, tiny_config(precision=precision))
        tokens, attention_mask = padded(policy, UNLIKE)
        generation = policy.generation(max_response_tokens=10)
        scores = [generation.start(tokens, attention_mask, copies=2)]
        forced = torch.randint(2, 250, (5, 8), generator=torch.Generator().manual_seed(3))
        scores += [generation.step(each) for each in forced]
        found[precision] = torch.stack(scores)

    apart = (found["bf16"] - found["fp32"]).abs().max()
    assert apart < ROUNDING[torch.bfloat16] * found["fp32"].abs().max()


def test_finished_rows_are_dropped(tiny_model, monkeypatch):
    policy = tiny_policy(tiny_model, tiny_config())
    widths = []
    generation_of = policy.generation

    def watched(**settings):
        generation = generation_of(**settings)
        step = generation.step
        generation.step = lambda tokens: (widths.append(len(tokens)), step(tokens))[1]
        return generation

    monkeypatch.setattr(policy, "generation", watched)
    sampler = Sampler(policy=policy, max_response_tokens=200)

    samples = sampler.sample(
        tiny_prompts(policy.base, UNLIKE * 4), torch.Generator().manual_seed(0)
    )

    lengths = samples.response_mask.sum(dim=1)
    going_on = [int((lengths > column + 1).sum()) for column in range(len(widths))]
    assert widths[0] == 16
    assert widths == sorted(widths, reverse=True)
    assert all(width - needed <= 2 for width, needed in zip(widths, going_on, strict=True))
