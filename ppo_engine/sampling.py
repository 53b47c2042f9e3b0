"""Prompts in, sampled responses out: a decode loop on the model's own forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppo_engine.policy import CausalPolicy
from ppo_engine.prompts import EncodedPrompt
from ppo_engine.rollout import Samples

_BLOCK = 512
"""Tokens whose probabilities are added up together in a draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Draws responses from the policy, token by token, at the policy's temperature.

    Nothing is cut from the distribution (no top-p, no top-k): the policy that samples is the one
    whose log-probabilities the loss uses.
    """

    policy: CausalPolicy
    max_response_tokens: int
    """Responses are cut at this length."""

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[EncodedPrompt], generator: torch.Generator, *, group_size: int = 1
    ) -> Samples:
        """`group_size` responses per prompt; those of one prompt stand next to each other."""
        tokens, attention_mask = self._left_padded(prompts)
        responses, logprobs = self._decode(tokens, attention_mask, generator, copies=group_size)
        groups = torch.arange(len(prompts), device=self.policy.device)
        group_ids = groups.repeat_interleave(group_size)
        tokens, attention_mask = tokens[group_ids], attention_mask[group_ids]
        stop_ids = torch.tensor(self.policy.base.stop_ids, device=self.policy.device)
        response_mask = _until_first_stop(responses, stop_ids)
        tokens = torch.cat([tokens, torch.where(response_mask, responses, self._pad_id)], dim=1)
        return Samples(
            tokens=tokens,
            attention_mask=torch.cat([attention_mask, response_mask], dim=1),
            response_mask=response_mask,
            behavior_logprobs=torch.where(response_mask, logprobs, 0.0),
            is_truncated=~torch.isin(responses, stop_ids).any(dim=1),
            texts=self._decoded(responses, response_mask),
            group_ids=group_ids,
            adapter_version=self.policy.adapter_version,
        )

    @property
    def _pad_id(self) -> int:
        return self.policy.base.pad_id

    def _left_padded(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask, [B, P]."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        missing = [longest - len(prompt.token_ids) for prompt in prompts]
        rows = [
            [self._pad_id] * gap + list(prompt.token_ids)
            for gap, prompt in zip(missing, prompts, strict=True)
        ]
        device = self.policy.device
        columns = torch.arange(longest, device=device)
        attention_mask = columns[None, :] >= torch.tensor(missing, device=device)[:, None]
        return torch.tensor(rows, device=device), attention_mask

    def _decode(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        generator: torch.Generator,
        *,
        copies: int,
    ) -> tuple[Tensor, Tensor]:
        """Sampled tokens and their log-probabilities, [B·copies, T]; padding after a row's stop."""
        rows = torch.arange(len(tokens) * copies, device=tokens.device)
        shape = (len(rows), self.max_response_tokens)
        responses = torch.full(shape, self.policy.base.stop_ids[0], device=tokens.device)
        logprobs = torch.zeros(shape, device=tokens.device)
        # For every row, finished or not: a row's draws do not depend on its neighbours' ends.
        uniform = torch.rand(shape[::-1], generator=generator, device=generator.device)
        uniform = uniform.to(rows.device)
        generation = self.policy.generation(max_response_tokens=self.max_response_tokens)
        scores = generation.start(tokens, attention_mask, copies=copies)
        stop_ids = torch.tensor(self.policy.base.stop_ids, device=rows.device)
        is_done = torch.zeros_like(rows, dtype=torch.bool)
        for column in range(self.max_response_tokens):
            log_distribution = torch.log_softmax(scores, dim=-1)
            drawn = draw(log_distribution.exp(), uniform[column, rows])
            responses[rows, column] = drawn
            logprobs[rows, column] = log_distribution.gather(1, drawn[:, None]).squeeze(1)
            is_done |= torch.isin(drawn, stop_ids)
            if column + 1 == self.max_response_tokens:
                break
            if (column + 1) % generation.patience.steps == 0:
                finished = int(is_done.sum())
                if finished == len(rows):
                    break
                if finished and finished >= generation.patience.share * len(rows):
                    going_on = (~is_done).nonzero().squeeze(1)
                    generation.keep(going_on)
                    rows, drawn, is_done = rows[going_on], drawn[going_on], is_done[going_on]
            scores = generation.step(drawn)
        longest = int(_until_first_stop(responses, stop_ids).sum(dim=1).max())
        return responses[:, :longest], logprobs[:, :longest]

    def _decoded(self, responses: Tensor, response_mask: Tensor) -> tuple[str, ...]:
        """Text of each response, special tokens left out."""
        rows = [row[mask].tolist() for row, mask in zip(responses, response_mask, strict=True)]
        tokenizer = self.policy.base.tokenizer
        return tuple(tokenizer.batch_decode(rows, skip_special_tokens=True))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One index per row of [B, V], by the inverse of the cumulative distribution; [B] int64.

    `uniform` [B] are numbers in [0, 1).  First the block of tokens is found, then the token in it:
    sums over a whole vocabulary take long.  No draw falls on a token of probability zero.
    """
    size = min(_BLOCK, probabilities.shape[1])
    missing = -probabilities.shape[1] % size
    blocks = nn.functional.pad(probabilities, (0, missing)).unflatten(1, (-1, size))
    ends = blocks.sum(dim=2).cumsum(dim=1)
    # From the sum as computed, not from 1: rounding must not let a draw fall off the end.
    threshold = uniform[:, None] * ends[:, -1:]
    block = _place(ends, threshold)
    before = nn.functional.pad(ends, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1).cumsum(dim=1)
    return (block * size + _place(inside, threshold - before)).squeeze(1)


def _place(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """Where the sums [B, n] first exceed the threshold [B, 1]; always a place that adds to them."""
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(threshold))
    return torch.searchsorted(cumulative, torch.minimum(threshold, below), right=True)


def _until_first_stop(responses: Tensor, stop_ids: Tensor) -> Tensor:
    """True up to and including each row's first stop token; [B, T] bool."""
    is_stop = torch.isin(responses, stop_ids).long()
    return is_stop.cumsum(dim=1) - is_stop == 0
