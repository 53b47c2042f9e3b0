import json

import pytest

from ppo_engine.errors import InvalidTrainingFile
from ppo_engine.policy import BaseModel
from ppo_engine.prompts import PromptStream, load_prompts
from tests.tiny_run import tiny_prompts


@pytest.fixture(scope="module")
def base(tiny_model):
    return BaseModel.load(tiny_model, precision="fp32", device="cpu")


def _file(folder, *rows):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prompt_ends_where_the_assistant_begins(base, tmp_path):
    path = _file(tmp_path, {"messages": [{"role": "user", "content": "Hi"}]})

    (prompt,) = load_prompts(path, base.tokenizer, max_prompt_tokens=64)

    assert base.tokenizer.decode(prompt.token_ids) == "<|start|>Hi<|end|><|start|>"


def test_without_a_chat_template_the_text_itself_is_the_prompt(base, tmp_path):
    path = _file(tmp_path, {"prompt": "Once upon a time"})
    template, base.tokenizer.chat_template = base.tokenizer.chat_template, None
    try:
        (prompt,) = load_prompts(path, base.tokenizer, max_prompt_tokens=64)
    finally:
        base.tokenizer.chat_template = template

    assert base.tokenizer.decode(prompt.token_ids) == "Once upon a time"


def test_a_prompt_that_is_too_long_is_refused_with_its_line(base, tmp_path):
    path = _file(tmp_path, {"prompt": "short"}, {"prompt": "x" * 100})

    with pytest.raises(InvalidTrainingFile, match="line 2: the prompt has 103 tokens") as caught:
        load_prompts(path, base.tokenizer, max_prompt_tokens=64)

    assert caught.value.param == "training_file"


def test_a_fault_names_the_file_it_is_in(base, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "ok"}\n{"prompt"\n')

    with pytest.raises(InvalidTrainingFile, match="validation_file, line 2: not JSON") as caught:
        load_prompts(
            tmp_path / "bad.jsonl", base.tokenizer, max_prompt_tokens=64, param="validation_file"
        )

    assert caught.value.param == "validation_file"


def test_a_prompt_that_the_chat_template_refuses_is_told_with_its_line(base, tmp_path):
    path = _file(tmp_path, {"prompt": "fine"}, {"messages": [{"role": "tool", "content": "x"}]})
    template, base.tokenizer.chat_template = (
        base.tokenizer.chat_template,
        "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
    )
    try:
        with pytest.raises(InvalidTrainingFile, match=r"line 2: .* no tools"):
            load_prompts(path, base.tokenizer, max_prompt_tokens=64)
    finally:
        base.tokenizer.chat_template = template


def test_a_file_without_prompts_is_refused(base, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")

    with pytest.raises(InvalidTrainingFile, match="no prompts"):
        load_prompts(tmp_path / "empty.jsonl", base.tokenizer, max_prompt_tokens=64)


def test_every_walk_covers_all_prompts_in_a_new_order(base):
    stream = PromptStream(tiny_prompts(base, [str(i) for i in range(20)]), seed=3)

    first = [prompt.line for prompt in stream.next_batch(20)]
    second = [prompt.line for prompt in stream.next_batch(20)]

    assert sorted(first) == sorted(second) == list(range(1, 21))
    assert first != second


def test_a_batch_runs_over_into_the_next_walk(base):
    stream = PromptStream(tiny_prompts(base, ["a", "b", "c"]), seed=0)

    lines = [prompt.line for prompt in stream.next_batch(7)]

    assert sorted(lines[:3]) == sorted(lines[3:6]) == [1, 2, 3]


def test_the_position_is_the_whole_state(base):
    prompts = tiny_prompts(base, [str(i) for i in range(10)])
    whole, resumed = PromptStream(prompts, seed=5), PromptStream(prompts, seed=5)
    whole.next_batch(13)

    resumed.position = 13

    assert resumed.next_batch(9) == whole.next_batch(9)
