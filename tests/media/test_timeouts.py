"""Time limits: of a function in a thread, and of a read that checks its deadline."""

import threading

import pytest

from dynfocus_jax.errors import MediaError, MediaTimeout
from dynfocus_jax.media.timeouts import CallTimeout, Deadline, call_with_timeout


def test_result_and_exception_of_the_function():
    assert call_with_timeout(lambda: 3, 5) == 3
    assert call_with_timeout(lambda: None, 5) is None
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda: 1 / 0, 5)


def test_function_that_does_not_return():
    hang = threading.Event()
    with pytest.raises(CallTimeout):
        call_with_timeout(lambda: hang.wait(60), 0.05)
    hang.set()


def test_deadline():
    deadline = Deadline("v.mp4", 60.0)
    deadline.check()
    assert 59 < deadline.remaining() <= 60
    passed = Deadline("v.mp4", -1.0)
    assert passed.remaining() == 0.01
    with pytest.raises(
        MediaTimeout, match=r"^v\.mp4: reading the file takes more than -1 s; .*config\.data\.timeout"
    ):
        passed.check()


def test_deadline_without_limit():
    deadline = Deadline("v.mp4", None)
    deadline.check()
    assert deadline.remaining() is None
    error = deadline.error()
    assert isinstance(error, MediaError)
    assert not isinstance(error, MediaTimeout)
    assert str(error) == "v.mp4: reading the file was interrupted; try again."
