"""Puts the next batch on the devices while a step runs, and measures how long the devices wait for data."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

_POLL = 0.005  # seconds between checks of whether the devices are idle
_CLOSE_TIMEOUT = 5.0  # seconds


class ClosableIterator(Protocol):
    """An iterator whose resources `close` releases."""

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


class DeviceFeed:
    """Reads batches in a thread and puts each on the devices, one batch ahead of those taken.

    Args:
      batches: iterator of this process's rows of each batch, with a method `close`.
      put: maps such rows to global arrays.
      annotate: called after each batch is read; its result is returned with the batch.
      count: batches to read.

    Attributes:
      waited: seconds that `take` waited while nothing ran on the devices.
    """

    def __init__(
        self,
        batches: ClosableIterator,
        put: Callable[[Any], Any],
        annotate: Callable[[], Any],
        count: int,
    ):
        self.waited = 0.0
        self._batches = batches
        self._ready: queue.Queue = queue.Queue()
        self._room = threading.Semaphore(1)  # one batch may be on the devices before it is taken
        self._stop = threading.Event()

        def read():
            try:
                for _ in range(count):
                    batch = next(batches)
                    annotation = annotate()
                    self._room.acquire()
                    if self._stop.is_set():
                        return
                    self._ready.put((put(batch), annotation))
            except BaseException as error:
                self._ready.put(error)

        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()

    def take(self, running: jax.Array | None) -> tuple[Any, Any]:
        """Return the next batch and its annotation; raise the exception that reading it raised.

        running: a result of the newest step; the devices are busy until it is ready.
        """
        result: Any = running  # Array.is_ready exists, but JAX does not declare it
        while True:
            idle, began = result is None or result.is_ready(), time.perf_counter()
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=_POLL)
                break
            if idle:
                self.waited += time.perf_counter() - began
        if idle:
            self.waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """Stop reading, after waiting briefly for a batch that is being read."""
        self._stop.set()
        self._room.release()
        self._thread.join(_CLOSE_TIMEOUT)
        self._batches.close()
