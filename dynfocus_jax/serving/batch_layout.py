"""Rows of a decode batch: which request takes which row, and which prompts are prefilled together.

The mesh splits the rows of an array into `shards` equal blocks, each on devices of its own. A prefill leaves
its KV cache on the devices that computed it, so its rows can move only into the same block of the larger
decode batch. A layout keeps every request in one block from prefill to decode: nothing is copied between
devices, and the memory of a prefill is bounded by `prefill_rows`.
"""

from collections.abc import Sequence
from typing import NamedTuple


class BatchLayout(NamedTuple):
    """Sizes of a decode batch and of the prefills that fill it one after the other."""

    shards: int  # blocks of rows, each on devices of its own
    slots: int  # rows of a block of the decode batch
    prefill_rows: int  # rows of a block of a prefill; divides `slots`

    @property
    def prefill_size(self) -> int:
        """Return the rows of a prefill over all blocks."""
        return self.shards * self.prefill_rows

    @property
    def decode_size(self) -> int:
        """Return the rows of the decode batch over all blocks."""
        return self.shards * self.slots

    def prefill_row(self, position: int) -> int:
        """Return the row of the prompt at `position` in its prefill; the blocks take prompts in turn."""
        index, block = divmod(position, self.shards)
        return block * self.prefill_rows + index

    def decode_row(self, prefill: int, row: int) -> int:
        """Return the row of the decode batch that row `row` of prefill number `prefill` moves to."""
        block, index = divmod(row, self.prefill_rows)
        return block * self.slots + prefill * self.prefill_rows + index


def choose_layout(
    num_requests: int, shards: int, prompt_length: int, batch_sizes: Sequence[int], prefill_tokens: int
) -> BatchLayout:
    """Choose the sizes for a number of requests: the smallest compiled batch, the largest prefills that fit.

    Args:
      num_requests: at least 1.
      shards: blocks that the mesh splits rows into.
      prompt_length: padded tokens of the longest prompt, visual tokens included.
      batch_sizes: compiled batch sizes, ascending (`config.generation.batch`).
      prefill_tokens: padded prompt tokens of a block that are prefilled together; one prompt may have more.
    """
    slots = -(-bucket_size(num_requests, batch_sizes) // shards)
    prefill_rows = max(
        rows
        for rows in {1, *batch_sizes}
        if rows == 1
        or (slots % rows == 0 and rows <= num_requests / shards and rows * prompt_length <= prefill_tokens)
    )
    return BatchLayout(shards, slots, prefill_rows)


def bucket_size(count: int, sizes: Sequence[int]) -> int:
    """Return the smallest of the ascending `sizes` that holds `count`, else the next multiple of the last."""
    return next((size for size in sizes if size >= count), -(-count // sizes[-1]) * sizes[-1])
