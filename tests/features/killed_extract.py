"""`python -m dynfocus_jax.extract` with a shard per media item, killed when it opens the KILL-th shard."""

import os
import signal

from dynfocus_jax import extract
from dynfocus_jax.command import run_command
from dynfocus_jax.features.shards import ShardWriter

REMAINING = int(os.environ.get("KILL", 0))


def open_shard(writer, _open_shard=ShardWriter._open_shard):
    global REMAINING
    shard = _open_shard(writer)
    REMAINING -= 1
    if REMAINING == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return shard


if __name__ == "__main__":
    ShardWriter._open_shard = open_shard
    extract._SHARD_BYTES = 1
    run_command(extract.main)
