"""Roll call: check that all processes of a run have started, before JAX connects them.

It exists beside `jax.distributed.initialize` because JAX does not tell the user what is wrong. If a process
is missing, JAX's coordination service times out and aborts the others with a stack trace, without naming the
missing one. It also aborts if two processes have the same number, or one has a number that is not expected.

The roll call names the processes that are missing, have the same number, or expect another number of
processes. Process 0 listens at the address that JAX will use. Every other process connects to it and sends
its own number and the number of processes. Process 0 checks them and replies to all, so that a mistake ends
every process with one sentence. Afterwards the port is free for JAX.
"""

import contextlib
import json
import socket
import time
from typing import Any

from dynfocus_jax.errors import RunError, UserError

_RETRY_INTERVAL = 0.2  # seconds between two attempts to connect
_HELLO_TIMEOUT = 2.0  # seconds in which a process that has connected must send its message
_MAX_MESSAGE = 4096  # bytes
_ERRORS = {"UserError": UserError, "RunError": RunError}


def roll_call(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Wait until all processes have called this function.

    Args:
      address: "host:port" of process 0.
      num_processes: number of processes that this one expects.
      process_id: number of this process, from 0.
      timeout: seconds.

    Raises:
      UserError: the processes expect different numbers of processes, or two have the same number.
      RunError: process 0 cannot be reached, or a process is missing, after the timeout.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _wait_for_all(int(port), num_processes, timeout, deadline)
    else:
        _report_to_process_zero(host.strip("[]"), int(port), num_processes, process_id, timeout, deadline)


# --- Process 0 ----------------------------------------------------------------------------------------


def _wait_for_all(port: int, num_processes: int, timeout: float, deadline: float) -> None:
    """Wait for the other processes, and tell all of them the outcome; raise it if it is an error."""
    present: dict[int, socket.socket] = {}
    error = None
    try:
        with _listen(port) as server:
            while error is None and len(present) < num_processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    error = _missing_processes(num_processes, present, port, timeout)
                    break
                error = _register(connection, present, num_processes)
    finally:
        kind = type(error).__name__ if error else None
        for connection in present.values():
            with connection:
                _send(connection, {"error": kind, "sentence": str(error)})
    if error is not None:
        raise error


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"config.distributed.address: process 0 cannot listen on port {port} of this machine "
            f"({error.strerror}); use another port, or stop the process that uses this one."
        ) from None


def _register(
    connection: socket.socket, present: dict[int, socket.socket], num_processes: int
) -> UserError | None:
    """Receive the message of a new connection, and add it to `present`; return the mistake in it, if any.

    A connection that is not from a process of a run is closed.
    """
    message = _receive(connection, _HELLO_TIMEOUT)
    process_id, expected = message.get("process_id"), message.get("num_processes")
    if not isinstance(process_id, int) or not isinstance(expected, int):
        connection.close()
        return None
    is_taken = process_id in present
    present[-1 if is_taken else process_id] = connection  # -1, so that it also receives the outcome
    if expected != num_processes:
        return UserError(
            f"config.distributed.num_processes is {expected} for process {process_id}, but {num_processes} "
            "for process 0; set the same number for all processes."
        )
    if is_taken or process_id == 0:
        return UserError(
            f"config.distributed.process_id is {process_id} for two processes; use each number from 0 to "
            f"{num_processes - 1} once."
        )
    return None


def _missing_processes(
    num_processes: int, present: dict[int, socket.socket], port: int, timeout: float
) -> RunError:
    missing = [str(i) for i in range(1, num_processes) if i not in present]
    listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    return RunError(
        f"{len(missing)} of {num_processes} processes ({listed}) did not connect to process 0 on port {port} "
        f"within {timeout:g} s; check that they were started with its address and that the port is open, "
        "correct config.distributed.num_processes, or raise config.distributed.timeout."
    )


# --- All other processes ------------------------------------------------------------------------------


def _report_to_process_zero(
    host: str, port: int, num_processes: int, process_id: int, timeout: float, deadline: float
) -> None:
    """Send this process's number to process 0, and wait for the outcome; raise it if it is an error."""
    status = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                _send(connection, {"process_id": process_id, "num_processes": num_processes})
                reply = _receive(connection, max(deadline - time.monotonic(), 0.001))
        except OSError as error:
            status = f"no answer: {error.strerror or error}"
        else:
            if "error" in reply:
                if reply["error"] is None:
                    return
                raise _ERRORS[reply["error"]](reply["sentence"])
            is_late = time.monotonic() >= deadline
            status = (
                "process 0 is still waiting for other processes" if is_late else "another program answers"
            )
        time.sleep(_RETRY_INTERVAL)
    raise RunError(
        f"process {process_id} of {num_processes} received no reply from process 0 at {host}:{port} within "
        f"{timeout:g} s ({status}); check that process 0 runs there and that the port is open, correct "
        "config.distributed.address, or raise config.distributed.timeout."
    )


# --- Messages: one line of JSON -----------------------------------------------------------------------


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other process has ended; whoever waits for it will time out
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any]:
    """Return the message of the other process; {} if none comes in time, or if it is malformed."""
    connection.settimeout(seconds)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < _MAX_MESSAGE:
            part = connection.recv(_MAX_MESSAGE)
            if not part:
                break
            text += part
        message = json.loads(text)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
