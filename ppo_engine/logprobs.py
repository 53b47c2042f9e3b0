"""Log-probabilities and entropies of sampled tokens, from hidden states to fp32 numbers.

The output head is by far the widest layer, so its scores are never held for all tokens at once:
they are made chunk by chunk, and made again in the backward pass.  Every chunk has the same shape,
filled up where needed, because products of another shape round differently and the first ratio of
an update would not be exactly 1.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TokenLogprobs(NamedTuple):
    """Of each token, fp32."""

    logprobs: Tensor
    """log π(token | state) at the run's temperature."""
    entropy: Tensor
    """Entropy of the whole next-token distribution, in nats."""


class HeadComparison(NamedTuple):
    """Of each token, under a policy and its reference, [N] fp32."""

    logprobs: Tensor
    entropy: Tensor
    reference_logprobs: Tensor
    kl: Tensor
    """KL(π‖π_ref) = Σ_v π·(ln π − ln π_ref) over the whole vocabulary."""


class OutputHead(NamedTuple):
    """The frozen layer from hidden states to next-token scores, and how it is used."""

    weight: Tensor
    """[V, H]; any float format."""
    bias: Tensor | None
    """[V], or None."""
    temperature: float
    """τ."""
    chunk_tokens: int
    """Tokens whose scores are held at once; more need memory, on a GPU they save time."""

    def scores(self, states: Tensor) -> Tensor:
        """z/τ of hidden states [N, H] -> [N, V], at least fp32 whatever the model's format is."""
        wide = torch.promote_types(states.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return nn.functional.linear(states.to(wide), self.weight.to(wide), bias) / self.temperature


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> TokenLogprobs:
    """Log-probability of each token and entropy of its distribution.

        l_t = z_t[y_t]/τ − logsumexp(z_t/τ)
        H_t = logsumexp(z_t/τ) − Σ_v softmax(z_t/τ)_v · z_tv/τ

    `logits` are [..., V], `tokens` [...]; results are fp32 whatever the logits are.
    """
    return _from_scores(logits.float() / temperature, tokens)


def head_logprobs(states: Tensor, tokens: Tensor, head: OutputHead) -> TokenLogprobs:
    """`token_logprobs` of hidden states [N, H] for tokens [N], in bounded memory.

    Differentiable in `states`; the head is frozen.  Tokens whose result nobody differentiates, such
    as clipped ones, cost nothing in the backward pass.
    """
    return TokenLogprobs(*_HeadLogprobs.apply(states, tokens, head))  # type: ignore[no-untyped-call]


@torch.no_grad()
def head_comparison(
    states: Tensor, reference_states: Tensor, tokens: Tensor, head: OutputHead
) -> HeadComparison:
    """`head_logprobs` of a policy, exactly, beside a reference; the scores of each are made once.

    Both are hidden states [N, H] before the same head, `tokens` [N].
    """
    none = states.new_zeros(0, dtype=torch.float32)
    parts = [(none, none, none, none)]
    pairs = zip(_chunks(states, head), _chunks(reference_states, head), strict=True)
    for number, ((chunk, real), (reference, _)) in enumerate(pairs):
        chosen = tokens[number * head.chunk_tokens :][:real]
        ours, theirs = (head.scores(x)[:real] for x in (chunk, reference))
        logprobs, entropy = _from_scores(ours, chosen)
        log_p, log_q = (torch.log_softmax(scores, dim=-1) for scores in (ours, theirs))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        parts.append((logprobs, entropy, _from_scores(theirs, chosen).logprobs, kl))
    return HeadComparison(*(torch.cat(part).float() for part in zip(*parts, strict=True)))


def _from_scores(scores: Tensor, tokens: Tensor) -> TokenLogprobs:
    log_normalizer = torch.logsumexp(scores, dim=-1)
    chosen = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = log_normalizer - (torch.softmax(scores, dim=-1) * scores).sum(-1)
    return TokenLogprobs(chosen - log_normalizer, entropy)


def _chunks(states: Tensor, head: OutputHead) -> Iterator[tuple[Tensor, int]]:
    """Chunks of `chunk_tokens` rows, the last filled up, and how many rows of each are real."""
    missing = -len(states) % head.chunk_tokens
    filled = nn.functional.pad(states, (0, 0, 0, missing))
    for start in range(0, len(states), head.chunk_tokens):
        real = min(head.chunk_tokens, len(states) - start)
        yield filled[start : start + head.chunk_tokens], real


class _HeadLogprobs(torch.autograd.Function):
    """`head_logprobs` with its own backward pass, which makes the scores again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, tokens: Tensor, head: OutputHead
    ) -> tuple[Tensor, Tensor]:
        parts = []
        wide = torch.promote_types(states.dtype, torch.float32)
        for start, (chunk, real) in enumerate(_chunks(states, head)):
            first = start * head.chunk_tokens
            scores = head.scores(chunk)[:real]
            parts.append(_from_scores(scores, tokens[first : first + real]))
        ctx.save_for_backward(states, tokens)
        ctx.head = head
        empty = states.new_zeros(0, dtype=wide)
        logprobs, entropy = zip(*parts, strict=True) if parts else ((empty,), (empty,))
        return torch.cat(logprobs), torch.cat(entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """∂l/∂z = (1[y] − p)/τ and ∂H/∂z = −p·(ln p + H)/τ, times the head's weight."""
        states, tokens = ctx.saved_tensors
        head: OutputHead = ctx.head
        of_logprobs, of_entropy = gradients
        result = torch.zeros_like(states)
        counts = ((of_logprobs != 0) | (of_entropy != 0)).nonzero().squeeze(1)
        for rows in counts.split(head.chunk_tokens):
            log_p = torch.log_softmax(head.scores(states[rows]), dim=-1)
            p = log_p.exp()
            entropy = -(p * log_p).sum(dim=-1, keepdim=True)
            wanted, broader = of_logprobs[rows, None], of_entropy[rows, None]
            of_scores = -p * (wanted + broader * (log_p + entropy))
            of_scores.scatter_add_(1, tokens[rows, None], wanted.to(of_scores.dtype))
            weight = head.weight.to(of_scores.dtype)
            result[rows] = ((of_scores / head.temperature) @ weight).to(states.dtype)
        return result, None, None
