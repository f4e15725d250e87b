"""Order of batches: each sample once per epoch, batches of one bucket, reproducible from the step."""

import pickle

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.data.order import BatchOrder, permutation


def all_samples(count):
    return lambda epoch: np.arange(count)


def batches(order, start, end):
    return [order.batch(step) for step in range(start, end)]


def samples_in(batches):
    return np.concatenate([rows[rows >= 0] for _, rows in batches]).tolist()


@pytest.mark.parametrize("size", [1, 2, 17, 1000])
def test_permutation_equals_that_of_grain(size):
    shuffled = grain.MapDataset.range(size).shuffle(11)
    assert permutation(size, 11).tolist() == [shuffled[i] for i in range(size)]
    assert sorted(permutation(size, 2**32 + 3)) == list(range(size))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    buckets=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**33),
)
def test_every_sample_is_in_one_batch_per_epoch(buckets, batch_size, shuffle, seed):
    bucket_of = np.array(buckets)
    order = BatchOrder(
        all_samples(len(buckets)), bucket_of, batch_size=batch_size, seed=seed, shuffle=shuffle
    )
    for epoch in range(3):
        first, last = order.first_step(epoch), order.first_step(epoch + 1)
        assert last - first == order.steps_per_epoch(epoch)
        content = batches(order, first, last)
        assert sorted(samples_in(content)) == list(range(len(buckets)))
        for bucket, rows in content:
            assert len(rows) == batch_size
            assert (bucket_of[rows[rows >= 0]] == bucket).all()
            assert (rows >= 0).any()
        padded = [bucket for bucket, rows in content if (rows < 0).any()]
        assert len(padded) == len(set(padded)), "only the last batch of a bucket has padding rows"


def test_epochs_differ_and_depend_on_the_seed():
    bucket_of = np.arange(90) % 3

    def contents(seed):
        order = BatchOrder(all_samples(90), bucket_of, batch_size=4, seed=seed)
        return [
            [rows.tolist() for _, rows in batches(order, order.first_step(e), order.first_step(e + 1))]
            for e in range(3)
        ]

    epochs = contents(5)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert contents(5) == epochs
    assert contents(6) != epochs
    buckets = [
        bucket for bucket, _ in batches(BatchOrder(all_samples(90), bucket_of, batch_size=4, seed=5), 0, 24)
    ]
    assert len(set(buckets[:8])) == 3, "batches of all buckets are mixed"


def test_random_access():
    fresh = [BatchOrder(all_samples(23), np.arange(23) % 2, batch_size=3, seed=1) for _ in range(2)]
    expected = batches(fresh[0], 0, 40)
    for step in (39, 3, 17, 0):
        bucket, rows = fresh[1].batch(step)
        assert bucket == expected[step][0]
        assert rows.tolist() == expected[step][1].tolist()
    copy = pickle.loads(pickle.dumps(BatchOrder(np.arange, batch_size=2)))  # as for worker processes
    assert copy.batch_size == 2


def test_epochs_of_changing_size():
    """The epochs of a weighted mixture can have different sizes."""
    sizes = [5, 8, 1]
    order = BatchOrder(lambda epoch: np.arange(sizes[epoch % 3]), batch_size=2, shuffle=False)
    assert [order.first_step(epoch) for epoch in range(5)] == [0, 3, 7, 8, 11]
    assert [rows.tolist() for _, rows in batches(order, 6, 9)] == [[6, 7], [0, -1], [0, 1]]
    assert [order.num_steps(epochs) for epochs in (1, 2, 2.5, 0.3, 0.34, 3)] == [3, 7, 8, 1, 2, 8]
    assert order.num_steps(1.5) == 3 + 2


def test_single_epoch():
    order = BatchOrder.single_epoch(5, 2)
    assert len(order) == 3
    assert [(bucket, rows.tolist()) for bucket, rows in batches(order, 0, 3)] == [
        (0, [0, 1]),
        (0, [2, 3]),
        (0, [4, -1]),
    ]
