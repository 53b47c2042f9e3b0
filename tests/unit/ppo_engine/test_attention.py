"""Which keys the fused kernel is given where rows share a beginning; the kernel needs a GPU."""

from itertools import accumulate

import pytest
import torch

from ppo_engine.attention import HeadShape, SharedKeys, is_fused, row_ends

PREFIX = 4
LENGTHS = [5, 5, 3, 1]
"""Own tokens of each row, behind the beginning."""


def shared_keys():
    query_ends = row_ends([PREFIX, *LENGTHS], torch.device("cpu"))
    key_ends = row_ends([PREFIX, *(PREFIX + n for n in LENGTHS)], torch.device("cpu"))
    return SharedKeys(query_ends, key_ends, PREFIX)


def expected_sources():
    starts = accumulate([PREFIX, *LENGTHS[:-1]])
    rows = [[*range(PREFIX), *range(s, s + n)] for s, n in zip(starts, LENGTHS, strict=True)]
    return [*range(PREFIX), *(token for row in rows for token in row)]


def test_every_row_sees_the_beginning_and_its_own_tokens():
    assert shared_keys().sources.tolist() == expected_sources()


def test_a_tokens_gradient_is_the_sum_over_its_keys():
    of_keys = torch.randn(len(expected_sources()), 3, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(PREFIX + sum(LENGTHS), 3)
    for token, of_key in zip(expected_sources(), of_keys, strict=True):
        expected[token] += of_key

    torch.testing.assert_close(shared_keys().gathered_back(of_keys), expected)


@pytest.mark.parametrize("size", [8, 64, 256])
def test_a_cpu_has_no_fused_kernel(size):
    assert not is_fused(torch.zeros(1, dtype=torch.bfloat16), HeadShape(2, 1, size))
