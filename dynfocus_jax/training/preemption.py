"""Preemption: schedulers send SIGTERM some time before they end a job."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context in which SIGTERM does not end the process, but makes `requested` return True.

    Several processes may get the signal at different times. JAX's preemption service, which handles the
    signal then, agrees on a step, so that `requested` becomes True before the same step in all processes.
    """

    def __init__(self):
        self.agreed = False  # the last result of `requested`
        self._signalled = False
        self._calls = 0

    def __enter__(self) -> "Preemption":
        self._joined = jax.distributed.is_initialized()
        if not self._joined:
            self._handler = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if not self._joined:
            signal.signal(signal.SIGTERM, self._handler)

    def requested(self) -> bool:
        """Whether to save and stop now; all processes must call it once before every step."""
        self._calls += 1  # over all stages, because the service needs increasing step numbers
        if self._joined:
            reached = multihost_utils.reached_preemption_sync_point(self._calls)
        else:
            reached = self._signalled
        self.agreed = self.agreed or reached
        return self.agreed

    def _note(self, *_) -> None:
        self._signalled = True
