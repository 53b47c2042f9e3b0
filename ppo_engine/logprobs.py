"""Log-probabilities and entropies of sampled tokens, from logits to fp32 numbers."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Of each response token, [B, T] fp32."""

    logprobs: Tensor
    """log π(token | state) at the run's temperature."""
    entropy: Tensor
    """Entropy of the whole next-token distribution, in nats."""


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> TokenLogprobs:
    """Log-probability of each token and entropy of its distribution.

        l_t = z_t[y_t]/τ − logsumexp(z_t/τ)
        H_t = logsumexp(z_t/τ) − Σ_v softmax(z_t/τ)_v · z_tv/τ

    `logits` are [B, T, V], `tokens` [B, T]; results are fp32 whatever the logits are.
    """
    scaled = logits.float() / temperature
    log_normalizer = torch.logsumexp(scaled, dim=-1)
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = log_normalizer - (torch.softmax(scaled, dim=-1) * scaled).sum(-1)
    return TokenLogprobs(chosen - log_normalizer, entropy)
