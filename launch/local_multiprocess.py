#!/usr/bin/env python3
"""Run a command as several processes on this machine, each with virtual CPU devices of its own.

    python launch/local_multiprocess.py --processes 2 --devices 4 -- \\
        python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy

Use it to test a run on many machines on one: meshes, data order and checkpoints. The command must have the
option --config. It is started once per process, with --config.distributed.* and JAX_NUM_CPU_DEVICES set; the
processes connect on a free port of this machine. Every line of process i has the prefix "[i] ". SIGTERM and
SIGINT are passed on to all processes. If a process fails, all others are killed, and the exit code is that of
the failed process (128 + signal if a signal ended it).

Assumes a POSIX machine, and a Python with the package's requirements.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TextIO


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=_positive, default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--devices", type=_positive, default=1, help="virtual devices of each process (default 1)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run, after --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("the command is missing. Add it after --, such as -- python -m dynfocus_jax.train ...")

    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices),
        "PYTHONUNBUFFERED": "1",
    }
    address = f"localhost:{_free_port()}"
    processes = []
    try:
        for index in range(options.processes):
            processes.append(
                subprocess.Popen(
                    [*command, *_flags(address, options.processes, index)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                )
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: [p.send_signal(number) for p in processes])
        readers = [
            threading.Thread(target=_forward, args=(source, target, f"[{index}] "))
            for index, process in enumerate(processes)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for reader in readers:
            reader.start()
        code = _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for reader in readers:
        reader.join()
    return code


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer greater than 0")
    return int(text)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _flags(address: str, count: int, index: int) -> list[str]:
    """Return the options of the command that connect process `index` to the others."""
    fields = {"mode": "explicit", "address": address, "num_processes": count, "process_id": index}
    return [f"--config.distributed.{name}={value}" for name, value in fields.items()]


def _wait(processes: list[subprocess.Popen]) -> int:
    """Wait until all processes have succeeded or one has failed; return the exit code."""
    running = dict(enumerate(processes))
    while running:
        for index, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[index]
            if code:
                reason = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                others = "; ending the others" if running else ""
                print(f"process {index} failed ({reason}){others}", file=sys.stderr, flush=True)
                return code if code > 0 else 128 - code
        time.sleep(0.05)
    return 0


def _forward(source: TextIO, target: TextIO, prefix: str) -> None:
    """Copy lines with a prefix, until the source is closed."""
    for line in source:
        target.write(f"{prefix}{line.rstrip()}\n")
        target.flush()


if __name__ == "__main__":
    sys.exit(main())
