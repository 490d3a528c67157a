"""A proxy in front of a real registry that damages what passes through it."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Damage = Callable[[str, bytes], bytes]
"""Given the path and the body of an answer of the real registry, what is served instead."""


def wrong_bytes(marker: str) -> Damage:
    """Flips a byte in the middle of whatever has `marker` in its path."""

    def damage(path: str, body: bytes) -> bytes:
        if marker not in path or not body:
            return body
        middle = len(body) // 2
        return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]

    return damage


def truncated(marker: str) -> Damage:
    """Serves the first half of whatever has `marker` in its path, as if that were all."""
    return lambda path, body: body[: len(body) // 2] if marker in path else body


@contextmanager
def in_front_of(registry: str, damage: Damage) -> Iterator[str]:
    """The proxy's `host:port`, for the length of a block. Ranges aren't served: every answer is whole."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            connection = http.client.HTTPConnection(registry, timeout=30)
            try:
                sent = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "range")}
                connection.request("GET", self.path, headers=sent)
                answer = connection.getresponse()
                body = damage(self.path, answer.read())
            finally:
                connection.close()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
