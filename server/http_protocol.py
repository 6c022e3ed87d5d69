"""One HTTP/1.1 connection, and all connections of a server: bounds before a request is accepted.

uvicorn parses and answers; this module bounds heads, trailers, pipelines, idle time and the number
of connections. docs/limits.md lists the bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import ApiError, too_many_connections
from server.api.head_guard import MAX_HEADER_BYTES, MAX_URL_BYTES, headers_too_large, url_too_long
from server.api.send_timeout import TRANSPORT

log = logging.getLogger(__name__)

# Each header takes some hundred bytes of memory, however short it is.
MAX_HEADERS = 128
# Bytes of trailers, of a chunk's extensions, or of anything else that is neither head nor body.
MAX_TRAILER_BYTES = 8 * 1024
# Requests that a client may send on a connection before it has the answer to the first.
MAX_PIPELINED = 16
# Bytes of an answer that the kernel takes beyond those that the client's system has room for.
KERNEL_BYTES = 128 * 1024
# Seconds for writing what is left when a connection closes.
CLOSE_TIMEOUT_S = 5.0
LOGGED_EVERY_S = 10.0
# Headers about another protocol, which is not offered.
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


def _malformed(reason: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, "malformed_request", reason)


@dataclass(slots=True)
class Connections:
    """The open connections of one server.

    Attributes:
        limit: a connection beyond it closes the one that has waited longest for its client, or is
            refused if none waits.
        exempt_port: the port of probes and metrics, where no connection is refused.
        on_refused: called for every refused connection.
        waiting: connections without a complete request, the longest wait first.
    """

    limit: int
    exempt_port: int | None
    on_refused: Callable[[], None]
    waiting: dict[BoundedProtocol, None] = field(default_factory=dict)
    _closed: int = 0
    _refused: int = 0
    _logged_at: float = -LOGGED_EVERY_S

    def wait(self, connection: BoundedProtocol) -> None:
        """Note that a connection waits for its client from now on."""
        self.waiting.pop(connection, None)
        self.waiting[connection] = None

    def admit(self, newest: BoundedProtocol, port: int | None) -> bool:
        """Make room for a connection beyond the limit; return False if it must be refused."""
        oldest = next((each for each in self.waiting if each is not newest), None)
        if oldest is not None:
            oldest.close()
            self._closed += 1
        elif port != self.exempt_port:
            self.on_refused()
            self._refused += 1
        self._log()
        return oldest is not None or port == self.exempt_port

    def _log(self) -> None:
        """Log the connections closed and refused since the last line, at most every few seconds."""
        now = time.monotonic()
        if now - self._logged_at >= LOGGED_EVERY_S:
            fields = {"limit": self.limit, "closed": self._closed, "refused": self._refused}
            log.warning("connection limit reached", extra={"fields": fields})
            self._closed, self._refused = 0, 0
            self._logged_at = now


def _bound_kernel_buffer(transport: asyncio.Transport) -> None:
    """Let the kernel keep few bytes that the client's system has no room for.

    By default it takes megabytes, and reports room only when a third of them are gone, which a slow
    client may not read within the send timeout.
    """
    connection = transport.get_extra_info("socket")
    # Not every system has the option, and not every transport is TCP.
    with contextlib.suppress(AttributeError, OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_BYTES)


class _UntilClose(int):
    """The length of a body that ends with its connection, as uvicorn counts down: never reached."""

    def __lt__(self, other: object) -> bool:
        return False

    def __sub__(self, other: int) -> _UntilClose:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


class _Rejected(Exception):  # noqa: N818, no error of this program
    """Ends parsing; the connection is answered with the ApiError and closed."""

    def __init__(self, answer: ApiError) -> None:
        self.answer = answer


class BoundedProtocol(HttpToolsProtocol):
    """A connection that ends when its client exceeds a bound or does not continue.

    `head_guard.HeadGuard` answers requests whose heads end within all limits together but
    exceed one.

    Attributes:
        all: all connections of the server.
        head_timeout_s: seconds for a request's head, from its first byte, or from the start of the
            connection for the first.
    """

    all: Connections
    head_timeout_s: float

    _in_head = False
    # Whether the present segment of bytes began, continued or ended a head, a chunk or a body.
    _advanced = False
    # Bytes of the segments since then.
    _pending_bytes = 0
    _trailer_bytes = 0
    # Requests whose heads have arrived and whose answers are not complete.
    _unanswered = 0
    _timer: asyncio.TimerHandle | None = None

    # ── connection ────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request's head; refuse a connection beyond the limit."""
        super().connection_made(transport)
        # A paused `send` is then one whose bytes the client's system has not taken.
        transport.set_write_buffer_limits(high=0)
        _bound_kernel_buffer(transport)
        self.all.wait(self)
        self._set_timer(self.head_timeout_s, self.close)
        port = self.server[1] if self.server is not None else None
        if len(self.connections) > self.all.limit and not self.all.admit(self, port):
            self._answer_and_close(too_many_connections())

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        self.all.waiting.pop(self, None)
        super().connection_lost(exc)

    def close(self) -> None:
        """Close the connection; abort it if the client does not take what is left."""
        self.all.waiting.pop(self, None)
        self._set_timer(CLOSE_TIMEOUT_S, self.transport.abort)
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection now, or after its answer."""
        if self._unanswered:
            super().shutdown()
        else:
            self.close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle after an answer."""
        self.close()

    # ── parsing ───────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Parse the bytes; answer 400 and close beyond a bound."""
        self._unset_keepalive_if_required()
        self._advanced = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            answer = cause.answer if isinstance(cause, _Rejected) else _malformed("invalid HTTP")
            self._reject(answer)
            return
        self._pending_bytes = 0 if self._advanced else self._pending_bytes + len(data)
        if self._in_head and self._pending_bytes > MAX_URL_BYTES + MAX_HEADER_BYTES:
            self._reject(headers_too_large(f"at most {MAX_HEADER_BYTES} bytes of headers"))
        elif not self._in_head and self._pending_bytes > MAX_TRAILER_BYTES:
            self._reject(_malformed("the trailers are too long"))
        elif not self._unanswered and self._timer is None:
            self._set_timer(self.head_timeout_s, self.close)

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # The parser takes the rest for another protocol. Another parser reads the same
                # request without its wish for one.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn's own parser.
                with contextlib.suppress(AttributeError):
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(t for t in tokens if t.lower() not in UPGRADE_HEADERS)
            if name not in UPGRADE_HEADERS:
                lines.append(name + b": " + value)
        return b"\r\n".join((*lines, b"", b""))

    def on_message_begin(self) -> None:
        """Note the start of a head."""
        super().on_message_begin()
        self._in_head = True
        self._trailer_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Keep a bounded URL."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            raise _Rejected(url_too_long())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; drop a trailer, which could pretend to be one (RFC 9110, 6.5.1)."""
        if self._in_head:
            if len(self.headers) == MAX_HEADERS:
                raise _Rejected(headers_too_large(f"at most {MAX_HEADERS} headers"))
            super().on_header(name, value)
            return
        self._trailer_bytes += len(name) + len(value)
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise _Rejected(_malformed("the trailers are too long"))

    def on_headers_complete(self) -> None:
        """Note the end of a head; start the request."""
        self._advanced = True
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _Rejected(_malformed("this is no proxy"))
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Rejected(_malformed("too many pipelined requests"))
        # The extension of `send_timeout.SendTimeout`.
        self.scope[TRANSPORT] = self.transport  # type: ignore[literal-required]
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            # Such a client knows no chunks (RFC 9112, 6.1).
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UntilClose()
        self._in_head = False
        self._unanswered += 1
        self._stop_timer()
        # For the body.
        self.all.wait(self)

    def on_body(self, body: bytes) -> None:
        """Note progress."""
        self._advanced = True
        super().on_body(body)

    def on_chunk_header(self) -> None:
        """Note progress."""
        self._advanced = True

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        self._advanced = True
        if not self.parser.should_upgrade():
            self.all.waiting.pop(self, None)
            super().on_message_complete()

    # ── answers ───────────────────────────────────────────────────────────────────────────────────

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._unanswered -= 1
        if self.transport.is_closing():
            self._set_timer(CLOSE_TIMEOUT_S, self.transport.abort)
        elif not self._unanswered:
            self.all.wait(self)
            if self._in_head:
                self._set_timer(self.head_timeout_s, self.close)

    def _reject(self, answer: ApiError) -> None:
        """Answer and close; only close if the client could take it for a part of an answer."""
        host = self.client[0] if self.client else None
        fields = {"code": answer.code, "reason": answer.message, "client": host}
        log.info("request rejected", extra={"fields": fields})
        if self._unanswered > 1 or (self._unanswered and self.cycle.response_started):
            self.close()
        else:
            self._answer_and_close(answer)

    def _answer_and_close(self, answer: ApiError) -> None:
        content = json.dumps({"error": answer.body}).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            "connection": "close",
            **(answer.headers or {}),
        }
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join((*lines, "", "")).encode() + content)
        self.close()

    # ── timer ─────────────────────────────────────────────────────────────────────────────────────

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
