"""A hub of one repository on the loopback, which speaks the routes that `huggingface_hub`
downloads through, and fails as it is told.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """files: "owner/name/path" → content. status: answered instead of a file. cuts: how many more
    answers stop halfway.

    etag: of every file, its sha256 if None. asked: (method, path, Range) of every request.
    """

    files: dict[str, bytes]
    status: int | None = None
    cuts: int = 0
    etag: str | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""

    def downloads(self) -> list[str | None]:
        """The Range of every GET of a file."""
        return [
            span for method, path, span in self.asked if method == "GET" and "/resolve/" in path
        ]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, body: bool) -> None:
        span = self.headers.get("Range")
        self.hub.asked.append((self.command, self.path, span))
        content = self.hub.files.get(
            self.path.strip("/").replace("resolve/main/", "").replace(f"resolve/{COMMIT}/", "")
        )
        if self.hub.status is not None or content is None:
            return self.refuse(self.hub.status or 404)
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{self.hub.etag or hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.send(content[start:])

    def send(self, rest: bytes) -> None:
        if self.hub.cuts:
            self.hub.cuts -= 1
            rest = rest[: len(rest) // 2]
            self.close_connection = True
        self.wfile.write(rest)

    def refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
