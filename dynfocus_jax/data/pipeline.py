"""The input pipeline: from samples to batches, in a fixed order that can be resumed exactly."""

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from typing import Any

import grain
import numpy as np
from absl import flags

from dynfocus_jax.batch import Batch
from dynfocus_jax.data.order import BatchOrder
from dynfocus_jax.data.samples import LoadedSample, SampleLoader
from dynfocus_jax.data.skipped import ShortenedSamples, SkippedSamples
from dynfocus_jax.errors import UserError


def make_dataset(
    loader: SampleLoader,
    order: BatchOrder,
    *,
    seed: int = 0,
    skipped: SkippedSamples | None = None,
    shortened: ShortenedSamples | None = None,
    rows: Sequence[int] | None = None,
    start: int = 0,
    num_threads: int = 2,
    num_processes: int = 0,
    prefetch: int = 64,
) -> grain.IterDataset:
    """Return a grain dataset of batches, whose only state is the number of batches consumed.

    A batch is the same however many processes share it, so a run can be resumed with another number of
    processes. Random draws of a sample depend on `seed` and on the sample's position in the order only.

    A sample that cannot be used becomes a padding row (index -1, no loss), so that the other processes need
    not know about it.

    Args:
      loader: loads the samples.
      order: bucket and samples of each batch.
      seed: seed of the random draws of samples.
      skipped: counts the samples when their batch is made, and lists those that cannot be used; raises
        UserError if there are too many of them.
      shortened: counts and lists the samples that were too long and lost a part.
      rows: rows of each batch that this process loads; None is all.
      start: number of batches consumed before.
      num_threads: threads that read ahead; 0 reads nothing ahead.
      num_processes: worker processes, each with its own threads; 0 reads in this process.
      prefetch: number of samples to read ahead.

    Raises:
      UserError: if the loader has no samples.
    """
    skipped, shortened = skipped or SkippedSamples(), shortened or ShortenedSamples()
    rows = range(order.batch_size) if rows is None else rows
    if not len(loader):
        raise UserError("there are no records to read; check the annotations.")

    def load_position(position: int, rng: np.random.Generator) -> LoadedSample:
        step, row = divmod(position, order.batch_size)
        bucket, samples = order.batch(step)
        number = int(samples[row])
        return loader.padding(bucket) if number < 0 else loader.load(number, rng, bucket)

    samples = grain.MapDataset.range(len(order) * order.batch_size).random_map(load_position, seed=seed)

    def load_row(number: int) -> LoadedSample:
        step, row = divmod(number, len(rows))
        loaded = samples[step * order.batch_size + rows[row]]
        assert loaded is not None  # grain's datasets may have gaps, this one does not
        return loaded

    def collate(batch: Sequence[LoadedSample]) -> Batch:
        for each in batch:
            if each.record < 0:
                continue
            record = loader.records[each.record]
            skipped.note(record, each.reason)
            if each.omissions:
                shortened.note(record, each.omissions)
        columns = zip(*(each.sample for each in batch), strict=True)
        fields: dict[str, Any] = {
            name: np.stack(arrays) for name, arrays in zip(Batch._fields, columns, strict=True)
        }
        return Batch(**fields)

    if num_processes and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read its flags, also outside of commands

    numbers = grain.MapDataset.range(min(start, len(order)) * len(rows), len(order) * len(rows))
    buffered = max(num_threads, prefetch // max(1, num_processes)) if num_threads else 0
    read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffered)
    workers = grain.MultiprocessingOptions(num_workers=num_processes, per_worker_buffer_size=2)
    loaded = numbers.map(load_row).to_iter_dataset(read_options).mp_prefetch(workers, _init_worker)
    return loaded.batch(len(rows), drop_remainder=True, batch_fn=collate)


def _init_worker(_index: int, _count: int) -> None:
    """Let only the parent process end a worker process, and end it together with the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles these: it saves and stops
        signal.signal(number, signal.SIG_IGN)

    def exit_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(0)

    threading.Thread(target=exit_with_parent, daemon=True).start()
