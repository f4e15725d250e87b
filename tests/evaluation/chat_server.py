"""A chat-completions endpoint on this machine that misbehaves as it is told."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Asked:
    """What arrived: the seconds of a monotonic clock, the path, the headers and the body."""

    at: float
    path: str
    headers: Message  # looked up in any case
    body: dict

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class ChatServer:
    """`behaviour(asked, count)` acts on the handler; count is how often this very question came before."""

    url: str
    asked: list[Asked] = field(default_factory=list)


Behaviour = Callable[[BaseHTTPRequestHandler, Asked, int], None]


@contextmanager
def chat_server(behaviour: Behaviour):
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(time.monotonic(), self.path, self.headers, body)
            with lock:
                count = sum(earlier.question == asked.question for earlier in server.asked)
                server.asked.append(asked)
            try:
                behaviour(self, asked, count)
            except OSError:  # the other side has hung up
                self.close_connection = True

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes | dict | str, **headers: str) -> None:
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    body = body.encode() if isinstance(body, str) else body
    handler.send_response(status)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in ({"Content-Length": str(len(body))} | given).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: str | None, model: str = "judge-1") -> dict:
    message = {"role": "assistant", "content": text}
    return {"model": model, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def say(handler: BaseHTTPRequestHandler, text: str | None) -> None:
    send(handler, 200, completion(text))


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Ends the connection with a TCP reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_RD)
    handler.close_connection = True
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def drip(handler: BaseHTTPRequestHandler, seconds: float) -> None:
    """A reply that comes a byte at a time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        handler.wfile.write(b" ")
        time.sleep(0.02)
    handler.close_connection = True


def flood(handler: BaseHTTPRequestHandler) -> None:
    """A reply of unknown length, of 64 MiB unless the other side hangs up."""
    handler.close_connection = True
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 2**16)
