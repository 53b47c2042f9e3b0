"""Log-probabilities and entropies of sampled tokens, from hidden states to fp32 numbers.

The output head is by far the widest layer, so its scores are never held for the whole vocabulary at
once: they are made block by block, and what is wanted of them is summed up on the way, as attention
does over its keys (online softmax, arXiv:1805.02867).  The gradient is summed up in the same walk,
so the backward pass makes no scores again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppo_engine.native import (
    Kernels,
    kernels_for,
    large_product_kernels_for,
    product_kernels_for,
)
from ppo_engine.packing import FEWEST_TOKENS
from ppo_engine.products import PackedWeight, is_packable, product, wide_format, wide_product


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


class OutputHead:
    """The frozen layer from hidden states to next-token scores z/τ, in blocks of the vocabulary.

    Scores are at least fp32 whatever the model's format is; for that a CPU without our kernels for
    the format needs wide weights, which are held once more, packed where they can be.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, temperature: float, block_entries: int
    ) -> None:
        """`weight` [V, H], `bias` [V]; at most `block_entries` entries' scores are held at once."""
        self.weight = weight
        self.bias = bias
        self.temperature = temperature
        count = -(-len(weight) // block_entries)
        size = -(-len(weight) // count)
        self.blocks = tuple(
            HeadBlock(
                start,
                weight[start : start + size],
                None if bias is None else bias[start : start + size],
                temperature,
            )
            for start in range(0, len(weight), size)
        )

    def scores(self, states: Tensor) -> Tensor:
        """z/τ of hidden states [N, H] -> [N, V], all at once."""
        if states.is_cuda or product_kernels_for(self.weight) is not None:
            whole = HeadBlock(0, self.weight, self.bias, self.temperature)
            return whole.few_scores(states)
        return torch.cat([block.scores(states) for block in self.blocks], dim=1)


class HeadBlock:
    """Some neighbouring entries of the vocabulary."""

    def __init__(self, start: int, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        self.start = start
        """Number of the first entry."""
        self._weight = weight
        self._kernels = product_kernels_for(weight)
        self._wide = weight if self._kernels is not None else _wide_weight(weight)
        self._bias = None if bias is None else bias.to(wide_format(weight.dtype))
        self._temperature = temperature

    def scores(self, states: Tensor) -> Tensor:
        """z/τ of hidden states [N, H] -> [N, V'], at least fp32."""
        kernels = large_product_kernels_for(states)
        if kernels is None or states.dtype != self._weight.dtype:
            return self.few_scores(states)
        return kernels.large_product(
            states,
            self._weight.t(),
            bias=self._bias,
            divisor=self._temperature,
            dtype=torch.float32,
        )

    def few_scores(self, states: Tensor) -> Tensor:
        """The same, faster where the weight is worth reading just once: for few states."""
        if self._kernels is not None and states.dtype == self._weight.dtype:
            return self._kernels.product(
                states,
                self._weight,
                bias=self._bias,
                divisor=self._temperature,
                dtype=torch.float32,
            )
        if isinstance(self._wide, PackedWeight):
            scores = self._wide.product(states.to(torch.float32), bias=self._bias)
        else:
            scores = wide_product(states, self._wide.t())
            if self._bias is not None:
                scores += self._bias
        return scores if self._temperature == 1 else scores.div_(self._temperature)

    def mixed(self, weights: Tensor) -> Tensor:
        """Σ_v weight·W_v for weights [N, V'] -> [N, H], at least in the model's format."""
        weights = weights.to(self._weight.dtype)
        if (kernels := large_product_kernels_for(weights)) is not None:
            return kernels.large_product(weights, self._weight, dtype=torch.float32)
        if weights.is_cuda:
            return wide_product(weights, self._weight)
        return product(weights, self._weight)


def _wide_weight(weight: Tensor) -> "Tensor | PackedWeight":
    if weight.is_cuda:
        return weight
    wide = weight.to(wide_format(weight.dtype))
    return PackedWeight(wide) if is_packable(wide.device, wide.dtype) else wide


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> TokenLogprobs:
    """Log-probability of each token and entropy of its distribution.

        l_t = z_t[y_t]/τ − logsumexp(z_t/τ)
        H_t = logsumexp(z_t/τ) − Σ_v softmax(z_t/τ)_v · z_tv/τ

    `logits` are [..., V], `tokens` [...]; results are fp32 whatever the logits are.
    """
    scores = logits.float() / temperature
    log_normalizer = torch.logsumexp(scores, dim=-1)
    chosen = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = log_normalizer - (torch.softmax(scores, dim=-1) * scores).sum(-1)
    return TokenLogprobs(chosen - log_normalizer, entropy)


def head_logprobs(
    states: Tensor, tokens: Tensor, head: OutputHead, *, entropy_gradient: bool = True
) -> TokenLogprobs:
    """`token_logprobs` of hidden states [N, H] for tokens [N], in bounded memory.

    Differentiable in `states`; the head is frozen.  Without `entropy_gradient` the entropy is a
    number only, which saves a third of the work.
    """
    is_trained = torch.is_grad_enabled() and states.requires_grad
    gradients = _Gradients(of_logprobs=is_trained, of_entropy=is_trained and entropy_gradient)
    return TokenLogprobs(*_HeadLogprobs.apply(states, tokens, head, gradients))  # type: ignore[no-untyped-call]


@torch.no_grad()
def head_comparison(
    states: Tensor, reference_states: Tensor, tokens: Tensor, head: OutputHead
) -> HeadComparison:
    """`head_logprobs` of a policy, exactly, beside a reference; the scores of each are made once.

    Both are hidden states [N, H] before the same head, `tokens` [N].
    """
    ours, theirs = (_walk(each, tokens) for each in (states, reference_states))
    for block in head.blocks:
        our_scores, their_scores = (block.scores(walk.states) for walk in (ours, theirs))
        ours.take_in(block.start, our_scores, others=their_scores)
        theirs.take_in(block.start, their_scores)
    kl = ours.lead - ours.log_normalizer + theirs.log_normalizer
    real = len(states)
    found = (ours.logprobs, ours.entropy, theirs.logprobs, kl)
    return HeadComparison(*(each[:real].float() for each in found))


class _Gradients(NamedTuple):
    """Which gradients a walk sums up."""

    of_logprobs: bool
    of_entropy: bool


_NO_GRADIENTS = _Gradients(of_logprobs=False, of_entropy=False)


class _Taken(NamedTuple):
    """What a block adds to the sums of the gradients, and what becomes of them before."""

    shift: Tensor
    """Highest score before less the one now, [N]; 0 for the first block."""
    plain: Tensor | None
    """exp(z − top) but for the chosen token, [N, V']."""
    weighted: Tensor | None
    """exp(z − top)·(z − top), likewise."""


def _walk(states: Tensor, tokens: Tensor) -> "_Walk":
    kernels = kernels_for(states)
    return _Walk(states, tokens) if kernels is None else _NativeWalk(states, tokens, kernels)


class _Walk:
    """Running sums over the vocabulary, relative to the highest score so far; N tokens, [N]."""

    def __init__(self, states: Tensor, tokens: Tensor) -> None:
        missing = max(0, FEWEST_TOKENS - len(states))
        self.states = nn.functional.pad(states, (0, 0, 0, missing))
        """[N, H], filled up."""
        self._tokens = nn.functional.pad(tokens, (0, missing))
        shape = (5, len(self.states))
        self._sums = self.states.new_zeros(shape, dtype=wide_format(states.dtype))
        """Highest score z; Σ exp(z − top); Σ exp(z − top)·(z − top); z of the chosen token; and
        Σ exp(z − top)·(z − z'), for others' scores z'."""
        self._top, self.total, self._weighted, self._chosen, self._apart = self._sums.unbind()
        self._top.fill_(-torch.inf)

    def take_in(
        self,
        start: int,
        scores: Tensor,
        *,
        others: Tensor | None = None,
        wanted: _Gradients = _NO_GRADIENTS,
    ) -> _Taken:
        """Adds a block of scores [N, V'] from the entry `start` on, and uses them up.

        `others` are those that `lead` compares with.
        """
        places = (self._tokens - start)[:, None]
        inside = places.clamp(0, scores.shape[1] - 1)
        is_here = places == inside
        self._chosen.copy_(
            torch.where(is_here, scores.gather(1, inside), self._chosen[:, None])[:, 0]
        )
        apart = None if others is None else scores - others
        top = torch.maximum(self._top, scores.amax(dim=1))
        shift = torch.where(self.total > 0, self._top - top, 0.0)
        scale = shift.exp()
        scores.sub_(top[:, None])
        weights = scores.exp()
        self._weighted.addcmul_(shift, self.total).mul_(scale).add_(
            torch.linalg.vecdot(weights, scores)
        )
        self.total.mul_(scale).add_(weights.sum(dim=1))
        if apart is not None:
            self._apart.mul_(scale).add_(torch.linalg.vecdot(weights, apart))
        self._top.copy_(top)
        if wanted.of_logprobs:
            weights.scatter_(1, inside, weights.gather(1, inside).masked_fill_(is_here, 0))
        return _Taken(
            shift,
            weights if wanted.of_logprobs else None,
            scores.mul_(weights) if wanted.of_entropy else None,
        )

    @property
    def log_normalizer(self) -> Tensor:
        """Logsumexp of the scores."""
        return self._top + self.total.log()

    @property
    def logprobs(self) -> Tensor:
        """Of the chosen tokens."""
        return self._chosen - self.log_normalizer

    @property
    def mean(self) -> Tensor:
        """Σ p·z relative to the highest z."""
        return self._weighted / self.total

    @property
    def lead(self) -> Tensor:
        """Σ p·(z − z')."""
        return self._apart / self.total

    @property
    def entropy(self) -> Tensor:
        """Σ −p·ln p = ln Σ exp(z − top) − Σ p·(z − top)."""
        return self.total.log() - self.mean


class _NativeWalk(_Walk):
    """The same in one walk over a block's scores, in fp32."""

    def __init__(self, states: Tensor, tokens: Tensor, kernels: Kernels) -> None:
        super().__init__(states, tokens)
        self._kernels = kernels

    def take_in(
        self,
        start: int,
        scores: Tensor,
        *,
        others: Tensor | None = None,
        wanted: _Gradients = _NO_GRADIENTS,
    ) -> _Taken:
        """Adds a block of scores [N, V']; what is wanted for gradients is in the states' format."""
        plain, weighted = (
            torch.empty_like(scores, dtype=self.states.dtype) if each else None for each in wanted
        )
        shift = self._kernels.take_in(
            scores, others, self._tokens, start, self._sums, plain, weighted
        )
        return _Taken(shift, plain, weighted)


class _HeadLogprobs(torch.autograd.Function):
    """`head_logprobs`; its forward pass makes the gradients too, per token."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, tokens: Tensor, head: OutputHead, wanted: _Gradients
    ) -> tuple[Tensor, Tensor]:
        walk = _walk(states, tokens)
        # Without the chosen tokens, Σ exp(z − top)·W and Σ exp(z − top)·(z − top)·W, [N, H].
        plain, weighted = (
            torch.zeros_like(walk.states, dtype=walk.total.dtype) if each else None
            for each in wanted
        )
        for block in head.blocks:
            taken = walk.take_in(block.start, block.scores(walk.states), wanted=wanted)
            shift = taken.shift[:, None]
            if plain is not None and taken.plain is not None:
                if weighted is not None and taken.weighted is not None:
                    weighted.addcmul_(plain, shift).mul_(shift.exp())
                    weighted.add_(block.mixed(taken.weighted))
                plain.mul_(shift.exp()).add_(block.mixed(taken.plain))
        real = len(states)
        if plain is not None:
            chosen = head.weight[tokens].to(plain.dtype)
            others = (plain / walk.total[:, None])[:real]
            p, log_p = walk.logprobs.exp()[:real, None], walk.logprobs[:real, None]
            of_logprobs = chosen * (1 - p) - others
            of_entropy = None
            if weighted is not None:
                entropy = walk.entropy[:real, None]
                of_entropy = others * walk.mean[:real, None]
                of_entropy -= (weighted / walk.total[:, None])[:real]
                of_entropy -= chosen * (p * (log_p + entropy))
                of_entropy /= head.temperature
            ctx.gradients = of_logprobs.div_(head.temperature), of_entropy
        ctx.dtype = states.dtype
        entropy = walk.entropy[:real]
        if not wanted.of_entropy:
            ctx.mark_non_differentiable(entropy)
        return walk.logprobs[:real], entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        """∂l/∂x = (W_y − Σ p·W)/τ and ∂H/∂x = −Σ p·(ln p + H)·W/τ, times what comes from above."""
        of_logprobs, of_entropy = ctx.gradients
        result = of_logprobs * upstream[0][:, None]
        if of_entropy is not None:
            result.addcmul_(of_entropy, upstream[1][:, None])
        return result.to(ctx.dtype), None, None, None
