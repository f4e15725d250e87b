"""`Preemption` catches SIGTERM inside its context, and restores the handler afterwards."""

import os
import signal

from dynfocus_jax.training.preemption import Preemption


def test_sigterm_is_caught():
    before = []
    outer = signal.signal(signal.SIGTERM, lambda *_: before.append(True))
    try:
        with Preemption() as preemption:
            assert not preemption.requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert not preemption.agreed  # the loop has not asked yet
            assert preemption.requested()
            assert preemption.requested()
            assert preemption.agreed
        assert not before
        os.kill(os.getpid(), signal.SIGTERM)
        assert before
    finally:
        signal.signal(signal.SIGTERM, outer)
