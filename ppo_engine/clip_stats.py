"""What clipping did to the tokens of a pass: classes, sums, quantiles, histogram, single tokens.

Diagnostics only: nothing here enters a loss.  The terms come from `losses`, so that statistics and
loss cannot disagree; every sum is float64.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_engine.buckets import (
    POSITION_EDGES,
    PROBABILITY_EDGES,
    WORST_SEQUENCES,
    Buckets,
    BucketSums,
)
from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES, TokenClass
from ppo_engine.histogram import SIGNS, SUMS, Histogram, histogram_edges
from ppo_engine.losses import (
    LOG_RATIO_LIMIT,
    clipped_value_error,
    log_ratio,
    surrogate_terms,
)
from ppo_engine.metrics import QUANTILES, quantile_name
from ppo_engine.reports import PassReport, PassSums

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


class _Tokens(NamedTuple):
    """The response tokens of a pass, one after the other: all [N]."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    position: Tensor
    """Place in the response, from 0."""
    row: Tensor
    """Number of the response in its rollout."""
    weights: Tensor
    """Importance weights."""

    @property
    def drift(self) -> Tensor:
        """The log-ratio d before it is bounded."""
        return self.logprobs - self.old_logprobs


class PassStatistics:
    """Collects the tokens of one pass, micro-batch by micro-batch; sums them up once, at its end.

    So a device is asked for numbers once per pass.
    """

    def __init__(
        self,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        value_clip_range: float | None,
        importance_weight_cap: float | None = None,
    ) -> None:
        self._clip_rule: dict[str, Any] = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "dual_clip": dual_clip,
        }
        self._value_clip_range = value_clip_range
        self._weight_cap = importance_weight_cap
        self._edges = histogram_edges(clip_low, clip_high, dual_clip)
        self._parts: list[_Tokens] = []
        self._rows = 0

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
        rows: Tensor | None = None,
        importance_weights: Tensor | None = None,
    ) -> None:
        """Take in the response tokens of a micro-batch; all tensors [B, T], but `rows` [B].

        `rows` are the responses' numbers in the rollout; without them they are counted.
        """
        mask = response_mask
        if rows is None:
            rows = torch.arange(self._rows, self._rows + len(mask), device=mask.device)
        self._rows += len(mask)
        if importance_weights is None:
            importance_weights = torch.ones_like(old_logprobs)
        self._parts.append(
            _Tokens(
                logprobs=logprobs[mask],
                old_logprobs=old_logprobs[mask],
                advantages=advantages[mask],
                values=values[mask],
                old_values=old_values[mask],
                returns=returns[mask],
                position=(mask.cumsum(dim=1) - 1)[mask],
                row=rows[:, None].expand_as(mask)[mask],
                weights=importance_weights[mask],
            )
        )

    @torch.no_grad()
    def report(
        self,
        *,
        epoch: int,
        minibatch: int,
        grad_norm: float,
        max_grad_norm: float,
        skipped: bool,
    ) -> PassReport:
        """The pass as it stands; `grad_norm` is that before clipping.

        A pass in which a log-ratio had to be bounded counts as skipped.
        """
        is_finite = math.isfinite(grad_norm)
        gradient = PassSums(
            grad_norm=grad_norm if is_finite else 0.0,
            grad_norms=int(is_finite),
            grad_norms_clipped=int(is_finite and grad_norm > max_grad_norm),
        )
        # Everything below is arithmetic on a few thousand numbers: one transfer, then the CPU.
        tokens = _Tokens(*(torch.cat(x).cpu() for x in zip(*self._parts, strict=True)))
        bounded = log_ratio(tokens.logprobs, tokens.old_logprobs)
        ratio = torch.exp(bounded)
        classes = classify(bounded, tokens.advantages, **self._clip_rule).long()
        sums = (
            gradient.merged(self._policy_sums(tokens, bounded, ratio, classes))
            .merged(_drift_sums(tokens.drift, bounded, ratio))
            .merged(_sequence_sums(bounded, tokens.row))
            .merged(self._value_sums(tokens))
            .merged(self._weight_sums(tokens.weights))
        )
        return PassReport(
            epoch=epoch,
            minibatch=minibatch,
            skipped=skipped or sums.log_ratio_clamped > 0,
            sums=sums,
            ratio_quantiles=_quantiles(ratio),
            ratios=Histogram(
                edges=tuple(self._edges),
                sums=self._bins(ratio, tokens.advantages),
                zero_advantage_count=sums.count(TokenClass.ZERO_ADVANTAGE),
            ),
            buckets=_buckets(tokens, bounded, ratio, classes),
            worst_sequences=_worst_sequences(tokens.row, ratio, classes),
        )

    def _policy_sums(
        self, tokens: _Tokens, bounded: Tensor, ratio: Tensor, classes: Tensor
    ) -> PassSums:
        """Classes, surrogate terms and weights of the advantages."""
        terms = surrogate_terms(bounded, tokens.advantages, **self._clip_rule)
        removed = is_clipped(classes)
        size = tokens.advantages.double().abs()
        weight = ratio.double() * size
        return PassSums(
            counts=tuple(torch.bincount(classes, minlength=len(TOKEN_CLASSES)).tolist()),
            above_range=int((ratio > 1 + self._clip_rule["clip_high"]).sum()),
            below_range=int((ratio < 1 - self._clip_rule["clip_low"]).sum()),
            abs_advantage=_total(size),
            abs_advantage_clipped=_total(size[removed]),
            ratio_abs_advantage=_total(weight),
            ratio_abs_advantage_kept=_total(weight[~removed]),
            unclipped=_total(terms.unclipped),
            clipped=_total(terms.clipped),
            objective=_total(terms.objective),
        )

    def _value_sums(self, tokens: _Tokens) -> PassSums:
        """What value clipping did."""
        terms = clipped_value_error(
            tokens.values, tokens.old_values, tokens.returns, clip_range=self._value_clip_range
        )
        return PassSums(
            value_clipped=int(terms.is_clipped.sum()),
            value_out_of_range=int(terms.is_out_of_range.sum()),
        )

    def _weight_sums(self, weights: Tensor) -> PassSums:
        """How far the sampler was from the trainer, as the weights see it."""
        if self._weight_cap is None or not weights.numel():
            return PassSums()
        return PassSums(
            importance_weight=_total(weights),
            importance_weight_max=float(weights.max()),
            importance_weights=weights.numel(),
            importance_weights_capped=int((weights >= self._weight_cap).sum()),
        )

    def _bins(self, ratio: Tensor, advantages: Tensor) -> tuple[float, ...]:
        """The tokens sorted into bins; edges are compared in the ratio's own precision."""
        ratios, chosen = ratio.numpy(), advantages.numpy()
        lower = np.array([edge for edge in self._edges if edge < 1], dtype=ratios.dtype)
        upper = np.array([edge for edge in self._edges if edge >= 1], dtype=ratios.dtype)
        bins = np.searchsorted(lower, ratios, side="right") + np.searchsorted(upper, ratios)
        sizes = np.abs(chosen.astype(np.float64))
        weights = (np.ones_like(sizes), sizes, ratios.astype(np.float64) * sizes)
        is_finite = np.isfinite(ratios)
        sums = np.zeros((len(SIGNS), len(SUMS), len(self._edges) + 1))
        for sign, is_chosen in enumerate((is_finite & (chosen > 0), is_finite & (chosen < 0))):
            for kind, weight in enumerate(weights):
                sums[sign, kind] = np.bincount(bins[is_chosen], weight[is_chosen], sums.shape[2])
        return tuple(sums.ravel().tolist())


