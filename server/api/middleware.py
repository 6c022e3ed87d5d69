"""ASGI middleware: request id, access log, metrics, ports, body limit, headers, errors.

Pure ASGI, so that nothing is buffered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from http import HTTPStatus

from fastapi import FastAPI, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body import body_too_large, body_too_slow
from server.api.errors import (
    CLIENT_CLOSED_REQUEST,
    NOT_READY,
    ApiError,
    client_closed,
    from_engine,
    internal_error,
)
from server.api.routes_health import PATHS
from server.api.state import RequestState, add_request_state, app_state, request_state
from server.engine.errors import EngineError
from server.metrics import Metrics

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


class Observation:
    """Assigns every request an id, answers 500 for unhandled exceptions, logs and measures."""

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
        except Exception:
            log.exception("unhandled exception", extra={"fields": {"request_id": state.id}})
            if not status:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - began, server_timing)

    def _record(self, scope: Scope, status: int, seconds: float, server_timing: str | None) -> None:
        # Only routes become labels: paths invented by clients would fill the metrics. A request
        # rejected before routing has no route yet.
        known = scope["path"] in self._metrics.endpoints
        endpoint = getattr(scope.get("route"), "path", scope["path"] if known else "unmatched")
        state = request_state(scope)
        self._metrics.record_request(str(endpoint), status, seconds, state.id)
        fields = {
            "request_id": state.id,
            "method": scope["method"],
            "path": scope["path"][:200],
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
        port = (scope.get("server") or ("", None))[1]
        return (scope["path"] in PATHS) != (port == self._port)


class BodyLimit:
    """Bounds a body to `limit` bytes, announced or not, and to `timeout_s` between its chunks.

    The reader of the body gets ApiError 413 or 408.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on with a bounded body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received, complete = 0, False

        async def receive_bounded() -> Message:
            nonlocal received, complete
            if complete:
                # After the body only the client's disconnect follows; it has no timeout.
                return await receive()
            if announced.isdecimal() and int(announced) > self._limit:
                raise body_too_large(self._limit)
            message = await self._next(receive)
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._limit:
                raise body_too_large(self._limit)
            return message

        await self._app(scope, receive_bounded, send)

    async def _next(self, receive: Receive) -> Message:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await receive()
        except TimeoutError:
            raise body_too_slow(self._timeout_s) from None


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
        api_error = ApiError(status, status.name.lower(), message, headers=error.headers)
        return error_response(api_error, request)

    async def on_disconnect(request: Request, _: Exception) -> Response:
        return error_response(client_closed(), request)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(HTTPException, on_http_exception)
