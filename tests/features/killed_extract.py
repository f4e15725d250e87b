"""`python -m dynfocus_jax.extract` with a shard for each medium, killed when it has begun the KILL-th."""

import os
import signal

from dynfocus_jax import extract
from dynfocus_jax.command import run_command
from dynfocus_jax.features.shards import ShardWriter

LEFT = int(os.environ.get("KILL", 0))


def begin(writer, _begin=ShardWriter._begin):
    global LEFT
    _begin(writer)
    LEFT -= 1
    if LEFT == 0:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ShardWriter._begin = begin
    extract._SHARD_BYTES = 1
    run_command(extract.main)
