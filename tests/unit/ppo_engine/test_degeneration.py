"""Signs of collapse, counted by hand."""

import pytest

from ppo_engine.degeneration import (
    distinct_2,
    identical_response_fraction,
    longest_token_run_mean,
    repeated_4gram_fraction,
)


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ([[1, 2, 3]], 1.0),  # 12 23
        ([[1, 1, 1, 1]], 1 / 3),  # 11 three times
        ([[1, 2, 1, 2]], 2 / 3),  # 12 21 12
        ([[1, 2], [1, 2]], 1 / 2),  # one pair, in two responses
        ([[1, 2], [3, 4]], 1.0),  # no pair 23 across the border
        ([[1, 2], [2, 1]], 1.0),  # order counts
        ([[5], [1, 1, 1]], 1 / 2),  # a single token has no pair
    ],
)
def test_distinct_2_is_different_pairs_over_all_pairs(
    responses: list[list[int]], share: float
) -> None:
    assert distinct_2(responses) == pytest.approx(share)


def test_distinct_2_of_responses_without_pairs_is_unknown() -> None:
    assert distinct_2([[1], [], [2]]) is None


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ([], 0.0),
        ([7, 7, 7], 0.0),  # too short for a 4-gram
        ([1, 2, 3, 4], 0.0),
        ([7, 7, 7, 7, 7], 1 / 2),  # 2 equal ones
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 5, of which 1234 twice
        ([1, 2, 3, 1, 2, 3, 1, 2], 2 / 5),  # 1231 2312 3123 1231 2312
        ([1, 2, 3, 9, 1, 2, 3, 8], 0.0),  # repeated 3-grams do not count
    ],
)
def test_repeated_4grams_are_those_seen_before_in_the_response(
    response: list[int], share: float
) -> None:
    assert repeated_4gram_fraction([response]) == pytest.approx(share)


def test_repeated_4grams_are_a_mean_over_responses_not_over_4grams() -> None:
    long, short = [7] * 13, [1, 2, 3, 4]

    assert repeated_4gram_fraction([long, short]) == pytest.approx((9 / 10 + 0) / 2)
    assert repeated_4gram_fraction([short, short]) == 0.0


@pytest.mark.parametrize(
    ("responses", "length"),
    [
        ([[1, 2, 2, 3, 3, 3, 2]], 3.0),
        ([[1, 2, 1, 2, 1]], 1.0),  # not next to each other
        ([[4, 4, 4, 4], [1, 2]], 2.5),
        ([[], [5, 5]], 1.0),
        ([[1, 2, 2], [2, 2, 1]], 2.0),  # a run ends with its response
    ],
)
def test_the_longest_run_is_of_one_token_in_a_row(
    responses: list[list[int]], length: float
) -> None:
    assert longest_token_run_mean(responses) == pytest.approx(length)


@pytest.mark.parametrize(
    ("texts", "prompts", "share"),
    [
        (["yes", "no"], [0, 1], 0.0),
        (["yes", "yes"], [0, 1], 1.0),
        (["yes", "yes"], [0, 0], 0.0),  # twice for one prompt is no sign
        (["yes", "yes", "yes", "no"], [0, 0, 1, 1], 3 / 4),
        (["yes", "no", "no", "yes"], [0, 1, 2, 0], 1 / 2),
        (["", ""], [3, 8], 1.0),
        (["yes", "Yes"], [0, 1], 0.0),
    ],
)
def test_identical_responses_answer_more_than_one_prompt(
    texts: list[str], prompts: list[int], share: float
) -> None:
    assert identical_response_fraction(texts, prompts) == pytest.approx(share)
