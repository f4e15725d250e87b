"""The roll call of processes that are to work together, before JAX connects them.

JAX's coordination service aborts a process, with a stack trace, that comes under a number which is not
expected, that comes twice, or whose peers do not come in time. So process 0 first calls the roll at the same
address: everybody says its number and how many it expects, and learns in one sentence what is wrong, if
anything is. The port is free again afterwards.
"""

import contextlib
import json
import socket
import time

from dynfocus_jax.errors import RunError, UserError

_PAUSE = 0.2  # seconds between two attempts to connect
_PATIENCE = 2.0  # seconds that somebody who connects may take to say who it is
_LONGEST = 4096  # bytes of a message
_KINDS = {"UserError": UserError, "RunError": RunError}


def roll_call(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns, in all processes, when all have come.

    Args:
      address: "host:port" of process 0; timeout: seconds.

    Raises:
      UserError: the processes do not agree on their number, or two have the same id.
      RunError: nobody answers at the address, or somebody has not come, within the timeout.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _call(int(port), num_processes, timeout, deadline)
    else:
        _answer(host.strip("[]"), int(port), num_processes, process_id, timeout, deadline)


# --- Process 0 ----------------------------------------------------------------------------------------


def _call(port: int, num_processes: int, timeout: float, deadline: float) -> None:
    present: dict[int, socket.socket] = {}
    error = None
    try:
        with _listen(port) as server:
            while error is None and len(present) < num_processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    error = _missing(num_processes, present, port, timeout)
                    break
                error = _enter(connection, present, num_processes)
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
            f"process 0 cannot listen on port {port} of this machine ({error.strerror}); choose another port "
            "in config.distributed.address, or end the process that uses it."
        ) from None


def _enter(connection: socket.socket, present: dict, num_processes: int) -> UserError | None:
    """Note who has connected in `present`; return what is wrong with it."""
    said = _receive(connection, _PATIENCE)
    process_id, expects = said.get("process_id"), said.get("num_processes")
    if not isinstance(process_id, int) or not isinstance(expects, int):
        connection.close()  # nobody of ours
        return None
    # Under a key of its own where it is not entered, so that it hears the sentence too.
    taken = process_id in present
    present[process_id if not taken else -1] = connection
    if expects != num_processes:
        return UserError(
            f"process {process_id} was started as one of {expects}, but process 0 as one of {num_processes}; "
            "give all the same config.distributed.num_processes."
        )
    if taken or process_id == 0:
        return UserError(
            f"two processes were started with config.distributed.process_id={process_id}; number the "
            f"processes 0 to {num_processes - 1}, each once."
        )
    return None


def _missing(num_processes: int, present: dict, port: int, timeout: float) -> RunError:
    missing = [str(i) for i in range(1, num_processes) if i not in present]
    named = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    return RunError(
        f"{len(missing)} of {num_processes} processes ({named}) did not reach process 0 on port {port} "
        f"within {timeout:g} s; see whether they were started with its address and the port is open, correct "
        "config.distributed.num_processes, or raise config.distributed.timeout."
    )


# --- The others ---------------------------------------------------------------------------------------


def _answer(
    host: str, port: int, num_processes: int, process_id: int, timeout: float, deadline: float
) -> None:
    seen = "nobody answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                _send(connection, {"process_id": process_id, "num_processes": num_processes})
                heard = _receive(connection, max(deadline - time.monotonic(), 0.001))
        except OSError as error:
            seen = f"nobody answers: {error.strerror or error}"
        else:
            if "error" in heard:
                if heard["error"] is None:
                    return
                raise _KINDS[heard["error"]](heard["sentence"])
            late = time.monotonic() >= deadline
            seen = "it still waits for others" if late else "somebody else answers"
        time.sleep(_PAUSE)
    raise RunError(
        f"process {process_id} of {num_processes} did not hear from process 0 at {host}:{port} within "
        f"{timeout:g} s ({seen}); see whether process 0 runs there and the port is open, correct "
        "config.distributed.address, or raise config.distributed.timeout."
    )


# --- Messages: one line of JSON -----------------------------------------------------------------------


def _send(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # it has gone; whoever waits for an answer notices
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict:
    """The other's message; empty when there is none in time, or something else was said."""
    connection.settimeout(seconds)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < _LONGEST:
            part = connection.recv(_LONGEST)
            if not part:
                break
            text += part
        message = json.loads(text)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
