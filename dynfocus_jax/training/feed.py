"""Batches on the devices: the next one is put there while a step runs, and waiting for it is timed."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

_POLL = 0.005  # seconds
_PATIENCE = 5.0  # seconds


class DeviceFeed:
    """Reads `count` batches in a thread of its own and puts each on the devices, one ahead of those taken.

    batches: an iterator with `close`; put: a batch of this process's rows -> global arrays.
    note: called after a batch was read; what it returns comes with the batch.

    Attributes:
      waited: seconds in which `take` waited with nothing running on the devices.
    """

    def __init__(self, batches: Iterator, put: Callable[[Any], Any], note: Callable[[], Any], count: int):
        self.waited = 0.0
        self._batches = batches
        self._ready: queue.Queue = queue.Queue()
        self._room = threading.Semaphore(1)  # for a batch on the devices that nobody has asked for
        self._stop = threading.Event()

        def read():
            try:
                for _ in range(count):
                    batch = next(batches)
                    noted = note()
                    self._room.acquire()
                    if self._stop.is_set():
                        return
                    self._ready.put((put(batch), noted))
            except BaseException as error:
                self._ready.put(error)

        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()

    def take(self, running: jax.Array | None) -> tuple[Any, Any]:
        """The next batch and its note; raises what reading it raised.

        running: a result of the newest step; while it is not there the devices are busy.
        """
        while True:
            idle, began = running is None or running.is_ready(), time.perf_counter()
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
        """Stop reading; a batch that is being read is waited for, but not for long."""
        self._stop.set()
        self._room.release()
        self._thread.join(_PATIENCE)
        self._batches.close()
