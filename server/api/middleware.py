"""Around every request: its id, its line in the log, its duration, its port, the bound on its body, the headers of its answer.

Pure ASGI, so that nothing is buffered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body import too_large, too_slow
from server.api.errors import ApiError, internal_error, refusal
from server.api.routes_health import PATHS
from server.metrics import Metrics

log = logging.getLogger("server.access")

# No Strict-Transport-Security: over plain HTTP it is void, and whoever ends TLS in front of this knows what else their host serves.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
SANE_ID = re.compile(r"[ -~]{1,128}")


class Observation:
    """Gives every request an id, answers 500 for what nobody handled, then logs and measures it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, server_timing = 0, None

        async def send_with_id(message: Message) -> None:
            nonlocal status, server_timing
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                status, server_timing = message["status"], headers.get("server-timing")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unhandled", extra={"fields": {"request_id": request_id}})
            if not status:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - began, server_timing)

    def _record(self, scope: Scope, status: int, seconds: float, server_timing: str | None) -> None:
        # Only routes become labels: paths that clients make up would fill the metrics. What is refused early has not met its route.
        early = scope["path"] if scope["path"] in self._metrics.endpoints else "unmatched"
        endpoint = str(getattr(scope.get("route"), "path", early))
        state = scope["state"]
        self._metrics.record_request(endpoint, status, seconds, state["request_id"])
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "code": state.get("code"),
            "duration_ms": round(seconds * 1000, 2),
            "server_timing": server_timing,
            "client": (scope.get("client") or ("unknown",))[0],
            "key": state.get("client"),
            **state.get("asked", {}),
        }
        log.info("request", extra={"fields": {name: value for name, value in fields.items() if value is not None}})


class SecurityHeaders:
    """What keeps browsers from misreading, framing or telling on an answer, unless it says so itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class OperationsPort:
    """Serves the operations' paths on this port alone, and nothing else there."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] in PATHS) != ((scope.get("server") or ("", None))[1] == self._port):
            error = ApiError(HTTPStatus.NOT_FOUND, "not_found", "not on this port")
            await refusal(error, Request(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class BodyLimit:
    """Stops reading a body at `limit` bytes, announced or not, and where it does not go on for `timeout_s`.

    Whoever reads on gets ApiError: 413, or 408.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received, complete = 0, False

        async def receive_bounded() -> Message:
            nonlocal received, complete
            if complete:
                # What comes after the body is that the client goes away, which takes as long as it likes.
                return await receive()
            if announced.isdecimal() and int(announced) > self._limit:
                raise too_large(self._limit)
            message = await self._next(receive)
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._limit:
                raise too_large(self._limit)
            return message

        await self._app(scope, receive_bounded, send)

    async def _next(self, receive: Receive) -> Message:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await receive()
        except TimeoutError:
            raise too_slow(self._timeout_s) from None
