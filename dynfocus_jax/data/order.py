"""Order of samples: the samples of each batch, as a function of the step alone."""

import bisect
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from grain.experimental import index_shuffle


def permutation(size: int, seed: int) -> np.ndarray:
    """Return a pseudorandom order of 0 ... size - 1, int64 [size], the same on every machine."""
    shuffled = (index_shuffle(i, max_index=size - 1, seed=seed % 2**32, rounds=4) for i in range(size))
    return np.fromiter(shuffled, np.int64, size)


def _all_samples(count: int, _epoch: int) -> np.ndarray:
    return np.arange(count)


class BatchOrder:
    """The batches of all epochs, one after the other. Safe to use from several threads.

    Each epoch is shuffled anew. Its samples are put, in that order, into batches of one bucket each, and the
    batches of several buckets are shuffled too. Every sample of an epoch is in exactly one of its batches;
    the last batch of a bucket is filled up with padding rows.

    Attributes:
      batch_size: number of rows of a batch.
    """

    def __init__(
        self,
        epoch_samples: Callable[[int], np.ndarray],
        bucket_of: np.ndarray | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        """Create an order.

        Args:
          epoch_samples: returns the samples of an epoch by its number, int64, before shuffling. A function,
            so that no epoch is kept in memory for long.
          bucket_of: bucket of each sample, int [samples]; None puts all samples into bucket 0.
          batch_size: number of rows of a batch.
          seed: seed of the shuffling.
          shuffle: whether to shuffle; otherwise the samples keep their order within each bucket.
          epochs: number of epochs; None is endless.
        """
        self.batch_size = batch_size
        self._epoch_samples, self._bucket_of = epoch_samples, bucket_of
        self._seed, self._shuffle, self._epochs = seed, shuffle, epochs
        self._starts = [0]  # first step of each epoch that is known, and of the epoch after it
        self._cached_batches = functools.lru_cache(maxsize=2)(self._epoch_batches)
        self._lock = threading.RLock()

    @classmethod
    def single_epoch(cls, samples: int, batch_size: int) -> "BatchOrder":
        """Return the order of one epoch of samples 0 ... samples - 1, not shuffled (evaluation)."""
        epoch_samples = functools.partial(_all_samples, samples)
        return cls(epoch_samples, batch_size=batch_size, shuffle=False, epochs=1)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"batch_size": self.batch_size, "seed": self._seed, "shuffle": self._shuffle}
        create = functools.partial(BatchOrder, epochs=self._epochs, **options)
        return create, (self._epoch_samples, self._bucket_of)

    def steps_per_epoch(self, epoch: int) -> int:
        """Return the number of batches of an epoch, which depends on the samples drawn for it."""
        counts = np.bincount(self._buckets(self._epoch_samples(epoch))).tolist()
        return sum(-(-count // self.batch_size) for count in counts)

    def num_steps(self, epochs: float) -> int:
        """Return the number of batches of the first epochs, possibly a fraction, rounded up."""
        whole = int(epochs)
        rest = epochs - whole
        partial = int(np.ceil(rest * self.steps_per_epoch(whole) - 1e-9)) if rest else 0
        return self.first_step(whole) + partial

    def first_step(self, epoch: int) -> int:
        """Return the number of the first step of an epoch."""
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + self.steps_per_epoch(len(self._starts) - 1))
            return self._starts[epoch]

    def __len__(self) -> int:
        """Return the number of batches; for an endless order, a number that no run reaches."""
        return 2**48 if self._epochs is None else self.first_step(self._epochs)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Return the bucket of a batch and its samples, int64 [batch_size], -1 for padding rows."""
        with self._lock:
            while self._starts[-1] <= step:
                self.first_step(len(self._starts))
            epoch = bisect.bisect_right(self._starts, step) - 1
            buckets, rows = self._cached_batches(epoch)
        number = step - self._starts[epoch]
        return int(buckets[number]), rows[number]

    def _buckets(self, samples: np.ndarray) -> np.ndarray:
        return np.zeros(len(samples), np.int64) if self._bucket_of is None else self._bucket_of[samples]

    def _epoch_batches(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the buckets [steps] and samples [steps, batch_size] of the batches of an epoch."""
        samples = self._epoch_samples(epoch)
        if self._shuffle:
            samples = samples[permutation(len(samples), self._seed + epoch)]
        bucket_of = self._buckets(samples)
        buckets, rows = [], []
        for bucket in np.unique(bucket_of):
            members = samples[bucket_of == bucket]
            members = np.pad(members, (0, -len(members) % self.batch_size), constant_values=-1)
            rows.append(members.reshape(-1, self.batch_size))
            buckets += [bucket] * len(rows[-1])
        all_buckets, all_rows = np.array(buckets), np.concatenate(rows)
        if self._shuffle and len(np.unique(all_buckets)) > 1:
            order = permutation(len(all_buckets), self._seed + epoch)
            all_buckets, all_rows = all_buckets[order], all_rows[order]
        return all_buckets, all_rows
