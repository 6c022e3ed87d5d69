"""Around every request: its id, its line in the log, its duration, the bound on its body. Pure ASGI, so that nothing is buffered."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body import too_large
from server.api.errors import internal_error
from server.metrics import Metrics

log = logging.getLogger("server.access")

SANE_ID = re.compile(r"[ -~]{1,128}")


class Observation:
    """Gives every request an id, answers 500 for what nobody handled, then logs and measures it. The prompt is never logged."""

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
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unhandled", extra={"fields": {"request_id": request_id}})
            if not status:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status, time.perf_counter() - began)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # Only routes become labels: paths that clients make up would fill the metrics.
        endpoint = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.request_duration.labels(endpoint, status).observe(seconds)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "duration_ms": round(seconds * 1000, 2),
            "client": (scope.get("client") or ("unknown",))[0],
        }
        log.info("request", extra={"fields": fields})


class BodyLimit:
    """Stops reading a body at `limit` bytes, announced or not: whoever reads on gets ApiError 413."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            if announced.isdecimal() and int(announced) > self._limit:
                raise too_large(self._limit)
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise too_large(self._limit)
            return message

        await self._app(scope, receive_bounded, send)
