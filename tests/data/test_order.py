"""Which sample stands in which batch: each exactly once an epoch, in batches of one bucket, for good."""

import pickle

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynfocus_jax.data.order import BatchOrder, permutation


def every(count):
    return lambda epoch: np.arange(count)


def batches(order, start, end):
    return [order.batch(step) for step in range(start, end)]


def samples(of):
    return np.concatenate([rows[rows >= 0] for _, rows in of]).tolist()


@pytest.mark.parametrize("size", [1, 2, 17, 1000])
def test_a_permutation_is_grains(size):
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
def test_every_sample_once_an_epoch_in_its_bucket(buckets, batch_size, shuffle, seed):
    bucket_of = np.array(buckets)
    make = BatchOrder(every(len(buckets)), bucket_of, batch_size=batch_size, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        first, last = make.start(epoch), make.start(epoch + 1)
        assert last - first == make.steps_per_epoch(epoch)
        content = batches(make, first, last)
        assert sorted(samples(content)) == list(range(len(buckets)))
        for bucket, rows in content:
            assert len(rows) == batch_size
            assert (bucket_of[rows[rows >= 0]] == bucket).all()
            assert (rows >= 0).any()
        short = [bucket for bucket, rows in content if (rows < 0).any()]
        assert len(short) == len(set(short)), "only the last batch of a bucket has padding rows"


def test_epochs_differ_and_follow_from_the_seed():
    bucket_of = np.arange(90) % 3

    def contents(seed):
        order = BatchOrder(every(90), bucket_of, batch_size=4, seed=seed)
        return [
            [rows.tolist() for _, rows in batches(order, order.first_step(e), order.first_step(e + 1))]
            for e in range(3)
        ]

    epochs = contents(5)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert contents(5) == epochs
    assert contents(6) != epochs
    order = [bucket for bucket, _ in batches(BatchOrder(every(90), bucket_of, batch_size=4, seed=5), 0, 24)]
    assert len(set(order[:8])) == 3, "batches of all buckets are mixed"


def test_a_step_needs_no_steps_before_it():
    fresh = [BatchOrder(every(23), np.arange(23) % 2, batch_size=3, seed=1) for _ in range(2)]
    expected = batches(fresh[0], 0, 40)
    for step in (39, 3, 17, 0):
        bucket, rows = fresh[1].batch(step)
        assert bucket == expected[step][0]
        assert rows.tolist() == expected[step][1].tolist()
    copy = pickle.loads(pickle.dumps(BatchOrder(np.arange, batch_size=2)))  # as worker processes get it
    assert copy.batch_size == 2


def test_epochs_of_changing_size():
    """As a mixture with weights has them."""
    sizes = [5, 8, 1]
    order = BatchOrder(lambda epoch: np.arange(sizes[epoch % 3]), batch_size=2, shuffle=False)
    assert [order.first_step(epoch) for epoch in range(5)] == [0, 3, 7, 8, 11]
    assert [rows.tolist() for _, rows in batches(order, 6, 9)] == [[6, 7], [0, -1], [0, 1]]
    assert [order.num_steps(epochs) for epochs in (1, 2, 2.5, 0.3, 0.34, 3)] == [3, 7, 8, 1, 2, 8]
    assert order.num_steps(1.5) == 3 + 2


def test_one_epoch_in_order():
    order = BatchOrder.single_epoch(5, 2)
    assert len(order) == 3
    assert [(bucket, rows.tolist()) for bucket, rows in batches(order, 0, 3)] == [
        (0, [0, 1]),
        (0, [2, 3]),
        (0, [4, -1]),
    ]
