"""The input pipeline: samples to batches, in a fixed order that can be resumed exactly."""

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import parent_process

import grain
import numpy as np
from absl import flags

from dynfocus_jax.batch import Batch
from dynfocus_jax.data.order import Order
from dynfocus_jax.data.samples import Loaded, SampleLoader
from dynfocus_jax.data.skipped import Shortened, Skipped
from dynfocus_jax.errors import UserError


def make_dataset(
    load: SampleLoader,
    order: Order,
    *,
    seed: int = 0,
    skipped: Skipped | None = None,
    shortened: Shortened | None = None,
    rows: Sequence[int] | None = None,
    start: int = 0,
    num_threads: int = 2,
    num_processes: int = 0,
    prefetch: int = 64,
) -> grain.IterDataset:
    """A grain dataset of batches of `load`'s samples, whose whole state is the number of batches consumed.

    `order` says which samples, in which bucket, batch s has. A process that holds some of the rows of each
    batch gives their numbers as `rows`; None is all of them. So batch s is the same however many processes
    share it, and `start`, the number of batches consumed before, is a position from which any number of
    processes goes on. What is drawn for a sample depends on `seed` and on its place in the order alone.

    num_threads threads read `prefetch` samples ahead; 0 reads none ahead. With num_processes, so many
    worker processes read every n-th sample, each with its threads; the batches are the same.

    A sample that cannot be used becomes a padding row (index -1, nothing to learn), so no other process
    need know of it; `skipped` is told when its batch is made, which raises UserError when there are too
    many. `shortened` is told of samples that were too long and lost something.
    """
    skipped, shortened = skipped or Skipped(), shortened or Shortened()
    rows = range(order.batch_size) if rows is None else rows
    if not len(load):
        raise UserError("there are no records to read: check the annotations")

    def load_position(position: int, rng: np.random.Generator) -> Loaded:
        step, row = divmod(position, order.batch_size)
        bucket, samples = order.batch(step)
        number = int(samples[row])
        return load.padding(bucket) if number < 0 else load.load(number, rng, bucket)

    samples = grain.MapDataset.range(len(order) * order.batch_size).random_map(load_position, seed=seed)

    def load_row(number: int) -> Loaded:
        step, row = divmod(number, len(rows))
        return samples[step * order.batch_size + rows[row]]

    def collate(batch: Sequence[Loaded]) -> Batch:
        for each in batch:
            if each.record < 0:
                continue
            record = load.records[each.record]
            skipped.note(record, each.reason)
            if each.changes:
                shortened.note(record, each.changes)
        return Batch(*map(np.stack, zip(*(each.sample for each in batch), strict=True)))

    if num_processes and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers ask for its flags, outside of commands too

    numbers = grain.MapDataset.range(min(start, len(order)) * len(rows), len(order) * len(rows))
    buffered = max(num_threads, prefetch // max(1, num_processes)) if num_threads else 0
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffered)
    workers = grain.MultiprocessingOptions(num_workers=num_processes, per_worker_buffer_size=2)
    read = numbers.map(load_row).to_iter_dataset(ahead).mp_prefetch(workers, _start_worker)
    return read.batch(len(rows), drop_remainder=True, batch_fn=collate)


def _start_worker(_index: int, _count: int) -> None:
    """A worker process is ended by the process that it reads for, and never outlives it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for that process, which saves and stops
        signal.signal(number, signal.SIG_IGN)

    def follow():
        parent_process().join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
