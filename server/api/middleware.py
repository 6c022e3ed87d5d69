"""ASGI middleware: request id, access log, metrics, internal errors, paths, headers, ports.

Pure ASGI, so that nothing is buffered.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import quote, unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_handlers import error_response
from server.api.errors import ApiError, ClientStalledError, internal_error
from server.api.origins import port_of
from server.api.state import RequestState, add_request_state, request_state
from server.metrics import Metrics
from server.paths import HEALTH_PATHS, IMAGES

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
