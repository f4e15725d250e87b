"""A start that fails ends in time, with one sentence, and with an exit code that tells the kind of error."""

import json
import re
import socket
import time

import pytest

from dynfocus_jax.config import default_config
from dynfocus_jax.errors import UserError
from dynfocus_jax.parallel.processes import connect_processes
from tests.multihost.processes import LAUNCHER, TRAIN, arguments, begin, end, explicit, free_port

EXPLICIT = {"mode": "explicit", "address": "localhost:1234", "num_processes": 2, "process_id": 1}


@pytest.fixture
def start(tmp_path):
    """A function that starts training with the flags."""
    return lambda *flags: begin(*TRAIN, *arguments(tmp_path / "data", tmp_path / "run", *flags))


def sentence(process, code):
    """Return the only line on stderr of a process that must end with `code`."""
    found, stdout, stderr = end(process, timeout=120)
    assert found == code, stderr
    assert stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_process_zero_is_not_running(start):
    line = sentence(start(*explicit(f"localhost:{free_port()}", 2, 1, timeout=2)), 1)
    assert "process 1 of 2 received no reply from process 0" in line
    assert "within 2 s (no answer" in line


def test_a_wrong_number_of_processes(start):
    address = f"localhost:{free_port()}"
    both = [start(*explicit(address, 2, 0)), start(*explicit(address, 3, 2))]
    for process in both:
        assert "num_processes is 3 for process 2, but 2 for process 0" in sentence(process, 2)


def test_a_process_that_stops_after_the_roll_call(start):
    """After the roll call JAX itself waits; it would abort with a stack trace."""
    port = free_port()
    process = start(*explicit(f"localhost:{port}", 2, 0, timeout=8))
    while process.poll() is None:
        try:
            with socket.create_connection(("localhost", port), timeout=5) as connection:
                connection.sendall(json.dumps({"process_id": 1, "num_processes": 2}).encode() + b"\n")
                assert json.loads(connection.recv(4096))["error"] is None
            break
        except ConnectionError:
            time.sleep(0.1)
    line = sentence(process, 1)
    assert re.search(
        r"JAX did not connect the 2 processes, which have all reached localhost:\d+, within 8 s", line
    )


def test_auto_without_a_cluster(start):
    line = sentence(start("--config.distributed.mode=auto"), 2)
    assert "config.distributed.mode is 'auto', but JAX finds no cluster in the environment" in line


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mode": "explicit"}, "config.distributed.address is not set"),
        ({"mode": "slurm"}, "config.distributed.mode is 'slurm'"),
        ({"num_processes": 2}, "config.distributed.num_processes is 2, but mode is 'none'"),
        (EXPLICIT | {"address": "localhost"}, "config.distributed.address is 'localhost'"),
        (EXPLICIT | {"process_id": 2}, "config.distributed.process_id is 2, expected 0 to 1"),
        (EXPLICIT | {"timeout": 0}, "config.distributed.timeout is 0"),
    ],
)
def test_invalid_fields(fields, named):
    distributed = default_config().distributed
    distributed.update(fields)
    with pytest.raises(UserError, match=re.escape(named)):
        connect_processes(distributed)


# --- Mistakes found after the processes have connected ------------------------------------------------


def test_a_mistake_in_all_processes(tmp_path):
    flags = arguments(tmp_path / "data", tmp_path / "run", "--config.mesh.tensor=5")
    code, _, stderr = end(begin(*LAUNCHER, "--processes=2", "--", *TRAIN, *flags), timeout=240)
    assert code == 2, stderr
    assert re.search(
        r"^\[\d\] error: config.mesh has .* which does not divide 2 devices", stderr, re.MULTILINE
    )
    assert "Traceback" not in stderr


def test_a_mistake_in_one_process_ends_both(start):
    """At a normal exit, JAX would wait for the other process for 300 s and then abort."""
    address = f"localhost:{free_port()}"
    first = start(*explicit(address, 2, 0))
    second = start(*explicit(address, 2, 1), "--stop_at=nowhere:1")
    code, _, stderr = end(second, timeout=120)
    assert code == 2, stderr
    assert "--stop_at is 'nowhere:1'" in stderr
    code, _, _ = end(first, timeout=120)
    assert code != 0
