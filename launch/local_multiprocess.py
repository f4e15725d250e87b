#!/usr/bin/env python3
"""Run a command as several processes on this machine, each with its own virtual CPU devices.

    python launch/local_multiprocess.py --processes 2 --devices 4 -- \\
        python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy

For trying out on one machine what runs on many: meshes, data order, checkpoints. The command must take
`--config`; it is started once a process with --config.distributed.* set (a free port of this machine) and
JAX_NUM_CPU_DEVICES. Lines of process i come with the prefix "[i] ". SIGTERM and SIGINT are passed on. When a
process fails all others are killed, and its exit code is this one's (128 + signal if a signal ended it).

Assumes a POSIX machine whose cores the processes share, and a Python with the package's requirements.
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
    parser.add_argument("--processes", type=_positive, default=2, help="how many (default 2)")
    parser.add_argument("--devices", type=_positive, default=1, help="virtual devices of each (default 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("there is no command; write -- python -m dynfocus_jax.train ...")

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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return int(text)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _flags(address: str, count: int, index: int) -> list[str]:
    fields = {"mode": "explicit", "address": address, "num_processes": count, "process_id": index}
    return [f"--config.distributed.{name}={value}" for name, value in fields.items()]


def _wait(processes: list[subprocess.Popen]) -> int:
    """Waits until all have ended well, or one has failed: its exit code."""
    running = dict(enumerate(processes))
    while running:
        for index, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[index]
            if code:
                how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
                others = "; ending the others" if running else ""
                print(f"process {index} failed ({how}){others}", file=sys.stderr, flush=True)
                return code if code > 0 else 128 - code
        time.sleep(0.05)
    return 0


def _forward(source: TextIO, target: TextIO, prefix: str) -> None:
    for line in source:
        target.write(f"{prefix}{line.rstrip()}\n")
        target.flush()


if __name__ == "__main__":
    sys.exit(main())
