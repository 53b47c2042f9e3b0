"""Log-probabilities from hidden states: the numbers of the full logits, in any chunks."""

import math

import pytest
import torch
from torch import Tensor

from ppo_engine import logprobs as engine
from ppo_engine.logprobs import OutputHead, head_comparison, head_logprobs, token_logprobs

ROUNDING = 1e-12
"""Of float64 sums in another order."""
SINGLE = 1e-5
"""Of fp32 results."""
HALF = 1e-5
"""All that bf16 hidden states may lose on their way through the head."""
TOKENS, HIDDEN, VOCABULARY = 11, 6, 17


def states_of(seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def head_of(
    *, chunk_tokens: int = 4, temperature: float = 0.7, dtype: torch.dtype = torch.float64
) -> OutputHead:
    generator = torch.Generator().manual_seed(100)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    return OutputHead(weight.to(dtype), bias.to(dtype), temperature, chunk_tokens)


CHOSEN = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(7))


def upstream(seed: int) -> Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(head: OutputHead, of_logprobs: Tensor, of_entropy: Tensor) -> Tensor:
    """∂(Σ g_l·l + Σ g_H·H)/∂states."""
    states = states_of(0).requires_grad_()
    result = head_logprobs(states, CHOSEN, head)
    total = (of_logprobs * result.logprobs).sum() + (of_entropy * result.entropy).sum()
    (found,) = torch.autograd.grad(total, states)
    return found


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_it_gives_the_numbers_of_the_full_logits(temperature: float, *, has_bias: bool) -> None:
    head = head_of(temperature=temperature)
    states = states_of(0)
    logits = states @ head.weight.T
    if has_bias:
        logits = logits + head.bias
    else:
        head = head._replace(bias=None)

    found = head_logprobs(states, CHOSEN, head)

    expected = torch.log_softmax(logits / temperature, dim=1)
    chosen = expected[torch.arange(TOKENS), CHOSEN]
    entropy = -(expected.exp() * expected).sum(dim=1)
    torch.testing.assert_close(found.logprobs, chosen, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=ROUNDING)
    whole = token_logprobs(logits, CHOSEN, temperature=temperature)
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=SINGLE)


@pytest.mark.parametrize("has_bias", [True, False])
def test_its_gradient_is_that_of_finite_differences(*, has_bias: bool) -> None:
    head = head_of(temperature=0.7)
    if not has_bias:
        head = head._replace(bias=None)
    states = states_of(0).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: tuple(head_logprobs(x, CHOSEN, head)), (states,))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, TOKENS - 1, TOKENS, TOKENS + 1, 64])
def test_chunks_of_any_size_give_the_same(chunk_tokens: int) -> None:
    usual, other = head_of(chunk_tokens=4), head_of(chunk_tokens=chunk_tokens)

    expected, found = (head_logprobs(states_of(0), CHOSEN, head) for head in (usual, other))

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(
        gradient(other, upstream(1), upstream(2)),
        gradient(usual, upstream(1), upstream(2)),
        rtol=0,
        atol=ROUNDING,
    )


def test_a_tokens_bits_do_not_depend_on_its_neighbours() -> None:
    head = head_of(dtype=torch.float32)
    states = states_of(0, dtype=torch.float32)

    together = head_logprobs(states, CHOSEN, head)

    for token in range(TOKENS):
        alone = head_logprobs(states[token:][:1], CHOSEN[token:][:1], head)
        assert alone.logprobs.item() == together.logprobs[token].item()
        assert alone.entropy.item() == together.entropy[token].item()


