"""Clip statistics by place and by old probability, against a plain count."""

import json
import math
from typing import Any

import pytest
import torch

from ppo_engine.buckets import (
    POSITION_LABELS,
    PROBABILITY_LABELS,
    WORST_SEQUENCES,
    Buckets,
    BucketSums,
)
from ppo_engine.clip_stats import PassStatistics
from ppo_engine.explain import CLIPPED_CLASSES, TOKEN_CLASSES, explain
from ppo_engine.reports import PassReport, summarize

EXACT = 1e-9
ROUNDING = 1e-6
"""Of fp32 ratios against Python's numbers."""
RULE: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
CLIPPED = {each.value for each in CLIPPED_CLASSES}


def batch_of(seed: int, *, rows: int = 8, columns: int = 600, kept: float = 0.9) -> dict[str, Any]:
    """Tensors as the trainer has them; some rows are short, one is empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < kept
    mask[0] = False
    mask[1, 5:] = False
    old, noise, advantages = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    advantages[2, :40] = 0.0
    old, noise, advantages = -old.abs() * 2 * mask, noise * mask, advantages * mask
    zeros = torch.zeros(rows, columns)
    return {
        "logprobs": old + 0.4 * noise,
        "old_logprobs": old,
        "advantages": advantages,
        "response_mask": mask,
        "values": zeros,
        "old_values": zeros,
        "returns": zeros,
        "rows": torch.arange(rows) * 3 + 1,
    }


def measured(*batches: dict[str, Any], minibatch: int = 0) -> PassReport:
    statistics = PassStatistics(**RULE, value_clip_range=None)
    for batch in batches:
        statistics.add(**batch)
    return statistics.report(
        epoch=0, minibatch=minibatch, grad_norm=1.0, max_grad_norm=1.0, skipped=False
    )


def counted(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Every response token by itself: place, old probability, class, and the numbers to add up."""
    tokens = []
    for row, number in enumerate(batch["rows"].tolist()):
        columns = batch["response_mask"][row].nonzero().squeeze(1).tolist()
        for place, column in enumerate(columns):
            at = (row, column)
            d = (batch["logprobs"][at] - batch["old_logprobs"][at]).item()
            advantage = batch["advantages"][at].item()
            told = explain(
                math.exp(d), advantage, clip_range=0.2, clip_range_high=0.28, dual_clip=3.0
            )
            tokens.append(
                {
                    "row": number,
                    "position": place,
                    "probability": math.exp(batch["old_logprobs"][at].item()),
                    "class": told.token_class.value,
                    "size": abs(advantage),
                    "ratio": math.exp(d),
                    "k3": math.exp(d) - 1 - d,
                }
            )
    return tokens


def label_of(value: float, borders: tuple[float, ...], labels: tuple[str, ...]) -> str:
    return labels[sum(value >= border for border in borders)]


def sums_by_hand(tokens: list[dict[str, Any]]) -> list[float]:
    """A row of sums in the documented order."""
    classes = [token["class"] for token in tokens]
    return [
        *(classes.count(each) for each in TOKEN_CLASSES),
        math.fsum(token["size"] for token in tokens),
        math.fsum(token["size"] for token in tokens if token["class"] in CLIPPED),
        math.fsum(token["ratio"] for token in tokens),
        math.fsum(token["k3"] for token in tokens),
    ]


def test_each_bucket_holds_the_sums_of_its_tokens() -> None:
    batch = batch_of(0)
    tokens = counted(batch)

    buckets = measured(batch).buckets

    for label, found in zip(POSITION_LABELS, buckets.position, strict=True):
        mine = [
            token
            for token in tokens
            if label_of(token["position"], (8, 32, 128, 512), POSITION_LABELS) == label
        ]
        assert mine, label
        assert found.to_row() == pytest.approx(sums_by_hand(mine), rel=ROUNDING, abs=ROUNDING)
    for label, found in zip(PROBABILITY_LABELS, buckets.old_probability, strict=True):
        mine = [
            token
            for token in tokens
            if label_of(token["probability"], (0.01, 0.1, 0.5), PROBABILITY_LABELS) == label
        ]
        assert mine, label
        assert found.to_row() == pytest.approx(sums_by_hand(mine), rel=ROUNDING, abs=ROUNDING)


def test_the_buckets_of_a_table_add_up_to_the_pass() -> None:
    report = measured(batch_of(0), batch_of(1))

    for table in (report.buckets.position, report.buckets.old_probability):
        counts = [sum(column) for column in zip(*(each.counts for each in table), strict=True)]
        assert counts == list(report.sums.counts)
        for name in ("abs_advantage", "abs_advantage_clipped", "ratio", "kl_k3"):
            total = math.fsum(getattr(each, name) for each in table)
            assert total == pytest.approx(getattr(report.sums, name), rel=EXACT)


def single_tokens(**columns: list[float]) -> dict[str, Any]:
    """Rows of one token each."""
    count = len(next(iter(columns.values())))
    zeros = torch.zeros(count, 1)
    given = {name: torch.tensor(numbers)[:, None] for name, numbers in columns.items()}
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    return {
        **dict.fromkeys(names, zeros),
        "response_mask": torch.ones(count, 1, dtype=torch.bool),
        "rows": torch.arange(count),
        **given,
    }


def test_a_border_belongs_to_the_higher_part() -> None:
    batch = batch_of(0, rows=3, columns=513, kept=1.1)

    by_position = measured(batch).buckets.position
    by_probability = measured(border_batch()).buckets.old_probability

    # Row 0 is empty, row 1 has 5 tokens, row 2 has 513.
    assert [sum(each.counts) for each in by_position] == [8 + 5, 24, 96, 384, 1]
    assert [sum(each.counts) for each in by_probability] == [1, 1, 1, 1]


