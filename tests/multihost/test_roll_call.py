"""The roll call: missing, duplicate and unexpected processes end in one sentence in every process."""

import socket
import threading
import time

import pytest

from dynfocus_jax.errors import RunError, UserError
from dynfocus_jax.parallel.roll_call import roll_call
from tests.multihost.processes import free_port


def call(members, *, port=None, timeout=20.0):
    """Call `roll_call` for all (num_processes, process_id) at once; return None or the error of each."""
    address = f"localhost:{port or free_port()}"
    outcomes = [None] * len(members)

    def join(place, count, index):
        try:
            roll_call(address, count, index, timeout)
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=join, args=(i, *member)) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 20)
        assert not thread.is_alive()
    return outcomes


@pytest.mark.parametrize("members", [[(1, 0)], [(2, 0), (2, 1)], [(4, 2), (4, 0), (4, 3), (4, 1)]])
def test_all_processes_are_present(members):
    assert call(members) == [None] * len(members)


def test_process_zero_may_start_last():
    port = free_port()
    outcomes = []
    early = threading.Thread(target=lambda: outcomes.append(call([(2, 1)], port=port)))
    early.start()
    time.sleep(0.5)
    assert call([(2, 0)], port=port) == [None]
    early.join()
    assert outcomes == [[None]]


def test_the_port_is_free_again_afterwards():
    port = free_port()
    for _ in range(3):
        assert call([(2, 0), (2, 1)], port=port) == [None, None]


def test_no_process_at_the_address():
    started = time.monotonic()
    (error,) = call([(3, 2)], timeout=1.5)
    assert 1.5 <= time.monotonic() - started < 10
    assert type(error) is RunError
    assert "process 2 of 3 received no reply from process 0 at localhost:" in str(error)
    assert "within 1.5 s (no answer" in str(error)
    assert "config.distributed.address" in str(error)


def test_an_address_that_does_not_exist():
    with pytest.raises(RunError, match=r"nowhere\.invalid:4000 within 1 s \(no answer: "):
        roll_call("nowhere.invalid:4000", 2, 1, 1.0)


def test_missing_processes_are_named():
    first, there = call([(4, 0), (4, 2)], timeout=2.0)
    assert type(first) is RunError
    assert "2 of 4 processes (1, 3) did not connect to process 0" in str(first)
    assert type(there) is RunError
    assert str(there) == str(first) or "process 0 is still waiting for other processes" in str(there)


@pytest.mark.parametrize("expects", [2, 5])
def test_different_numbers_of_processes(expects):
    errors = call([(3, 0), (3, 1), (expects, expects - 1)], timeout=5.0)
    assert [type(error) for error in errors[::2]] == [UserError, UserError]
    for error in errors[::2]:
        sentence = f"num_processes is {expects} for process {expects - 1}, but 3 for process 0"
        assert sentence in str(error)


def test_the_same_number_twice():
    errors = call([(3, 0), (3, 1), (3, 1)])
    for error in errors:
        assert type(error) is UserError
        assert "config.distributed.process_id is 1 for two processes" in str(error)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (error,) = call([(2, 0)], port=port)
    assert type(error) is UserError
    assert f"cannot listen on port {port}" in str(error)


def test_other_connections_are_ignored():
    port = free_port()
    address = ("localhost", port)

    def disturb():
        for greeting in (b"GET / HTTP/1.1\r\n\r\n\n", b'["a list"]\n', b'{"process_id": "1"}\n', b""):
            while True:
                try:
                    with socket.create_connection(address, timeout=5) as connection:
                        connection.sendall(greeting)
                    break
                except OSError:
                    time.sleep(0.05)

    stranger = threading.Thread(target=disturb)
    stranger.start()
    first = threading.Thread(target=lambda: outcomes.extend(call([(2, 0)], port=port)))
    outcomes = []
    first.start()
    stranger.join(20)
    assert not stranger.is_alive()
    assert call([(2, 1)], port=port) == [None]
    first.join()
    assert outcomes == [None]


def test_another_program_at_the_address():
    with socket.create_server(("localhost", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        (error,) = call([(2, 1)], port=port, timeout=1.0)
    assert type(error) is RunError
    assert f"localhost:{port} within 1 s" in str(error)
