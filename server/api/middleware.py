"""ASGI middleware: request id, access log, metrics, ports, headers, errors, answers in transit.

Pure ASGI, so that nothing is buffered. `access.py` rejects requests, `body_limit.py` bounds bodies.
docs/limits.md lists the bounds of answers.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import quote, unquote

from fastapi import FastAPI, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import (
    CLIENT_CLOSED_REQUEST,
    NOT_READY,
    ApiError,
    ClientStalledError,
    client_closed,
    from_engine,
    internal_error,
)
from server.api.headers import weighted
from server.api.origins import port_of
from server.api.state import (
    RequestState,
    add_request_state,
    app_state,
    request_state,
)
from server.engine.errors import EngineError
from server.metrics import Metrics
from server.paths import HEALTH_PATHS, IMAGES, SDAPI

log = logging.getLogger("server.access")

# No Strict-Transport-Security: it is void over plain HTTP, and only the operator of the TLS proxy
# knows what else the host serves.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
VALID_ID = re.compile(r"[ -~]{1,128}")
MAX_LOGGED_PATH = 200
# Those that any route has; HEAD is answered as GET.
METHODS = ("GET", "HEAD", "POST", "DELETE")

# The scope's key for the connection's transport, where the server gives it.
TRANSPORT = "paellera.transport"
# A message's key for the bytes that are in memory beside its body until the body is sent.
HELD_BYTES = "paellera.held_bytes"
# A client must take one piece of an answer within the send timeout, whatever the answer's length.
PIECE_BYTES = 64 * 1024
# Below, the headers of compression cost more than it saves.
MIN_GZIP_BYTES = 500
# Longer answers are compressed in a thread.
MAX_INLINE_GZIP_BYTES = 64 * 1024
# The fastest: on two cores of a Xeon 5 ms for a PNG of 123 KiB in base64, 32 ms at level 6.
GZIP_LEVEL = 1
GZIP_FORMAT, MEMORY_LEVEL = 31, 8
# Images in base64 shrink by a quarter, by code lengths alone: the search for repetitions finds
# nothing, and without it the same PNG takes 1 ms. A sample of so many bytes tells.
SAMPLE_BYTES = 8 * 1024
MAX_REPETITIVE_RATIO = 0.6


class Observation:
    """Assigns every request an id, logs and measures it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Observe one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        sent_id = Headers(scope=scope).get("x-request-id", "")
        state = RequestState(sent_id if VALID_ID.fullmatch(sent_id) else uuid.uuid4().hex)
        add_request_state(scope, state)
        status, server_timing = 0, None

        async def send_with_id(message: Message) -> None:
            nonlocal status, server_timing
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = state.id
                status, server_timing = message["status"], headers.get("server-timing")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientStalledError:
            state.error_code = "client_stalled"
            log.warning("client stalled", extra={"fields": {"request_id": state.id}})
        finally:
            self._record(scope, status, time.perf_counter() - began, server_timing)

    def _record(self, scope: Scope, status: int, seconds: float, server_timing: str | None) -> None:
        # Only routes become labels: paths invented by clients would fill the metrics. A request
        # rejected before routing has no route yet. A preflight asks for none: it would pass for a
        # fast request.
        known = scope["path"] in self._metrics.endpoints and scope["method"] != "OPTIONS"
        endpoint = getattr(
            scope.get("route"), "path_format", scope["path"] if known else "unmatched"
        )
        state = request_state(scope)
        self._metrics.record_request(str(endpoint), status, seconds, state.id)
        fields = {
            "request_id": state.id,
            "trace_id": scope.get("paellera.trace_id"),
            "method": scope["method"],
            "path": logged_path(scope),
            "status": status,
            "code": state.error_code,
            "duration_ms": round(seconds * 1000, 2),
            "server_timing": server_timing,
            "client": (scope.get("client") or ("unknown",))[0],
            "key": state.client,
            **state.job_fields,
        }
        present = {name: value for name, value in fields.items() if value is not None}
        log.info("request", extra={"fields": present})


class InternalErrors:
    """Answers 500 for unhandled exceptions, unless an answer has begun, and logs them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientStalledError:
            raise
        except Exception:
            fields = {"request_id": request_state(scope).id}
            log.exception("unhandled exception", extra={"fields": fields})
            if not begun:
                await internal_error().response()(scope, receive, send)


def logged_path(scope: Scope) -> str:
    """Return a request's path for logs and traces; the id of a stored image is a credential."""
    path: str = scope["path"][:MAX_LOGGED_PATH]
    root = scope.get("root_path", "")
    return f"{root}{IMAGES}…" if path.removeprefix(root).startswith(IMAGES) else path


