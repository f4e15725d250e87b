"""A local chat-completions endpoint that misbehaves in the ways a test chooses."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ChatRequest:
    """A request to the endpoint: its time on a monotonic clock in seconds, path, headers and body."""

    at: float
    path: str
    headers: Message  # case-insensitive
    body: dict

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class ChatServer:
    """The endpoint's address and the requests so far."""

    url: str
    requests: list[ChatRequest] = field(default_factory=list)


# Replies to a request through its handler; the number is how often the same question came before.
Behaviour = Callable[[BaseHTTPRequestHandler, ChatRequest, int], None]


@contextmanager
def chat_server(behaviour: Behaviour) -> Iterator[ChatServer]:
    """Run an endpoint on a free port."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = ChatRequest(time.monotonic(), self.path, self.headers, body)
            with lock:
                count = sum(earlier.question == request.question for earlier in server.requests)
                server.requests.append(request)
            try:
                behaviour(self, request, count)
            except OSError:  # the client closed the connection
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
    """End the connection with a TCP reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_RD)
    handler.close_connection = True
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def drip(handler: BaseHTTPRequestHandler, seconds: float) -> None:
    """Send a reply byte by byte for some seconds, and close the connection before its end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        handler.wfile.write(b" ")
        time.sleep(0.02)
    handler.close_connection = True


def flood(handler: BaseHTTPRequestHandler) -> None:
    """Send a reply of unknown length: 64 MiB, unless the client closes the connection."""
    handler.close_connection = True
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 2**16)
