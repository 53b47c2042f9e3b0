"""What clipping did to the tokens of a pass: classes, sums, quantiles, histogram.

Diagnostics only: nothing here enters a loss.  The terms come from `losses`, so that statistics and
loss cannot disagree; every sum is float64.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES, TokenClass
from ppo_engine.histogram import SIGNS, SUMS, Histogram, histogram_edges
from ppo_engine.losses import (
    LOG_RATIO_LIMIT,
    clipped_value_error,
    log_ratio,
    surrogate_terms,
)
from ppo_engine.reports import QUANTILES, PassReport, PassSums, quantile_name

_NUMBERS = {token_class: number for number, token_class in enumerate(TokenClass)}
_CLIPPED_NUMBERS = [_NUMBERS[each] for each in CLIPPED_CLASSES]


def classify(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    """Number of each token's class in `TOKEN_CLASSES`, int8; the bounds themselves are inside.

    Tokens outside the response have advantage 0 and class `zero_advantage`; leave them out.
    """
    ratio = torch.exp(log_ratio)
    above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
    positive = torch.where(
        above,
        _NUMBERS[TokenClass.CLIPPED_HIGH],
        torch.where(
            below,
            _NUMBERS[TokenClass.UNCLIPPED_OUT_LOW],
            _NUMBERS[TokenClass.IN_RANGE_POSITIVE],
        ),
    )
    negative = torch.where(
        above,
        _NUMBERS[TokenClass.UNCLIPPED_OUT_HIGH],
        torch.where(
            below, _NUMBERS[TokenClass.CLIPPED_LOW], _NUMBERS[TokenClass.IN_RANGE_NEGATIVE]
        ),
    )
    if dual_clip is not None:
        negative = torch.where(ratio > dual_clip, _NUMBERS[TokenClass.DUAL_CLIPPED], negative)
    signed = torch.where(advantages > 0, positive, negative)
    return torch.where(advantages == 0, _NUMBERS[TokenClass.ZERO_ADVANTAGE], signed).to(torch.int8)


class PassStatistics:
    """Collects the tokens of one pass, micro-batch by micro-batch."""

    def __init__(
        self,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        value_clip_range: float | None,
    ) -> None:
        self._clip_rule: dict[str, Any] = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "dual_clip": dual_clip,
        }
        self._value_clip_range = value_clip_range
        self._edges = histogram_edges(clip_low, clip_high, dual_clip)
        self._sums = PassSums()
        self._bins = np.zeros((len(SIGNS), len(SUMS), len(self._edges) + 1))
        self._ratios: list[np.ndarray[Any, Any]] = []

    @property
    def log_ratio_clamped_count(self) -> int:
        """Tokens so far whose log-ratio was beyond ±20."""
        return self._sums.log_ratio_clamped

    @torch.no_grad()
    def add(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
    ) -> None:
        """Take in the response tokens of a micro-batch; all tensors [B, T]."""
        mask = response_mask
        drift = (logprobs - old_logprobs)[mask]
        bounded = log_ratio(logprobs[mask], old_logprobs[mask])
        chosen = advantages[mask]
        ratio = torch.exp(bounded)
        self._sums = (
            self._sums.merged(self._policy_sums(bounded, ratio, chosen))
            .merged(_drift_sums(drift, bounded, ratio))
            .merged(_sequence_sums(logprobs, old_logprobs, mask))
            .merged(self._value_sums(values[mask], old_values[mask], returns[mask]))
        )
        self._add_to_bins(ratio, chosen)
        self._ratios.append(ratio.double().cpu().numpy())

    def report(
        self,
        *,
        epoch: int,
        minibatch: int,
        grad_norm: float,
        max_grad_norm: float,
        skipped: bool,
    ) -> PassReport:
        """The pass as it stands; `grad_norm` is that before clipping."""
        is_finite = math.isfinite(grad_norm)
        gradient = PassSums(
            grad_norm=grad_norm if is_finite else 0.0,
            grad_norms=int(is_finite),
            grad_norms_clipped=int(is_finite and grad_norm > max_grad_norm),
        )
        return PassReport(
            epoch=epoch,
            minibatch=minibatch,
            skipped=skipped,
            sums=self._sums.merged(gradient),
            ratio_quantiles=self._quantiles(),
            ratios=Histogram(
                edges=tuple(self._edges),
                sums=tuple(self._bins.ravel().tolist()),
                zero_advantage_count=self._sums.count(TokenClass.ZERO_ADVANTAGE),
            ),
        )

    def _policy_sums(self, bounded: Tensor, ratio: Tensor, advantages: Tensor) -> PassSums:
        """Classes, surrogate terms and weights of the advantages."""
        terms = surrogate_terms(bounded, advantages, **self._clip_rule)
        classes = classify(bounded, advantages, **self._clip_rule).long()
        is_clipped = torch.isin(classes, torch.tensor(_CLIPPED_NUMBERS, device=classes.device))
        size = advantages.double().abs()
        weight = ratio.double() * size
        return PassSums(
            counts=tuple(torch.bincount(classes, minlength=len(TOKEN_CLASSES)).tolist()),
            above_range=int((ratio > 1 + self._clip_rule["clip_high"]).sum()),
            below_range=int((ratio < 1 - self._clip_rule["clip_low"]).sum()),
            abs_advantage=_total(size),
            abs_advantage_clipped=_total(size[is_clipped]),
            ratio_abs_advantage=_total(weight),
            ratio_abs_advantage_kept=_total(weight[~is_clipped]),
            unclipped=_total(terms.unclipped),
            clipped=_total(terms.clipped),
            objective=_total(terms.objective),
        )

    def _value_sums(self, values: Tensor, old_values: Tensor, returns: Tensor) -> PassSums:
        """What value clipping did."""
        terms = clipped_value_error(values, old_values, returns, clip_range=self._value_clip_range)
        return PassSums(
            value_clipped=int(terms.is_clipped.sum()),
            value_out_of_range=int(terms.is_out_of_range.sum()),
        )

    def _add_to_bins(self, ratio: Tensor, advantages: Tensor) -> None:
        """Sort the tokens into bins; edges are compared in the ratio's own precision."""
        ratios, chosen = ratio.cpu().numpy(), advantages.cpu().numpy()
        lower = np.array([edge for edge in self._edges if edge < 1], dtype=ratios.dtype)
        upper = np.array([edge for edge in self._edges if edge >= 1], dtype=ratios.dtype)
        bins = np.searchsorted(lower, ratios, side="right") + np.searchsorted(upper, ratios)
        sizes = np.abs(chosen.astype(np.float64))
        weights = (np.ones_like(sizes), sizes, ratios.astype(np.float64) * sizes)
        is_finite = np.isfinite(ratios)
        for sign, is_chosen in enumerate((is_finite & (chosen > 0), is_finite & (chosen < 0))):
            for kind, weight in enumerate(weights):
                self._bins[sign, kind] += np.bincount(
                    bins[is_chosen], weight[is_chosen], self._bins.shape[2]
                )

    def _quantiles(self) -> dict[str, float | None]:
        """Exact quantiles of all ratios, interpolated linearly between neighbours."""
        names = [quantile_name(share) for share in QUANTILES]
        ratios = np.concatenate([*self._ratios, np.zeros(0)])
        if not ratios.size or not np.isfinite(ratios).all():
            return dict.fromkeys(names)
        return dict(zip(names, np.quantile(ratios, QUANTILES).tolist(), strict=True))


