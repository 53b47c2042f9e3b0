"""Prompts of the training and validation files, as token ids, in a shuffled order that resumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from ppo_engine.errors import InvalidTrainingFile
from ppo_engine.rows import Prompt, read_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt ready for the model."""

    prompt: Prompt
    """Messages and the row's other keys."""
    line: int
    """Line of the file it stands on, from 1."""
    token_ids: tuple[int, ...]
    """Its tokens, the opening of the assistant's turn included."""


def load_prompts(
    path: Path, tokenizer: Any, *, max_prompt_tokens: int, param: str = "training_file"
) -> list[EncodedPrompt]:
    """All prompts of a JSONL file; a prompt that is too long is an error, never cut silently.

    `param` names the file in errors.
    """
    try:
        return _load(path, tokenizer, max_prompt_tokens)
    except InvalidTrainingFile as error:
        raise InvalidTrainingFile(f"{param}, {error.message}", param=param) from error


def _load(path: Path, tokenizer: Any, max_prompt_tokens: int) -> list[EncodedPrompt]:
    prompts = []
    with path.open("rb") as file:
        for line, prompt in read_prompts(file):
            try:
                token_ids = _encode(prompt, tokenizer)
            except TemplateError as error:
                message = f"line {line}: the model's chat template refuses it: {error}"
                raise InvalidTrainingFile(message) from error
            if len(token_ids) > max_prompt_tokens:
                raise InvalidTrainingFile(
                    f"line {line}: the prompt has {len(token_ids)} tokens, more than "
                    f"max_prompt_tokens = {max_prompt_tokens}; shorten it or raise the limit"
                )
            prompts.append(EncodedPrompt(prompt=prompt, line=line, token_ids=token_ids))
    if not prompts:
        raise InvalidTrainingFile("it holds no prompts")
    return prompts


def _encode(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of the chat up to the assistant's turn; plain text where there is no template."""
    if tokenizer.chat_template is None:
        text = "\n".join(str(message["content"]) for message in prompt.messages)
        return tuple(tokenizer(text)["input_ids"])
    ids = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(ids)


class PromptStream:
    """Batches that walk over all prompts again and again, each walk in a new seeded order.

    The order of a walk depends on the seed and the walk's number only, so the position is the
    whole state.  A batch larger than the file takes prompts from the next walk.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], *, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self.position = 0
        """Prompts handed out so far; set it to resume."""

    def next_batch(self, size: int) -> list[EncodedPrompt]:
        """The next `size` prompts."""
        batch = []
        for index in range(self.position, self.position + size):
            walk, place = divmod(index, len(self._prompts))
            batch.append(self._prompts[self._order(walk)[place]])
        self.position += size
        return batch

    def _order(self, walk: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + walk)
        order: list[int] = torch.randperm(len(self._prompts), generator=generator).tolist()
        return order
