"""An OpenAI-compatible endpoint on this machine for tests: it remembers what it was asked and answers as they want."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

#: Answer to a request: a status without content, bytes as they are, or content that is sent as JSON.
Reply = int | bytes | Mapping[str, Any]


class Asked(NamedTuple):
    """A request."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


class Endpoint(ThreadingHTTPServer):
    """A server whose answers are those of a function.

    Args:
        reply: Called with the body of each request, in a thread of its own.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.asked: list[Asked] = []

    @property
    def url(self) -> str:
        """What a client is given."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Bodies of all requests so far."""
        return [asked.body for asked in self.asked]


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(Asked(self.path, dict(self.headers), body))
        reply = self.server.reply(body)
        status, content = (reply, b"no") if isinstance(reply, int) else (200, reply)
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(OSError):  # the client has given up
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Let a server answer for a while."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(*texts: str | None) -> dict[str, Any]:
    """Content of a chat completion with these choices."""
    return {"choices": [{"message": {"content": text}} for text in texts]}