def _drift_sums(drift: Tensor, bounded: Tensor, ratio: Tensor) -> PassSums:
    """How far the policy has moved from the old one."""
    if not drift.numel():
        return PassSums()
    d, wide = bounded.double(), ratio.double()
    return PassSums(
        ratio=_total(wide),
        ratio_square=_total(wide.square()),
        ratio_min=float(wide.min()),
        ratio_max=float(wide.max()),
        log_ratio_abs_max=float(drift.abs().max()),
        log_ratio_clamped=int((drift.abs() > LOG_RATIO_LIMIT).sum()),
        kl_k1=_total(-d),
        kl_k2=_total(d.square() / 2),
        kl_k3=_total(torch.expm1(d) - d),
    )


def _sequence_sums(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> PassSums:
    """Rows with response tokens, and their ratios as wholes."""
    has_tokens = response_mask.any(dim=1)
    if not bool(has_tokens.any()):
        return PassSums()
    drift = log_ratio(logprobs, old_logprobs).double()
    whole = torch.where(response_mask, drift, 0.0).sum(dim=1)[has_tokens]
    return PassSums(
        sequences=int(has_tokens.sum()),
        log_sequence_ratio=float(torch.logsumexp(whole, 0)),
        log_sequence_ratio_square=float(torch.logsumexp(2 * whole, 0)),
    )


def _total(values: Tensor) -> float:
    return float(values.double().sum())
