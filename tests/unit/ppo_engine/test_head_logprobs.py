"""Log-probabilities from hidden states: the numbers of the full logits, in any chunks."""

import math

import pytest
import torch
from torch import Tensor

from ppo_engine import logprobs as engine
from ppo_engine import native
from ppo_engine.logprobs import OutputHead, head_comparison, head_logprobs, token_logprobs

ROUNDING = 1e-12
"""Of float64 sums in another order."""
SINGLE = 1e-5
"""Of fp32 results."""
HALF = 1e-5
"""All that bf16 hidden states may lose on their way through the head."""
SURE = 0.02
BF16_ROUNDING = 2**-6
"""Of a gradient, relative: a few roundings of 2⁻⁹ each."""
TOKENS, HIDDEN, VOCABULARY = 11, 6, 17


def states_of(seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def head_of(
    *,
    block_entries: int = 4,
    temperature: float = 0.7,
    dtype: torch.dtype = torch.float64,
    has_bias: bool = True,
) -> OutputHead:
    generator = torch.Generator().manual_seed(100)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    return OutputHead(
        weight.to(dtype),
        bias.to(dtype) if has_bias else None,
        temperature=temperature,
        block_entries=block_entries,
    )


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
    head = head_of(temperature=temperature, has_bias=has_bias)
    states = states_of(0)
    logits = states @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias

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
    head = head_of(temperature=0.7, has_bias=has_bias)
    states = states_of(0).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: tuple(head_logprobs(x, CHOSEN, head)), (states,))


@pytest.mark.parametrize("entries", [1, 2, 3, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 64])
def test_blocks_of_any_size_give_the_same(entries: int) -> None:
    usual, other = head_of(block_entries=4), head_of(block_entries=entries)

    expected, found = (head_logprobs(states_of(0), CHOSEN, head) for head in (usual, other))

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(
        gradient(other, upstream(1), upstream(2)),
        gradient(usual, upstream(1), upstream(2)),
        rtol=0,
        atol=ROUNDING,
    )


@pytest.fixture(params=["kernels", "no kernels"])
def kernels_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no kernels":
        monkeypatch.setattr(native, "_kernels", dict)


with_and_without_kernels = pytest.mark.usefixtures("kernels_or_none")


@with_and_without_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_tokens_bits_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(258, 64, generator=generator).to(dtype)
    head = OutputHead(weight, None, temperature=0.7, block_entries=100)
    states = torch.randn(150, 64, generator=generator).to(dtype)
    tokens = torch.randint(258, (150,), generator=generator)

    together = head_logprobs(states, tokens, head)

    for first in range(0, 150, 7):
        for count in (1, 3, 20, 77):
            part = slice(first, first + count)
            alone = head_logprobs(states[part], tokens[part], head)
            assert torch.equal(alone.logprobs, together.logprobs[part])
            assert torch.equal(alone.entropy, together.entropy[part])


def test_without_an_entropy_gradient_the_entropy_is_a_number_only() -> None:
    states = states_of(0).requires_grad_()
    of_logprobs = upstream(1)

    found = head_logprobs(states, CHOSEN, head_of(), entropy_gradient=False)
    (gradients,) = torch.autograd.grad(found.logprobs, states, of_logprobs)

    whole = head_logprobs(states, CHOSEN, head_of())
    assert torch.equal(found.logprobs, whole.logprobs)
    assert torch.equal(found.entropy, whole.entropy)
    assert not found.entropy.requires_grad
    assert torch.equal(gradients, gradient(head_of(), of_logprobs, torch.zeros(TOKENS).double()))


def test_scores_far_apart_overflow_nothing() -> None:
    # The highest score comes last, a thousand nats above the first block's.
    weight = torch.arange(VOCABULARY).double()[:, None] * 100
    head = OutputHead(weight, None, temperature=1.0, block_entries=4)
    states = torch.tensor([[1.0], [-1.0]]).double().requires_grad_()
    tokens = torch.tensor([VOCABULARY - 1, VOCABULARY - 1])

    found = head_logprobs(states, tokens, head)

    assert found.logprobs.tolist() == [0.0, -100.0 * (VOCABULARY - 1)]
    assert found.entropy.tolist() == pytest.approx([0.0, 0.0], abs=ROUNDING)
    (gradients,) = torch.autograd.grad(found.logprobs.sum(), states)
    assert gradients.flatten().tolist() == pytest.approx([0.0, 100.0 * (VOCABULARY - 1)])


