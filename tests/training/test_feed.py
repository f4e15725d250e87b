"""Batches on the devices: one ahead, errors passed on, waiting counted only while nothing runs."""

import threading
import time

import pytest

from dynfocus_jax.training.feed import DeviceFeed


class Batches:
    """Consecutive numbers, each after `seconds`; `fail_at` raises an error."""

    def __init__(self, seconds=0.0, fail_at=None):
        self.seconds, self.fail_at, self.read, self.closed = seconds, fail_at, 0, False

    def __next__(self):
        time.sleep(self.seconds)
        if self.read == self.fail_at:
            raise ValueError("a broken batch")
        self.read += 1
        return self.read

    def close(self):
        self.closed = True


class Result:
    """A result of a step, ready or not."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def becomes_true(condition):
    limit = time.monotonic() + 5
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.05)
    return condition()


def test_one_batch_is_ahead_on_the_devices():
    batches, put = Batches(), []
    feed = DeviceFeed(batches, lambda batch: put.append(batch) or -batch, lambda: batches.read, 10)
    assert becomes_true(lambda: put == [1])
    assert becomes_true(lambda: batches.read == 2)  # one more is read, but not put on the devices
    assert feed.take(None)[0] == -1
    assert becomes_true(lambda: put == [1, 2])
    assert feed.take(None) == (-2, 2)
    assert becomes_true(lambda: put == [1, 2, 3])
    feed.close()
    assert batches.closed
    assert put == [1, 2, 3]


def test_no_more_batches_than_steps():
    batches = Batches()
    feed = DeviceFeed(batches, lambda batch: batch, lambda: None, 3)
    assert [feed.take(None)[0] for _ in range(3)] == [1, 2, 3]
    assert becomes_true(lambda: batches.read == 3)
    feed.close()


def test_an_error_is_raised_at_its_batch():
    feed = DeviceFeed(Batches(fail_at=2), lambda batch: batch, lambda: None, 10)
    assert [feed.take(None)[0] for _ in range(2)] == [1, 2]
    with pytest.raises(ValueError, match="a broken batch"):
        feed.take(None)
    feed.close()


def test_waiting_counts_only_when_nothing_runs():
    seconds = 0.2
    feed = DeviceFeed(Batches(seconds), lambda batch: batch, lambda: None, 10)
    feed.take(Result(ready=False))
    assert feed.waited == 0
    feed.take(Result(ready=True))
    assert 0.5 * seconds < feed.waited < 5 * seconds
    before = feed.waited
    time.sleep(3 * seconds)
    feed.take(None)  # already there
    assert feed.waited - before < 0.5 * seconds
    feed.close()


def test_a_step_that_ends_while_waiting():
    """Only the time after the end of the step counts as waiting."""
    seconds, result = 1.2, Result(ready=False)
    feed = DeviceFeed(Batches(seconds), lambda batch: batch, lambda: None, 10)
    threading.Timer(seconds / 2, lambda: setattr(result, "ready", True)).start()
    feed.take(result)
    assert 0.2 * seconds < feed.waited < 0.8 * seconds
    feed.close()


def test_close_does_not_wait_for_a_reader_that_hangs(monkeypatch):
    monkeypatch.setattr("dynfocus_jax.training.feed._CLOSE_TIMEOUT", 0.1)
    feed = DeviceFeed(Batches(3.0), lambda batch: batch, lambda: None, 10)
    started = time.monotonic()
    feed.close()
    assert time.monotonic() - started < 2
