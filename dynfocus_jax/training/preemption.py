"""Being told to stop: SIGTERM, which schedulers send some time before they end a job."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While it is entered, SIGTERM no longer ends the process but is noted, for the train loop to act on.

    With several processes, of which one may be told before another, `requested` turns True before the same
    step in all of them: JAX's preemption service, which takes the signal there, agrees on the step.
    """

    def __init__(self):
        self.agreed = False  # what `requested` last said
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
        """Whether to save and stop now; to be asked once before every step, by all processes."""
        self._calls += 1  # over all stages: the service needs a count that grows
        if self._joined:
            reached = multihost_utils.reached_preemption_sync_point(self._calls)
        else:
            reached = self._signalled
        self.agreed = self.agreed or reached
        return self.agreed

    def _note(self, *_) -> None:
        self._signalled = True