class CanonicalPath:
    """Removes empty segments of a path, before anything reads it: `//v1/models/` is `/v1/models`.

    Keys, hosts and routes must not disagree about what a request asks for. A slash that is sent as
    `%2F` is a part of a name, such as that of a model, and stays.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] == "http":
            scope = {**scope, "path": canonical_path(scope)}
        await self._app(scope, receive, send)


def canonical_path(scope: Scope) -> str:
    """Return a request's path with single slashes between its segments and none behind them."""
    path: str = scope["path"]
    encoded = (scope.get("raw_path") or b"").decode("latin-1")
    if unquote(encoded) != path:  # an ASGI server may leave it out
        encoded = quote(path)
    return "/" + "/".join(unquote(segment) for segment in encoded.split("/") if segment)


class HeadAsGet:
    """Answers HEAD as GET, wherever the app has GET; the server omits the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        # The server's own scope keeps the method, by which it knows that there is no body.
        inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive, send)
        finally:
            # For the metrics.
            scope["route"] = inner.get("route")


class WithHeader:
    """ASGI middleware that passes requests with a header through another one, others past it."""

    def __init__(self, app: ASGIApp, header: str, middleware: Callable[[ASGIApp], ASGIApp]) -> None:
        self._app, self._header = app, header
        self._inner = middleware(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        present = scope["type"] == "http" and self._header in Headers(scope=scope)
        await (self._inner if present else self._app)(scope, receive, send)


class SecurityHeaders:
    """Adds the headers that keep browsers from misreading, framing or reporting an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the headers to one answer."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class HealthPort:
    """Serves health and metrics on this port alone, and nothing else there."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 404 on the wrong port."""
        if scope["type"] == "http" and self._is_misdirected(scope):
            error = ApiError(HTTPStatus.NOT_FOUND, "not_found", "not on this port")
            await error_response(error, Request(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_misdirected(self, scope: Scope) -> bool:
        return (scope["path"] in HEALTH_PATHS) != (port_of(scope) == self._port)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────


def error_response(error: ApiError, request: Request) -> Response:
    """Return the error's answer; count it and note its code for the access log."""
    request_state(request).error_code = error.code
    unavailable = error.status == HTTPStatus.SERVICE_UNAVAILABLE
    rejected = error.status < CLIENT_CLOSED_REQUEST or unavailable
    if rejected and error.code != NOT_READY:
        app_state(request).metrics.rejected.labels(error.code).inc()
    return error.response()


def register_error_handlers(app: FastAPI) -> None:
    """Make the app answer every exception in the one shape of errors."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, request)

    async def on_engine_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineError)
        return error_response(from_engine(error), request)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        message = f"{status.phrase}: {request.method} {request.url.path[:200]}"
        path = f"/v1{request.scope['path']}"
        if request.method in methods_of(app, {**request.scope, "path": path}):
            message += f"; did you mean {path}?"
        if status == HTTPStatus.NOT_FOUND and _is_switched_off(request):
            message += "; AUTOMATIC1111's API is off, and PAELLERA_SDAPI=true switches it on"
        headers = dict(error.headers or {})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(methods_of(app, request.scope))
        api_error = ApiError(status, status.name.lower(), message, headers=headers)
        return error_response(api_error, request)

    async def on_disconnect(request: Request, _: Exception) -> Response:
        # Only a reader of the body gets this exception.
        app_state(request).metrics.cancelled.labels("upload").inc()
        return error_response(client_closed(), request)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def _is_switched_off(request: Request) -> bool:
    is_sdapi = request.url.path.startswith(SDAPI)
    return is_sdapi and not app_state(request).settings.sdapi


def methods_of(app: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of a request's path; of its routes each knows only its own."""

    def exists(method: str) -> bool:
        other = {**scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(other)[0] == Match.FULL for route in app.routes)

    return [method for method in METHODS if exists(method)]


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False, slots=True)
class _Answer:
    """An answer that the client has not taken completely.

    Attributes:
        transport: of the connection, None if the server does not give it.
        bytes: of the body, as far as the application has made it.
        moved_at: `time.monotonic()` at which the client last took a piece.
    """

    transport: asyncio.Transport | None
    bytes: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    aborted: bool = False

    def abort(self) -> None:
        """Close the connection without waiting for the client to read."""
        self.aborted = True
        if self.transport is not None:
            self.transport.abort()


class SendTimeout:
    """Sends answers in pieces, each of which the client must take within `timeout_s`.

    An application's last `send` returns when the client's system has all bytes, so whatever the
    application holds for a request is held until then. All answers together may have `budget`
    bytes; beyond it, the answer that has waited longest for its client is aborted.

    The server must pause `send` while bytes are unsent (`http_protocol.BoundedProtocol`).
    """

    def __init__(self, app: ASGIApp, timeout_s: float, budget: int) -> None:
        self._app = app
        self._timeout_s, self._budget = timeout_s, budget
        self._answers: set[_Answer] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on. Raises ClientStalledError."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with self._answer(scope) as answer:

            async def send_in_pieces(message: Message) -> None:
                for piece in self._pieces(answer, message):
                    await self._send(answer, send, piece)

            await self._app(scope, receive, send_in_pieces)

    @asynccontextmanager
    async def _answer(self, scope: Scope) -> AsyncIterator[_Answer]:
        answer = _Answer(scope.get(TRANSPORT))
        self._answers.add(answer)
        try:
            yield answer
        except BaseException:
            # The rest of a broken answer is of no use, and its client may never read it.
            answer.abort()
            raise
        finally:
            self._answers.discard(answer)

    def _pieces(self, answer: _Answer, message: Message) -> Iterable[Message]:
        if message["type"] != "http.response.body":
            yield message
            return
        body, held = message.get("body", b""), message.get(HELD_BYTES, 0)
        answer.bytes += len(body) + held
        self._enforce_budget()
        for offset in range(0, len(body), PIECE_BYTES):
            piece = body[offset : offset + PIECE_BYTES]
            yield {"type": message["type"], "body": piece, "more_body": True}
            answer.bytes -= len(piece)
        answer.bytes -= held
        if not message.get("more_body", False):
            yield {"type": message["type"], "body": b"", "more_body": False}

    def _enforce_budget(self) -> None:
        while sum(answer.bytes for answer in self._answers) > self._budget:
            stalest = min(self._answers, key=lambda answer: answer.moved_at)
            self._answers.discard(stalest)
            stalest.abort()

    async def _send(self, answer: _Answer, send: Send, message: Message) -> None:
        answer.moved_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                await send(message)
        except TimeoutError:
            answer.abort()
        if answer.aborted:
            # The server learns of the lost connection before the end of the request.
            await asyncio.sleep(0)
            raise ClientStalledError


# ── compression ───────────────────────────────────────────────────────────────────────────────────


class Compression:
    """Compresses JSON, and nothing else: image files are compressed already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on; compress its answer if the client accepts that."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        accepted = accepts_gzip(Headers(scope=scope).get("accept-encoding", ""))
        # Held until the body's length is known.
        start: Message | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_json(message):
                MutableHeaders(scope=message).add_vary_header("Accept-Encoding")
                if accepted:
                    start = message
                    return
            if start is not None:
                first, start = start, None
                if _is_compressible(message):
                    message = await _compressed(first, message)
                await send(first)
            await send(message)

        await self._app(scope, receive, send_compressed)


def accepts_gzip(header: str) -> bool:
    """Return whether an `Accept-Encoding` header allows gzip (RFC 9110, 12.5.3)."""
    weights = dict(weighted(header))
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def _is_json(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    return media_type == "application/json" and "content-encoding" not in headers


def _is_compressible(body: Message) -> bool:
    return not body.get("more_body", False) and len(body.get("body", b"")) >= MIN_GZIP_BYTES


async def _compressed(start: Message, message: Message) -> Message:
    """Return the compressed body; change the headers of `start` to fit."""
    body = message["body"]
    if len(body) > MAX_INLINE_GZIP_BYTES:
        compressed = await asyncio.to_thread(_gzip, body)
    else:
        compressed = _gzip(body)
    headers = MutableHeaders(scope=start)
    headers["Content-Encoding"] = "gzip"
    headers["Content-Length"] = str(len(compressed))
    # The answer's object keeps the original until it is sent.
    return {**message, "body": compressed, HELD_BYTES: len(body)}


def _gzip(body: bytes) -> bytes:
    strategy = zlib.Z_DEFAULT_STRATEGY if _is_repetitive(body) else zlib.Z_HUFFMAN_ONLY
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP_FORMAT, MEMORY_LEVEL, strategy)
    return compressor.compress(body) + compressor.flush()


def _is_repetitive(body: bytes) -> bool:
    middle = max(0, len(body) - SAMPLE_BYTES) // 2
    sample = body[middle : middle + SAMPLE_BYTES]
    return len(zlib.compress(sample, GZIP_LEVEL)) < MAX_REPETITIVE_RATIO * len(sample)