def token_rows(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> list[dict[str, Any]]:
    """What the clip rule did to each of these tokens [N]: the numbers behind its class."""
    rule: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    bounded = log_ratio(logprobs, old_logprobs)
    terms = surrogate_terms(bounded, advantages, **rule)
    classes = classify(bounded, advantages, **rule).long()
    is_bounded = (logprobs - old_logprobs).abs() > LOG_RATIO_LIMIT
    removed = is_clipped(classes) | is_bounded  # the bound, too, lets no gradient through
    columns = {
        "log_ratio": bounded,
        "ratio": torch.exp(bounded),
        "advantage": advantages,
        "unclipped": terms.unclipped,
        "clipped": terms.clipped,
        "objective": terms.objective,
        "d_objective_d_logprob": torch.where(removed, 0.0, terms.unclipped),
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    return [
        {
            **{name: column[index] for name, column in numbers.items()},
            "class": TOKEN_CLASSES[number],
            "gradient_kept": not clipped,
        }
        for index, (number, clipped) in enumerate(
            zip(classes.tolist(), removed.tolist(), strict=True)
        )
    ]


def is_clipped(classes: Tensor) -> Tensor:
    """Where clipping removes the policy gradient, from the numbers of `classify`."""
    clipped = torch.tensor(_CLIPPED_NUMBERS, dtype=classes.dtype, device=classes.device)
    return torch.isin(classes, clipped)


def _quantiles(ratio: Tensor) -> dict[str, float | None]:
    """Exact quantiles of all ratios, interpolated linearly between neighbours."""
    names = [quantile_name(share) for share in QUANTILES]
    ratios = ratio.double().numpy()
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
        kl_k3=_total(_k3(d)),
    )


def _k3(d: Tensor) -> Tensor:
    return torch.expm1(d) - d


def _sequence_sums(bounded: Tensor, row: Tensor) -> PassSums:
    """Rows with response tokens, and their ratios as wholes."""
    if not row.numel():
        return PassSums()
    index = torch.unique(row, return_inverse=True)[1]
    whole = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    whole = whole.index_add(0, index, bounded.double())
    return PassSums(
        sequences=len(whole),
        log_sequence_ratio=float(torch.logsumexp(whole, 0)),
        log_sequence_ratio_square=float(torch.logsumexp(2 * whole, 0)),
    )


def _buckets(tokens: _Tokens, bounded: Tensor, ratio: Tensor, classes: Tensor) -> Buckets:
    """The classes by place in the response and by old probability."""
    position = torch.bucketize(tokens.position, torch.tensor(POSITION_EDGES), right=True)
    edges = torch.tensor(PROBABILITY_EDGES, dtype=torch.float64)
    probability = torch.bucketize(tokens.old_logprobs.double().exp(), edges, right=True)

    size = tokens.advantages.double().abs()
    sums = (size, size * is_clipped(classes), ratio.double(), _k3(bounded.double()))
    return Buckets(
        position=_table(position, len(POSITION_EDGES) + 1, classes, sums),
        old_probability=_table(probability, len(PROBABILITY_EDGES) + 1, classes, sums),
    )


def _table(
    bucket: Tensor, buckets: int, classes: Tensor, sums: Sequence[Tensor]
) -> tuple[BucketSums, ...]:
    """Classes counted, and the rest summed up, by the number of each token's bucket."""
    kinds = len(TOKEN_CLASSES)
    places = (bucket * kinds + classes).numpy()
    counts = np.bincount(places, minlength=buckets * kinds).reshape(buckets, kinds).tolist()
    totals = [
        # Without tokens it would count, in integers.
        np.bincount(bucket.numpy(), each.numpy(), buckets).astype(float).tolist()
        for each in sums
    ]
    return tuple(
        BucketSums(
            counts=tuple(of_classes),
            abs_advantage=size,
            abs_advantage_clipped=clipped,
            ratio=ratio,
            kl_k3=drift,
        )
        if all(map(math.isfinite, (size, clipped, ratio, drift)))
        else BucketSums()  # a broken pass; JSON has no number for it
        for of_classes, size, clipped, ratio, drift in zip(counts, *totals, strict=True)
    )


def _worst_sequences(row: Tensor, ratio: Tensor, classes: Tensor) -> tuple[dict[str, Any], ...]:
    """The responses with the most clipped tokens, if any token was clipped."""
    if not row.numel():
        return ()
    numbers, index = torch.unique(row, return_inverse=True)
    clipped = torch.zeros(len(numbers), dtype=torch.long)
    clipped = clipped.index_add(0, index, is_clipped(classes).long())
    tokens = torch.bincount(index)
    order = torch.argsort(clipped, descending=True, stable=True)[:WORST_SEQUENCES].tolist()
    return tuple(
        {
            "row": int(numbers[at]),
            "tokens": int(tokens[at]),
            "clipped_tokens": int(clipped[at]),
            "ratio_max": _finite_or_none(float(ratio[index == at].max())),
        }
        for at in order
        if clipped[at]
    )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _total(values: Tensor) -> float:
    return float(values.double().sum())