def test_tokens_that_nobody_differentiates_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.tensor([0, 3, 4, 10])
    of_logprobs, of_entropy = torch.zeros(TOKENS).double(), torch.zeros(TOKENS).double()
    of_logprobs[wanted[:3]] = upstream(1)[wanted[:3]]
    of_entropy[wanted[2:]] = upstream(2)[wanted[2:]]
    every = gradient(head_of(chunk_tokens=1), torch.ones(TOKENS), torch.ones(TOKENS))
    scored = []
    scores = OutputHead.scores
    monkeypatch.setattr(
        engine.OutputHead, "scores", lambda head, x: (scored.append(len(x)), scores(head, x))[1]
    )

    found = gradient(head_of(), of_logprobs, of_entropy)

    # Forward: three chunks of four rows, the last filled up.  Backward: the four wanted rows.
    assert scored == [4, 4, 4, 4]
    states = states_of(0).requires_grad_()
    log_p = torch.log_softmax(scores(head_of(), states), dim=1)
    plain = of_logprobs @ log_p[torch.arange(TOKENS), CHOSEN]
    plain = plain - of_entropy @ (log_p.exp() * log_p).sum(dim=1)
    (expected,) = torch.autograd.grad(plain, states)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    skipped = [token for token in range(TOKENS) if token not in wanted]
    assert not found[skipped].any()
    assert every[skipped].all()


def test_bf16_hidden_states_lose_nothing_in_the_head() -> None:
    states = states_of(0, dtype=torch.bfloat16)
    exact = head_of(dtype=torch.float32)
    exact = exact._replace(weight=exact.weight.double(), bias=exact.bias.double())

    found = head_logprobs(states, CHOSEN, head_of(dtype=torch.float32))
    expected = head_logprobs(states.double(), CHOSEN, exact)

    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=HALF)


def kl_of(states: Tensor, reference_states: Tensor, head: OutputHead) -> Tensor:
    tokens = torch.zeros(len(states), dtype=torch.long)
    return head_comparison(states, reference_states, tokens, head).kl


def test_a_comparison_gives_each_side_its_own_log_probabilities_to_the_bit() -> None:
    head = head_of(dtype=torch.float32, chunk_tokens=3)
    ours, theirs = (states_of(seed, dtype=torch.float32) for seed in (0, 1))
    tokens = torch.arange(TOKENS) % VOCABULARY

    found = head_comparison(ours, theirs, tokens, head)

    alone = head_logprobs(ours, tokens, head)
    assert torch.equal(found.logprobs, alone.logprobs)
    assert torch.equal(found.entropy, alone.entropy)
    assert torch.equal(found.reference_logprobs, head_logprobs(theirs, tokens, head).logprobs)
    assert not torch.equal(found.logprobs, found.reference_logprobs)


def test_exact_kl_is_the_written_out_sum() -> None:
    head = head_of(temperature=0.7)
    ours, theirs = states_of(0), states_of(1)

    found = kl_of(ours, theirs, head)

    for token in range(TOKENS):
        p, q = (
            [math.exp(z / 0.7) for z in (head.weight @ x[token] + head.bias).tolist()]
            for x in (ours, theirs)
        )
        p, q = ([x / math.fsum(each) for x in each] for each in (p, q))
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[token].item() == pytest.approx(kl, abs=SINGLE)


def test_exact_kl_is_never_negative_and_zero_for_equal_states() -> None:
    head = head_of(dtype=torch.float32)
    states = states_of(0, dtype=torch.float32)

    near = kl_of(states, states_of(0, dtype=torch.float32) + 0.01, head)

    assert not kl_of(states, states.clone(), head).any()
    assert near.min() > 0
    assert kl_of(states, states_of(1, dtype=torch.float32), head).min() > 0
    assert near.dtype == torch.float32


def test_no_tokens_give_no_numbers() -> None:
    states = torch.zeros(0, HIDDEN, requires_grad=True)
    tokens = torch.zeros(0, dtype=torch.long)
    head = head_of(dtype=torch.float32)

    found = head_logprobs(states, tokens, head)
    (found.logprobs.sum() + found.entropy.sum()).backward()

    assert found.logprobs.shape == found.entropy.shape == (0,)
    assert states.grad is not None
    assert states.grad.shape == (0, HIDDEN)
    assert kl_of(states, states, head).shape == (0,)


def test_the_scores_are_never_held_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    scores = OutputHead.scores
    monkeypatch.setattr(
        engine.OutputHead, "scores", lambda head, x: (held.append(len(x)), scores(head, x))[1]
    )

    gradient(head_of(chunk_tokens=3), upstream(1), upstream(2))

    assert max(held) == 3
