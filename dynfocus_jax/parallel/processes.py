"""Processes of a run: connecting them, ending them, and work that only process 0 does."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.parallel.roll_call import roll_call
from dynfocus_jax.sections import Field, Section, check_section, require

_HEARTBEAT = 45  # seconds without a sign of life after which JAX considers a process dead and ends all others


DISTRIBUTED: Section = {
    "mode": Field(
        "none",
        'how processes find each other: "none" for a single process, "auto" with what SLURM, GKE or the TPU '
        'provides, "explicit" with the fields below',
        choices=("none", "auto", "explicit"),
    ),
    "address": Field(str, "host:port of process 0"),
    "num_processes": Field(int, "number of processes", at_least=1),
    "process_id": Field(int, "number of this process, from 0", at_least=0),
    "timeout": Field(60, "seconds to wait for the other processes at the start", above=0),
}


def connect_processes(distributed: ConfigDict) -> None:
    """Connect this process to the others of its run; call it before the first use of devices.

    Args:
      distributed: the section `config.distributed`. With mode "explicit", it holds the address and the
        numbers. With "auto", JAX gets them from SLURM, a TPU VM, Open MPI or Kubernetes (on GPUs with the
        package `kubernetes`). With "none", the process is the only one.

    Raises:
      UserError: fields do not fit each other, or those of the other processes.
      RunError: a process is missing after `timeout` seconds. If the timeout ends inside of JAX, which cannot
        be interrupted, the process prints the sentence and exits with code 1 instead.
    """
    check_distributed(distributed)
    if distributed.mode == "none":
        return
    timeout = distributed.timeout
    options = {"initialization_timeout": 2 * timeout + 60, "heartbeat_timeout_seconds": _HEARTBEAT}
    if distributed.mode == "explicit":
        address, count, index = distributed.address, distributed.num_processes, distributed.process_id
        roll_call(address, count, index, timeout)
        failure = f"JAX did not connect the {count} processes, which have all reached {address},"
        with _deadline(timeout, failure):
            jax.distributed.initialize(
                address, count, index, cluster_detection_method="deactivate", **options
            )
    else:
        with _deadline(timeout, "JAX did not connect the processes of this job"):
            _initialize_from_environment(options)
    # A process that fails right after this must not end while others still wait to learn of its devices.
    multihost_utils.sync_global_devices("connect_processes")


def _initialize_from_environment(options: dict[str, Any]) -> None:
    """Initialise JAX with the cluster that it detects; raise UserError if there is none."""
    try:
        jax.distributed.initialize(**options)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            "config.distributed.mode is 'auto', but JAX finds no cluster in the environment "
            f"({' '.join(str(error).split())}); start the processes with srun, on a TPU or as a JobSet, "
            "or set mode to 'explicit' and set address, num_processes and process_id."
        ) from None


def check_distributed(distributed: ConfigDict) -> None:
    """Check that the fields of `config.distributed` fit each other; raise UserError if they do not.

    The rest of the configuration is checked later, because that needs the devices.
    """
    where = "config.distributed"
    check_section(distributed, DISTRIBUTED, where)
    fields = ("address", "num_processes", "process_id")
    if distributed.mode != "explicit":
        for name in fields:
            require(
                distributed[name] is None,
                f"{where}.{name} is {distributed[name]!r}, but mode is {distributed.mode!r}; set mode to "
                f"'explicit', or remove {name}.",
            )
        return
    for name in fields:
        require(
            distributed[name] is not None,
            f"{where}.{name} is not set, but mode 'explicit' needs it; set it, or change mode.",
        )
    require(
        re.fullmatch(r"\S+:\d+", distributed.address) is not None,
        f"{where}.address is {distributed.address!r}, expected host:port of process 0.",
    )
    require(
        0 <= distributed.process_id < distributed.num_processes,
        f"{where}.process_id is {distributed.process_id}, expected 0 to {distributed.num_processes - 1}, "
        f"because num_processes is {distributed.num_processes}.",
    )


@contextlib.contextmanager
def _deadline(seconds: float, failure: str) -> Iterator[None]:
    """End the process with a sentence if the block takes too long.

    The block cannot be interrupted otherwise, and JAX would abort the process with a stack trace.

    failure: start of the sentence, which continues "within ... s".
    """

    def end():
        print(
            f"error: {failure} within {seconds:g} s; check that all of them run and can reach each other, or "
            "raise config.distributed.timeout.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exit_process(code: int) -> None:
    """End this process with an exit code, without waiting for the others.

    At a normal exit JAX waits for the other processes, which may be waiting for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_process_zero() -> bool:
    """Whether this is process 0, which prints, and writes the files that belong to no single process."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Print a line in process 0 only."""
    if is_process_zero():
        print(text, flush=True)


def process_file_name(name: str) -> str:
    """Return the name of this process's own file: "name.jsonl" in process 0, "name.3.jsonl" in process 3."""
    path = Path(name)
    return name if is_process_zero() else f"{path.stem}.{jax.process_index()}{path.suffix}"


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
    """Run the block in process 0 first, and in the other processes after it has finished there."""
    if not is_process_zero():
        multihost_utils.sync_global_devices("process_zero_first")
    yield
    if is_process_zero():
        multihost_utils.sync_global_devices("process_zero_first")