@with_and_without_kernels
def test_bf16_hidden_states_lose_nothing_in_the_head() -> None:
    states = states_of(0, dtype=torch.bfloat16)
    head = head_of(dtype=torch.bfloat16)
    exact = OutputHead(
        head.weight.double(), head.bias.double(), temperature=0.7, block_entries=VOCABULARY
    )

    found = head_logprobs(states, CHOSEN, head)
    expected = head_logprobs(states.double(), CHOSEN, exact)

    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=HALF)


@with_and_without_kernels
def test_states_of_another_format_than_the_weights_are_read_as_what_they_are() -> None:
    head, states = head_of(dtype=torch.bfloat16), states_of(0, dtype=torch.float32)
    assert head.bias is not None
    expected = (states.double() @ head.weight.double().t() + head.bias.double()) / 0.7

    torch.testing.assert_close(head.scores(states).double(), expected, rtol=0, atol=HALF)


@with_and_without_kernels
def test_a_sure_choice_keeps_its_small_gradient_in_bf16() -> None:
    # The others' shares are some 1e-4: far less than bf16 rounds the chosen entry's row by.
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))
    weight = weight.to(torch.bfloat16)
    tokens = torch.full((TOKENS,), 3)
    states = (states_of(0, dtype=torch.bfloat16) / 4 + 5 * weight[3]).detach()
    head = OutputHead(weight, None, temperature=1.0, block_entries=4)
    exact = OutputHead(weight.double(), None, temperature=1.0, block_entries=VOCABULARY)

    found, expected = (
        torch.autograd.grad(head_logprobs(x, tokens, each).logprobs.sum(), x)[0]
        for x, each in (
            (states.clone().requires_grad_(), head),
            (states.double().requires_grad_(), exact),
        )
    )

    error = torch.linalg.vector_norm(found.double() - expected, dim=1)
    size = torch.linalg.vector_norm(expected, dim=1)
    assert size.max() < SURE
    assert (error / size).max() < BF16_ROUNDING


def kl_of(states: Tensor, reference_states: Tensor, head: OutputHead) -> Tensor:
    tokens = torch.zeros(len(states), dtype=torch.long)
    return head_comparison(states, reference_states, tokens, head).kl


def test_a_comparison_gives_each_side_its_own_log_probabilities_to_the_bit() -> None:
    head = head_of(dtype=torch.float32, block_entries=3)
    ours, theirs = (states_of(seed, dtype=torch.float32) for seed in (0, 1))
    tokens = torch.arange(TOKENS) % VOCABULARY

    found = head_comparison(ours, theirs, tokens, head)

    alone = head_logprobs(ours, tokens, head)
    assert torch.equal(found.logprobs, alone.logprobs)
    assert torch.equal(found.entropy, alone.entropy)
    assert torch.equal(found.reference_logprobs, head_logprobs(theirs, tokens, head).logprobs)
    assert not torch.equal(found.logprobs, found.reference_logprobs)


@with_and_without_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_kl_is_the_written_out_sum(dtype: torch.dtype) -> None:
    head = head_of(temperature=0.7, dtype=dtype)
    ours, theirs = (states_of(seed, dtype=dtype) for seed in (0, 1))

    found = kl_of(ours, theirs, head)

    assert head.bias is not None
    weight, bias = head.weight.double(), head.bias.double()
    for token in range(TOKENS):
        p, q = (
            [math.exp(z / 0.7) for z in (weight @ x[token].double() + bias).tolist()]
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


def test_the_scores_are_never_held_for_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    scores = engine.HeadBlock.scores
    monkeypatch.setattr(
        engine.HeadBlock, "scores", lambda head, x: (held.append(scores(head, x)), held[-1])[1]
    )

    gradient(head_of(block_entries=3), upstream(1), upstream(2))

    assert max(each.shape[1] for each in held) == 3
    # Once per entry of the vocabulary: the backward pass makes none again.
    assert sum(each.shape[1] for each in held) == VOCABULARY
