"""Signs that a policy has collapsed, read off its responses: repetition and sameness."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise

_GRAM = 4


def distinct_2(responses: Sequence[Sequence[int]]) -> float | None:
    """Different pairs of neighbouring tokens over all pairs (Li et al. 2016, arXiv:1510.03055)."""
    pairs = [pair for tokens in responses for pair in pairwise(tokens)]
    return len(set(pairs)) / len(pairs) if pairs else None


def repeated_4gram_fraction(responses: Sequence[Sequence[int]]) -> float:
    """Mean over responses of the share of 4-grams that occurred before in the response."""
    return _mean([_repeated(tokens) for tokens in responses])


def longest_token_run_mean(responses: Sequence[Sequence[int]]) -> float:
    """Mean over responses of the longest run of one token."""
    return _mean(
        [max((sum(1 for _ in run) for _, run in groupby(row)), default=0) for row in responses]
    )


def identical_response_fraction(texts: Sequence[str], prompts: Sequence[int]) -> float:
    """Share of responses whose text also answers another prompt; `prompts` are their numbers."""
    answered: dict[str, set[int]] = defaultdict(set)
    for text, prompt in zip(texts, prompts, strict=True):
        answered[text].add(prompt)
    return _mean([float(len(answered[text]) > 1) for text in texts])


def _repeated(tokens: Sequence[int]) -> float:
    grams = list(zip(*(tokens[start:] for start in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