def border_batch() -> dict[str, Any]:
    """One token at each border exactly, and one below all of them."""
    batch = single_tokens(old_logprobs=[-9.0, 0.0, 0.0, 0.0], advantages=[1.0] * 4)
    for name in ("logprobs", "old_logprobs"):
        batch[name] = batch[name].double()
    borders = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64)
    batch["old_logprobs"][1:, 0] = borders.log()
    batch["logprobs"] = batch["old_logprobs"].clone()
    return batch


def test_passes_merge_to_the_whole() -> None:
    first, second = batch_of(0), batch_of(1)

    merged = summarize([measured(first), measured(second, minibatch=1)]).buckets
    whole = measured(first, second).buckets

    for mine, theirs in zip(
        (*merged.position, *merged.old_probability),
        (*whole.position, *whole.old_probability),
        strict=True,
    ):
        assert mine.counts == theirs.counts
        assert mine.to_row() == pytest.approx(theirs.to_row(), rel=EXACT)


def test_merging_with_nothing_changes_nothing() -> None:
    buckets = measured(batch_of(0)).buckets

    assert Buckets().merged(buckets) == buckets


def test_stored_rows_bring_the_tables_back() -> None:
    report = measured(batch_of(0))

    rows = json.loads(json.dumps(report.buckets.to_rows()))

    assert Buckets.from_rows(rows) == report.buckets
    stored = json.loads(json.dumps(report.stored_values()))
    again = PassReport.from_stored(0, 0, stored, report.histogram, edges=report.ratios.edges)
    assert again.buckets == report.buckets
    assert list(again.worst_sequences) == list(report.worst_sequences)


def test_users_see_shares_of_the_bucket_and_none_without_tokens() -> None:
    ratios = [1.5, 0.5, 1.0, 1.5, 4.0]
    batch = single_tokens(
        logprobs=[math.log(x) for x in ratios],
        old_logprobs=[0.0] * 5,
        advantages=[1.0, -1.0, 2.0, -1.0, -1.0],
    )

    told = measured(batch).buckets.to_dict()

    first = told["position"]["0-7"]
    expected = {
        "tokens": 5,
        "policy_clip_fraction": 3 / 5,
        "policy_clip_fraction_high": 1 / 5,
        "policy_clip_fraction_low": 1 / 5,
        "policy_clip_fraction_dual": 1 / 5,
        "clipped_advantage_mass": 3 / 6,
        "ratio_mean": 8.5 / 5,
        "update_kl_k3": (8.5 - 5 - math.log(1.5 * 0.5 * 1.5 * 4)) / 5,
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=ROUNDING)
    assert first["counts"] == dict.fromkeys(TOKEN_CLASSES, 0) | {
        "clipped_high": 1,
        "clipped_low": 1,
        "in_range_positive": 1,
        "unclipped_out_high": 1,
        "dual_clipped": 1,
    }
    empty = told["position"]["512+"]
    assert empty["tokens"] == 0
    assert {empty[name] for name in expected if name != "tokens"} == {None}
    assert list(told) == ["position", "old_probability"]
    assert told["old_probability"]["0.5-1"] == first


def test_a_broken_pass_leaves_empty_buckets() -> None:
    batch = single_tokens(logprobs=[math.nan, 0.0], advantages=[1.0, 1.0])

    buckets = measured(batch).buckets

    assert buckets.position[0] == BucketSums()
    json.dumps(buckets.to_rows(), allow_nan=False)


def worst_by_hand(batch: dict[str, Any]) -> list[dict[str, Any]]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for token in counted(batch):
        rows.setdefault(token["row"], []).append(token)
    named = [
        {
            "row": row,
            "tokens": len(tokens),
            "clipped_tokens": sum(token["class"] in CLIPPED for token in tokens),
            "ratio_max": pytest.approx(max(token["ratio"] for token in tokens), rel=ROUNDING),
        }
        for row, tokens in rows.items()
    ]
    named = [each for each in named if each["clipped_tokens"]]
    return sorted(named, key=lambda each: (-each["clipped_tokens"], each["row"]))[:4]


@pytest.mark.parametrize("seed", range(4))
def test_the_worst_sequences_have_the_most_clipped_tokens(seed: int) -> None:
    batch = batch_of(seed, rows=9, columns=12, kept=0.7)

    found = list(measured(batch).worst_sequences)

    assert found == worst_by_hand(batch)
    assert len(found) == WORST_SEQUENCES


def test_a_sequence_split_over_micro_batches_keeps_its_number() -> None:
    whole = batch_of(0, rows=9, columns=12, kept=0.7)
    parts = [{name: x[start : start + 2] for name, x in whole.items()} for start in range(0, 9, 2)]

    assert measured(*reversed(parts)).worst_sequences == measured(whole).worst_sequences


def test_without_clipping_no_sequence_is_named() -> None:
    batch = batch_of(0, rows=4, columns=6)
    batch["logprobs"] = batch["old_logprobs"].clone()

    assert measured(batch).worst_sequences == ()


def test_the_worst_of_several_passes_are_named_with_their_pass() -> None:
    first, second = (batch_of(seed, rows=9, columns=12, kept=0.7) for seed in (1, 0))

    found = summarize([measured(first), measured(second, minibatch=1)]).worst_sequences

    both = [{**row, "minibatch": 0, "epoch": 0} for row in worst_by_hand(first)]
    both += [{**row, "minibatch": 1, "epoch": 0} for row in worst_by_hand(second)]
    assert list(found) == sorted(both, key=lambda row: -row["clipped_tokens"])[:4]
    assert {row["minibatch"] for row in found} == {0, 1}
