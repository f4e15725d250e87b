"""Time limits for reading a file: a deadline that is checked, and a limit for code that checks none."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dynfocus_jax.errors import MediaError, MediaTimeout

T = TypeVar("T")


class CallTimeout(Exception):
    """A function did not return within its time limit."""


def call_with_timeout(function: Callable[[], T], seconds: float) -> T:
    """Call a function in a new thread and return its result, or raise its exception.

    Args:
      function: called without arguments.
      seconds: time limit.

    Raises:
      CallTimeout: if the function does not return in time. Its thread continues, because a decoder that hangs
        cannot be stopped, but does not keep the process alive.
    """
    results: list[T] = []
    exceptions: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as exception:
            exceptions.append(exception)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if exceptions:
        raise exceptions[0]
    if not results:
        raise CallTimeout
    return results[0]


def timeout_error(path: str | Path, seconds: float) -> MediaTimeout:
    """Return the error for a file that was not read within `seconds`."""
    return MediaTimeout(
        f"{path}: reading the file takes more than {seconds:g} s; replace or remove it, or raise "
        "config.data.timeout."
    )


class Deadline:
    """The time by which a file must be read.

    Args:
      path: the file, for the error message.
      seconds: time limit, counted from now. None means no limit.
    """

    def __init__(self, path: str | Path, seconds: float | None):
        self._path, self._seconds = path, seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Check that the deadline has not passed; raise MediaTimeout if it has."""
        if self._end is not None and time.monotonic() > self._end:
            raise self.error()

    def error(self) -> MediaError:
        """Return the error for a read that was interrupted: a MediaTimeout if there is a time limit."""
        if self._seconds is None:
            return MediaError(f"{self._path}: reading the file was interrupted; try again.")
        return timeout_error(self._path, self._seconds)

    def remaining(self) -> float | None:
        """Return the remaining seconds, at least 0.01; None if there is no limit."""
        return None if self._end is None else max(0.01, self._end - time.monotonic())
