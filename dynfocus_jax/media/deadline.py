"""A limit to how long reading one sample may take."""

import threading
from collections.abc import Callable
from typing import Any


class TimedOut(Exception):
    """A function that has not come back."""


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Run `function` in a thread of its own and return its result.

    Raises:
      TimedOut: it takes longer. Its thread is left alone (nothing can stop a decoder that hangs) and does not
        keep the process alive.
    """
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimedOut
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
