"""The only reductions of the engine: over response tokens, with one explicit denominator.

Every formula gives one number per token; `row_weights` says once per optimizer step how much each
row's tokens weigh, and `weighted_sum` adds them up.  Any split into micro-batches is then exact.
"""

import torch
from torch import Tensor

from ppo_engine.config import LossAggregation

_VARIANCE_EPSILON = 1e-8


def zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, exact zeros elsewhere, even where they were NaN.

    Apply it before `exp` and `log`, never after: infinity times zero is NaN, in the gradient too.
    """
    return torch.where(mask, values, torch.zeros_like(values))


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens the mask selects; 0 when it selects none."""
    return zero_outside(values, mask).sum() / mask.sum().clamp(min=1)


def standardize(values: Tensor, mask: Tensor) -> Tensor:
    """Values with mean 0 and variance 1 over the mask, zero outside it.

        (A − μ) · rsqrt(σ² + 1e-8),   σ² with N − 1

    Give it the whole rollout batch.  Where all values are equal, or there is only one, there is
    nothing to tell apart, and every result is 0.
    """
    selected = values[mask]
    if selected.numel() < 2:
        return torch.zeros_like(values)
    variance, mean = torch.var_mean(selected, correction=1)
    return zero_outside((values - mean) * torch.rsqrt(variance + _VARIANCE_EPSILON), mask)


def row_weights(
    response_mask: Tensor, mode: LossAggregation, *, max_response_tokens: int
) -> Tensor:
    """Weight of every token of each row in the loss of one optimizer step, [B] float64.

        token_mean                     1/N          N response tokens in all rows
        sequence_mean_token_mean       1/(B·L_i)    L_i response tokens of row i
        sequence_mean_token_sum        1/B          B rows that have response tokens
        sequence_mean_token_sum_norm   1/(B·T_max)  T_max the configured limit, not the padding

    The first is DAPO's (arXiv:2503.14476), the second GRPO's, the last Dr. GRPO's (2503.20783).
    Compute it over all rows of the optimizer step at once, then slice it with the micro-batches.
    Rows without response tokens weigh 0 and do not count in B.
    """
    lengths = response_mask.sum(dim=1).double()
    has_tokens = lengths > 0
    rows = has_tokens.sum().clamp(min=1).double()
    denominators = {
        LossAggregation.TOKEN_MEAN: lengths.sum().expand_as(lengths),
        LossAggregation.SEQUENCE_MEAN_TOKEN_MEAN: rows * lengths,
        LossAggregation.SEQUENCE_MEAN_TOKEN_SUM: rows.expand_as(lengths),
        LossAggregation.SEQUENCE_MEAN_TOKEN_SUM_NORM: (rows * max_response_tokens).expand_as(
            lengths
        ),
    }
    return zero_outside(1 / denominators[mode].clamp(min=1), has_tokens)


def weighted_sum(per_token: Tensor, response_mask: Tensor, weights: Tensor) -> Tensor:
    """Σ w_i · m_it · x_it: the loss, or this micro-batch's part of it."""
    weight = weights.to(per_token.dtype).unsqueeze(1)
    return (weight * zero_outside(per_token, response_mask)).sum()
