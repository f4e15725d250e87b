"""Order of samples: the sample of each row of each batch, as a function of the step alone."""

import bisect
import functools
import threading
from collections.abc import Callable

import numpy as np
from grain.experimental import index_shuffle


def permutation(size: int, seed: int) -> np.ndarray:
    """A pseudorandom order of 0 ... size - 1, int64, the same on every machine."""
    shuffled = (index_shuffle(i, max_index=size - 1, seed=seed % 2**32, rounds=4) for i in range(size))
    return np.fromiter(shuffled, np.int64, size)


def _all(samples: int, _epoch: int) -> np.ndarray:
    return np.arange(samples)


class Order:
    """The batches of all epochs, one behind the other.

    Each epoch is shuffled anew; its samples are dealt, in that order, into batches of one bucket each, and of
    several buckets the batches are shuffled too. So every sample of an epoch is in exactly one of its
    batches; what does not fill a batch at the end of a bucket gets padding rows. Safe to use from threads.

    epoch: number -> int64 samples of that epoch, not shuffled; a function, so that none is held for long.
    bucket_of: int `[samples]`, the bucket of each sample; None: all are of bucket 0.
    epochs: number of them; None is endless.
    """

    def __init__(
        self,
        epoch: Callable[[int], np.ndarray],
        bucket_of: np.ndarray | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        self.batch_size = batch_size
        self._epoch, self._bucket_of = epoch, bucket_of
        self._seed, self._shuffle, self._epochs = seed, shuffle, epochs
        self._starts = [0]  # the first step of each epoch that was looked at, and of the one after it
        self._layout = functools.lru_cache(maxsize=2)(self._lay_out)
        self._lock = threading.RLock()

    @classmethod
    def once(cls, samples: int, batch_size: int) -> "Order":
        """One epoch of so many samples in their own order (evaluation)."""
        return cls(functools.partial(_all, samples), batch_size=batch_size, shuffle=False, epochs=1)

    def __reduce__(self):
        keys = {"batch_size": self.batch_size, "seed": self._seed, "shuffle": self._shuffle}
        make = functools.partial(Order, epochs=self._epochs, **keys)
        return make, (self._epoch, self._bucket_of)

    def steps_per_epoch(self, epoch: int) -> int:
        """The number of batches of an epoch, which depends on what is drawn for it."""
        counts = np.bincount(self._buckets(self._epoch(epoch))).tolist()
        return sum(-(-count // self.batch_size) for count in counts)

    def steps(self, epochs: float) -> int:
        """The number of batches of so many epochs, rounded up."""
        whole = int(epochs)
        rest = epochs - whole
        return self.start(whole) + (int(np.ceil(rest * self.steps_per_epoch(whole) - 1e-9)) if rest else 0)

    def start(self, epoch: int) -> int:
        """The first step of an epoch."""
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + self.steps_per_epoch(len(self._starts) - 1))
            return self._starts[epoch]

    def __len__(self) -> int:
        """The number of batches; endless: more than there will ever be."""
        return 2**48 if self._epochs is None else self.start(self._epochs)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """The bucket of a batch and its samples, int64 `[batch_size]`, -1 for padding rows."""
        with self._lock:
            while self._starts[-1] <= step:
                self.start(len(self._starts))
            epoch = bisect.bisect_right(self._starts, step) - 1
            buckets, rows = self._layout(epoch)
        number = step - self._starts[epoch]
        return int(buckets[number]), rows[number]

    def _buckets(self, samples: np.ndarray) -> np.ndarray:
        return np.zeros(len(samples), np.int64) if self._bucket_of is None else self._bucket_of[samples]

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Buckets `[steps]` and samples `[steps, batch_size]` of an epoch's batches."""
        samples = self._epoch(epoch)
        if self._shuffle:
            samples = samples[permutation(len(samples), self._seed + epoch)]
        bucket_of = self._buckets(samples)
        buckets, rows = [], []
        for bucket in np.unique(bucket_of):
            members = samples[bucket_of == bucket]
            members = np.pad(members, (0, -len(members) % self.batch_size), constant_values=-1)
            rows.append(members.reshape(-1, self.batch_size))
            buckets += [bucket] * len(rows[-1])
        buckets, rows = np.array(buckets), np.concatenate(rows)
        if self._shuffle and len(np.unique(buckets)) > 1:
            order = permutation(len(buckets), self._seed + epoch)
            buckets, rows = buckets[order], rows[order]
        return buckets, rows
