"""What is computed for whom: rows end to end, little filler, every wanted state once."""

import random

import torch

from ppo_engine.packing import FEWEST_TOKENS, common_prefix, pack


def batch_of(rows, columns=100):
    """Rows as (first real token, first state read, states read)."""
    attention_mask = torch.zeros(len(rows), columns, dtype=torch.bool)
    read = torch.zeros(len(rows), columns, dtype=torch.bool)
    for row, (start, first, count) in enumerate(rows):
        attention_mask[row, start : first + count + 1] = True
        read[row, first : first + count] = True
    return attention_mask, read


def random_batch(seed):
    chance = random.Random(seed)
    rows = []
    for _ in range(chance.randint(1, 9)):
        start = chance.randint(0, 20)
        first = start + chance.randint(20, 40)
        rows.append((start, first, chance.randint(0, 30)))
    rows.append((3, 40, 5))
    return batch_of(rows)


def test_every_state_asked_for_is_kept_once_and_in_order():
    for seed in range(50):
        attention_mask, read = random_batch(seed)
        prefix = 16 if seed % 2 else 0

        packed = pack(attention_mask, read, prefix=prefix)

        kept = packed.kept[: packed.num_kept]
        assert torch.equal(packed.sources[kept], read.flatten().nonzero().squeeze(1))
        rows, columns = packed.sources[kept] // 100, packed.sources[kept] % 100
        first = attention_mask.long().argmax(dim=1)[rows]
        assert torch.equal(packed.positions[kept], columns - first)


def test_a_rectangle_holds_rows_without_a_gap():
    for seed in range(50):
        attention_mask, read = random_batch(seed)

        packed = pack(attention_mask, read, prefix=16)

        assert packed.rectangles[0].start == 16
        end = 16
        for rectangle in packed.rectangles:
            assert rectangle.start == end
            end = rectangle.end
            flat = packed.positions[rectangle.start : rectangle.end]
            by_row = flat.view(rectangle.rows, rectangle.columns)
            expected = torch.arange(16, 16 + rectangle.columns).expand_as(by_row)
            assert torch.equal(by_row, expected)
        assert end == len(packed.sources) == len(packed.positions)


def test_real_tokens_stand_at_their_own_place():
    attention_mask, read = batch_of([(0, 30, 10), (7, 40, 20), (0, 30, 10)])

    packed = pack(attention_mask, read, prefix=0)

    # 27 of row 1 before its first state read, 20 after; the last state read ends the row.
    assert packed.rectangles[0][:3] == (0, 1, 56)
    assert packed.sources[:53].tolist() == [100 + column for column in range(7, 60)]
    assert packed.rectangles[1][:3] == (56, 2, 40)
    assert packed.sources[56:96].tolist() == list(range(40))


def test_rows_of_which_nothing_is_read_cost_nothing():
    attention_mask, read = batch_of([(0, 30, 10), (0, 30, 0), (0, 90, 0)])

    packed = pack(attention_mask, read, prefix=0)

    assert len(packed.sources) == 40


def test_few_tokens_are_filled_up():
    attention_mask, read = batch_of([(0, 10, 2)])

    packed = pack(attention_mask, read, prefix=0)

    assert len(packed.sources) == FEWEST_TOKENS
    assert packed.num_kept == 2
    assert len(packed.kept) == FEWEST_TOKENS


def prefix_of(lengths_shared, *, reads=(60, 60, 60)):
    rows = [(start, first, 20) for start, first in zip((0, 5, 9), reads, strict=True)]
    attention_mask, read = batch_of(rows)
    tokens = torch.arange(300).view(3, 100)
    for row, (start, _, _) in enumerate(rows):
        tokens[row, start : start + lengths_shared[row]] = torch.arange(lengths_shared[row]) + 1000
    return common_prefix(tokens, attention_mask, read)


def test_the_common_beginning_is_counted_in_steps():
    assert prefix_of((30, 30, 30)) == 28
    assert prefix_of((30, 21, 40)) == 20
    assert prefix_of((30, 15, 40)) == 0


def test_the_common_beginning_ends_before_any_state_that_is_read():
    # Row 0's first state read is its token 25; the state of token 24 may be shared.
    assert prefix_of((60, 55, 51), reads=(25, 60, 60)) == 24


def test_one_row_shares_nothing():
    attention_mask, read = batch_of([(0, 60, 20), (0, 60, 0)])

    assert common_prefix(torch.zeros(2, 100).long(), attention_mask, read) == 0
