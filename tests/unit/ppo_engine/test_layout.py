"""How rows are cut into micro-batches where products round by their shape (bf16)."""

from types import SimpleNamespace

import pytest
import torch

from ppo_engine.layout import Layout
from ppo_engine.packing import CommonShape, pack
from ppo_engine.policy import read_states
from ppo_engine.prompts import EncodedPrompt, PromptStream
from ppo_engine.rollout import Samples
from ppo_engine.rows import Prompt
from tests.tiny_run import tiny_config, tiny_prompts, tiny_trainer

BEGINNING = 21
PROMPTS = (24, 27, 27, 30)
"""Tokens of each prompt, the beginning among them."""
RESPONSES = (16, 20, 13, 20)
ROUNDS_BY_SHAPE = SimpleNamespace(packs=True, rounds_by_shape=True)


def samples():
    prompt_columns, response_columns = max(PROMPTS), max(RESPONSES)
    columns = prompt_columns + response_columns
    tokens = torch.arange(len(PROMPTS) * columns).view(len(PROMPTS), columns)
    attention = torch.zeros_like(tokens, dtype=torch.bool)
    response = torch.zeros(len(PROMPTS), response_columns, dtype=torch.bool)
    for row, (prompt, length) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        first = prompt_columns - prompt
        attention[row, first : prompt_columns + length] = True
        tokens[row, first : first + BEGINNING] = torch.arange(BEGINNING)
        response[row, :length] = True
    return Samples(
        tokens=tokens,
        attention_mask=attention,
        response_mask=response,
        behavior_logprobs=torch.zeros(response.shape),
        is_truncated=torch.zeros(len(PROMPTS), dtype=torch.bool),
        texts=("",) * len(PROMPTS),
        group_ids=torch.arange(len(PROMPTS)),
        adapter_version=0,
    )


def test_the_shape_counts_the_common_beginning_once():
    layout = Layout(ROUNDS_BY_SHAPE, samples(), 2)

    batches = layout.micro_batches(torch.tensor([2, 0, 3, 1]))

    # Rows of 40, 47, 40 and 50 tokens take 40, 48, 40 and 52; 20 of them are common.
    longest_two = 20 + (48 - 20) + (52 - 20)
    assert [batch.shape for batch in batches] == [CommonShape(longest_two, 20)] * 2
    assert [batch.rows.tolist() for batch in batches] == [[2, 0], [3, 1]]


@pytest.mark.parametrize("rows", [[0], [0, 2], [1, 3], [3, 2]])
def test_any_rows_come_to_the_shape(rows):
    all_of_it = samples()
    (batch,) = Layout(ROUNDS_BY_SHAPE, all_of_it, 2).micro_batches(torch.tensor(rows))
    read = read_states(all_of_it.response_mask, all_of_it.tokens)[rows]

    packed = pack(
        all_of_it.attention_mask[rows], read, prefix=batch.shape.prefix, pad_to=batch.shape.tokens
    )

    assert len(packed.sources) == batch.shape.tokens == 80


@pytest.mark.parametrize("micro_batch_size", [2, 4, 5])
def test_the_first_ratio_is_exactly_one_in_bf16_too(tiny_model, micro_batch_size):
    config = tiny_config(precision="bf16", micro_batch_size=micro_batch_size)
    trainer = tiny_trainer(tiny_model, config)
    questions = ("Tell me what rain is", "Tell me what a sea is", "Tell me why")
    trainer.prompts = PromptStream(tiny_prompts(trainer.policy.base, questions), seed=0)

    for report in trainer.steps():
        first = report.passes[0].values
        assert (first["ratio_min"], first["ratio_max"]) == (1.0, 1.0)


def test_the_first_ratio_is_exactly_one_in_bf16_where_rows_are_long(tiny_model):
    """Long rows take another kernel than short ones and beginnings."""
    config = tiny_config(precision="bf16", micro_batch_size=2, minibatches=2)
    trainer = tiny_trainer(tiny_model, config)
    ids = torch.randint(10, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [
        EncodedPrompt(
            prompt=Prompt(messages=(), item={}),
            line=number,
            token_ids=(*ids[:shared], *reversed(ids[shared:length])),
        )
        for number, (shared, length) in enumerate(
            [(300, 310), (300, 320), (100, 300), (100, 280), (40, 290), (40, 200)], start=1
        )
    ]
    trainer.prompts = PromptStream(prompts, seed=0)

    for report in trainer.steps():
        first = report.passes[0].values
        assert (first["ratio_min"], first["ratio_max"]) == (1.0, 1.0)
