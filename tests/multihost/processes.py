"""Helpers that start training on a small problem, as one or several processes."""

import os
import signal
import socket
import subprocess
import sys

from dynfocus_jax.config import stage
from tests.commands import REPOSITORY
from tests.tiny import tiny_config

TRAIN = (sys.executable, "-m", "dynfocus_jax.train")
LAUNCHER = (sys.executable, "launch/local_multiprocess.py")


def get_config(arg=""):
    """Return a run that trains the whole tiny model for 20 steps of 4 samples; "train" does not evaluate."""
    config = tiny_config()
    config.stages = (
        stage(
            name="all",
            annotations="train.json",
            steps=20,
            batch_size=4,
            num_frames=16,
            max_text=96,
            max_turns=2,
            trainable=(".*",),
            random_steps=1,
        ),
    )
    if arg == "train":
        config.evaluation.annotations = None
    config.model.dtype = "float32"
    config.log_every = 1
    config.checkpoint.keep = 10
    return config


def arguments(data_root, workdir, *more, evaluate=True):
    return [
        f"--config={__file__}" if evaluate else f"--config={__file__}:train",
        f"--config.data.root={data_root}",
        f"--workdir={workdir}",
        *more,
    ]


def explicit(address, count, index, timeout=60):
    fields = {"mode": "explicit", "address": address, "num_processes": count, "process_id": index}
    return [f"--config.distributed.{key}={value}" for key, value in (fields | {"timeout": timeout}).items()]


def begin(*command, devices=1):
    """Start a process in this repository, with virtual CPU devices."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process, timeout=900):
    """Wait for a process; return exit code, stdout and stderr. After the timeout it is killed."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, stdout, stderr


def train(processes, *train_arguments, devices=1):
    """Train in so many processes, which must succeed; return stdout and stderr."""
    command = [*TRAIN, *train_arguments]
    if processes > 1:
        command = [*LAUNCHER, f"--processes={processes}", f"--devices={devices}", "--", *command]
    code, stdout, stderr = end(begin(*command, devices=devices))
    assert code == 0, stderr[-3000:]
    return stdout, stderr


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]
