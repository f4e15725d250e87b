"""Several processes of one run: how they find each other, and what only the first of them does."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.parallel.roll_call import roll_call
from dynfocus_jax.sections import Field, Section, check_section, require

_HEARTBEAT = 45  # seconds of silence after which a process counts as dead, and JAX ends all others


DISTRIBUTED: Section = {
    "mode": Field(
        "none",
        'how processes find each other: "auto" from SLURM, GKE or the TPU, "explicit" by the fields below',
        choices=("none", "auto", "explicit"),
    ),
    "address": Field(str, "host:port of process 0"),
    "num_processes": Field(int, "number of processes", at_least=1),
    "process_id": Field(int, "number of this process, from 0", at_least=0),
    "timeout": Field(60, "seconds to wait for the other processes at the start", above=0),
}


def connect_processes(distributed: ConfigDict) -> None:
    """Join this process to the others, as the section `config.distributed` says.

    Call it before anything asks JAX for devices. "explicit" takes address, number and id from the config;
    "auto" what JAX learns from SLURM, a TPU machine, Open MPI or Kubernetes (for GPUs with the package
    `kubernetes`); "none" is a process on its own.

    Raises:
      UserError: fields that do not fit each other or those of the other processes.
      RunError: somebody did not come within `timeout` seconds. Where JAX itself is waiting by then, the
        process ends with that sentence and exit code 1.
    """
    check_distributed(distributed)
    if distributed.mode == "none":
        return
    timeout = distributed.timeout
    options = {"initialization_timeout": 2 * timeout + 60, "heartbeat_timeout_seconds": _HEARTBEAT}
    if distributed.mode == "explicit":
        address, count, index = distributed.address, distributed.num_processes, distributed.process_id
        roll_call(address, count, index, timeout)
        with _deadline(timeout, f"the {count} processes of {address} met, but JAX did not connect them"):
            jax.distributed.initialize(
                address, count, index, cluster_detection_method="deactivate", **options
            )
        return
    with _deadline(timeout, "the processes of this job did not come together"):
        try:
            jax.distributed.initialize(**options)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                "config.distributed.mode is 'auto', but the environment does not tell where the processes "
                f"are ({' '.join(str(error).split())}); start them with srun, on a TPU or as a JobSet, "
                "or set mode to 'explicit' with address, num_processes and process_id."
            ) from None


def check_distributed(distributed: ConfigDict) -> None:
    """Check that the fields of `config.distributed` fit each other; raise UserError if they do not.

    It is needed before there are devices, so before the rest of the configuration is checked.
    """
    where = "config.distributed"
    check_section(distributed, DISTRIBUTED, where)
    fields = ("address", "num_processes", "process_id")
    if distributed.mode != "explicit":
        for name in fields:
            require(
                distributed[name] is None,
                f"{where}.{name} is {distributed[name]!r}, but mode is {distributed.mode!r}; set mode "
                f"to 'explicit', "
                f"or leave {name} out.",
            )
        return
    for name in fields:
        require(distributed[name] is not None, f"{where}.{name} is not set, but mode 'explicit' needs it.")
    require(
        re.fullmatch(r"\S+:\d+", distributed.address) is not None,
        f"{where}.address is {distributed.address!r}, expected host:port of process 0.",
    )
    require(
        0 <= distributed.process_id < distributed.num_processes,
        f"{where}.process_id is {distributed.process_id}, expected 0 to {distributed.num_processes - 1}, as "
        f"num_processes is {distributed.num_processes}.",
    )


@contextlib.contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """End the process when the block takes longer: JAX would abort it, and cannot be interrupted."""

    def end():
        print(
            f"error: {what} within {seconds:g} s; see whether all of them run and reach each other, or raise "
            "config.distributed.timeout.",
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
    """End this process with an exit code, whatever the others do.

    At a normal exit JAX waits for the other processes, which may be waiting for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_process_zero() -> bool:
    """Whether this is process 0, which reports and writes what is not written by all together."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Print a line, once for all processes."""
    if is_process_zero():
        print(text, flush=True)


def process_file_name(name: str) -> str:
    """Name of a file that every process has of its own: process 0 `name.jsonl`, process 3 `name.3.jsonl`."""
    path = Path(name)
    return name if is_process_zero() else f"{path.stem}.{jax.process_index()}{path.suffix}"


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
    """Process 0 runs the block first, the others only after it."""
    if not is_process_zero():
        multihost_utils.sync_global_devices("process_zero_first")
    yield
    if is_process_zero():
        multihost_utils.sync_global_devices("process_zero_first")
