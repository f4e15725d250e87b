"""Suppression of the messages that compiler plugins print about hardware that they do not find."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def suppress_plugin_messages() -> Iterator[None]:
    """Discard stderr during the block, and let plugins loaded in it report only fatal errors.

    Use it around the import of JAX and its search for plugins, which both print before log levels are set.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
