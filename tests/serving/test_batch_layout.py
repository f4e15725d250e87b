"""The rows of a decode batch: none is used twice, none leaves its block, and the prefills fill the batch."""

import itertools

import pytest

from dynfocus_jax.serving.batch_layout import BatchLayout, bucket_size, choose_layout

SIZES = (1, 4, 16)


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("prefill_tokens", [1, 100, 1000])
def test_every_request_has_a_row_of_its_own_within_its_block(shards, prefill_tokens):
    for count, length in itertools.product(range(1, 41), (10, 50)):
        layout = choose_layout(count, shards, length, SIZES, prefill_tokens)
        assert layout.decode_size >= count
        assert layout.slots % layout.prefill_rows == 0
        assert layout.prefill_rows == 1 or layout.prefill_rows * length <= prefill_tokens
        rows = []
        for position in range(count):
            prefill, position_in_prefill = divmod(position, layout.prefill_size)
            row = layout.prefill_row(position_in_prefill)
            assert 0 <= row < layout.prefill_size
            rows.append(layout.decode_row(prefill, row))
            assert row // layout.prefill_rows == rows[-1] // layout.slots, "the row left its block"
        assert len(set(rows)) == count
        assert 0 <= min(rows) <= max(rows) < layout.decode_size


def test_a_layout_by_hand():
    """Six prompts in two blocks of four rows, two rows of each block a prefill."""
    layout = BatchLayout(shards=2, slots=4, prefill_rows=2)
    assert [layout.prefill_row(position) for position in range(4)] == [0, 2, 1, 3]
    assert [layout.decode_row(0, row) for row in range(4)] == [0, 1, 4, 5]
    assert [layout.decode_row(1, row) for row in range(4)] == [2, 3, 6, 7]


@pytest.mark.parametrize(
    ("count", "shards", "length", "tokens", "expected"),
    [
        (1, 1, 100, 10, (1, 1, 1)),  # one prompt may exceed the limit
        (3, 1, 100, 1000, (1, 4, 1)),  # four rows would hold a row of padding
        (4, 1, 100, 1000, (1, 4, 4)),
        (5, 1, 100, 1000, (1, 16, 4)),
        (16, 1, 100, 1600, (1, 16, 16)),
        (16, 1, 100, 1599, (1, 16, 4)),
        (17, 1, 100, 1600, (1, 32, 16)),  # more than the largest size: its next multiple
        (5, 3, 10, 1000, (3, 6, 1)),  # 16 rows over 3 blocks, rounded up
        (16, 4, 10, 1000, (4, 4, 4)),
    ],
)
def test_sizes_by_hand(count, shards, length, tokens, expected):
    assert choose_layout(count, shards, length, SIZES, tokens) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 48)]
)
def test_buckets(count, expected):
    assert bucket_size(count, (8, 16)) == expected
