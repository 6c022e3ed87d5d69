"""ASGI middleware: request id, access log, metrics, ports, API keys, limits, headers, errors.

`transfer.py` has the bounds on bodies and answers.

Pure ASGI, so that nothing is buffered. Settings of keys and limits: docs/limits.md.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http import HTTPStatus

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
    client_closed,
    from_engine,
    internal_error,
    retry_headers,
)
from server.api.images.url_store import IMAGES
from server.api.routes_health import PATHS
from server.api.state import (
    ANYBODY,
    RequestState,
    add_request_state,
    app_state,
    request_state,
)
from server.api.transfer import ClientStalledError
from server.engine.errors import EngineError
from server.engine.retry_slots import RetrySlots
from server.metrics import Metrics
from server.settings import Settings

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
# Those that any route has.
METHODS = ("GET", "POST", "DELETE")

# Enough for clients, cookies and a proxy's additions; too little to fill the memory.
MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024

# Paths whose clients send a key by HTTP Basic, and those that end requests and so count for none.
SDAPI = "/sdapi/"
UNCOUNTED = frozenset({f"{SDAPI}v1/interrupt", f"{SDAPI}v1/skip"})
# The time that a request takes is unknown here, seconds.
CONCURRENCY_RETRY_S = 1.0


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
        except ClientStalledError:
            state.error_code = "client_stalled"
            log.warning("client stalled", extra={"fields": {"request_id": state.id}})
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


def logged_path(scope: Scope) -> str:
    """Return a request's path for logs and traces; the id of a stored image is a credential."""
    path: str = scope["path"][:MAX_LOGGED_PATH]
    root = scope.get("root_path", "")
    return f"{root}{IMAGES}…" if path.removeprefix(root).startswith(IMAGES) else path


class CanonicalPath:
    """Removes empty segments of a path, before anything reads it: `//v1/models/` is `/v1/models`.

    Keys, hosts and routes must not disagree about what a request asks for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] == "http":
            scope = {**scope, "path": canonical_path(scope["path"])}
        await self._app(scope, receive, send)


def canonical_path(path: str) -> str:
    """Return a path with single slashes between its segments and none behind them."""
    return "/" + "/".join(segment for segment in path.split("/") if segment)


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
        self._app, self._header, self._inner = app, header, middleware(app)

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
        return (scope["path"] in PATHS) != (port_of(scope) == self._port)


def port_of(scope: Scope) -> int | None:
    """Return the port at which the request arrived, None if the server does not tell."""
    port: int | None = (scope.get("server") or ("", None))[1]
    return port


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
        headers = dict(error.headers or {})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(methods_of(app, request.scope))
        api_error = ApiError(status, status.name.lower(), message, headers=headers)
        return error_response(api_error, request)

    async def on_disconnect(request: Request, _: Exception) -> Response:
        return error_response(client_closed(), request)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def methods_of(app: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of a request's path; of its routes each knows only its own."""
    scopes = {method: {**scope, "method": method} for method in METHODS}
    return [
        method
        for method, other in scopes.items()
        if any(route.matches(other)[0] == Match.FULL for route in app.routes)
    ]


# ── API keys and limits ───────────────────────────────────────────────────────────────────────────


class Guard:
    """ASGI middleware that rejects requests too long, unauthenticated or beyond a key's limits."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._sdapi = app, settings.sdapi
        self._keys = Keys(settings.keys, settings.paths_without_key)
        self._rate = Rate(settings.key_rate_per_minute, settings.key_burst)
        self._concurrency = Concurrency(settings.key_concurrency)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, then pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            check_head(scope)
            client = self._client(request)
            request_state(scope).client = client
            is_counted = request.method == "POST" and scope["path"] not in UNCOUNTED
            slot = self._slot(client) if is_counted else nullcontext()
        except ApiError as error:
            await error_response(error, request)(scope, receive, send)
            return
        with slot:
            await self._app(scope, receive, send)

    def _client(self, request: Request) -> str:
        path = request.scope["path"]
        if not self._keys.needed_for(path):
            return ANYBODY
        basic = self._sdapi and path.startswith(SDAPI)
        return self._keys.name(request.headers.get("authorization", ""), basic=basic)

    def _slot(self, client: str) -> AbstractContextManager[None]:
        self._concurrency.check(client)
        self._rate.take(client)
        return self._concurrency.count(client)


def check_head(scope: Scope) -> None:
    """Check URL and headers.

    Raises:
        ApiError: 400 ambiguous about the host or the body's length, 414 or 431 too long.
    """
    _check_framing(scope)
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
        raise url_too_long()
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        raise headers_too_large(f"the headers may have at most {MAX_HEADER_BYTES} bytes")


def url_too_long() -> ApiError:
    """Return the error for a URL beyond `MAX_URL_BYTES`."""
    message = f"the URL may have at most {MAX_URL_BYTES} bytes"
    return ApiError(HTTPStatus.REQUEST_URI_TOO_LONG, "url_too_long", message)


def headers_too_large(message: str) -> ApiError:
    """Return the error for headers beyond a bound."""
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return ApiError(status, "headers_too_large", message)


def _check_framing(scope: Scope) -> None:
    names = Counter(name for name, _ in scope["headers"])
    version = scope.get("http_version", "1.1")
    if names[b"host"] > 1 or (version == "1.1" and not names[b"host"]):
        message = f"a request has exactly one Host header (sent: {names[b'host']})"
        raise _malformed_head("invalid_host", message)
    # Proxies that speak HTTP/1.0 ignore the header and see another end of the body.
    if version == "1.0" and names[b"transfer-encoding"]:
        message = "HTTP/1.0 has no Transfer-Encoding; send Content-Length"
        raise _malformed_head("invalid_transfer_encoding", message)


def _malformed_head(code: str, message: str) -> ApiError:
    headers = {"Connection": "close"}
    return ApiError(HTTPStatus.BAD_REQUEST, code, message, headers=headers)


class Keys:
    """API keys, kept as hashes. A key's name is the first eight digits of its SHA-256."""

    def __init__(self, keys: Sequence[str], open_paths: Sequence[str] = ()) -> None:
        """Create the keys; none: no request needs one. open_paths: as `Settings.open_paths`."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        # Requests' paths have no slash at their end (`CanonicalPath`).
        self._open = frozenset(path.rstrip("/") or "/" for path in open_paths)
        self._open_below = tuple(path[:-1] for path in open_paths if path.endswith("/*"))

    def needed_for(self, path: str) -> bool:
        """Return whether a request for the path needs a key."""
        return bool(self._digests) and not (path in self._open or path.startswith(self._open_below))

    def name(self, authorization: str, *, basic: bool = False) -> str:
        """Return the name of the key in an `Authorization` header. Raises ApiError 401.

        basic: HTTP Basic is accepted too, with any user and a key as the password.
        """
        scheme, _, sent = authorization.partition(" ")
        if basic and scheme.lower() == "basic":
            scheme, sent = "bearer", _password(sent)
        digest = hashlib.sha256(sent.strip().encode()).digest()
        # Compare with every key every time, so that the duration reveals nothing.
        known = sum([hmac.compare_digest(digest, other) for other in self._digests])
        if scheme.lower() != "bearer" or not known:
            raise _unauthorized(wrong=bool(authorization), basic=basic)
        return digest.hex()[:8]


def _password(credentials: str) -> str:
    """Return the password in the credentials of HTTP Basic; empty if they are malformed."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _unauthorized(wrong: bool, basic: bool) -> ApiError:
    """Return error 401. wrong: a key was sent, but an unknown one. basic: as `Keys.name`."""
    challenge = 'Bearer realm="paellera"' + (', error="invalid_token"' if wrong else "")
    if basic:
        # Some clients send a password only when they are asked for one.
        challenge = 'Basic realm="paellera", charset="UTF-8"'
    message = "unknown API key"
    if not wrong:
        message = "an API key is required, as the header Authorization: Bearer <key>"
    headers = {"WWW-Authenticate": challenge}
    return ApiError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", message, headers=headers)


class Rate:
    """Limit of a client's requests: `per_minute` on average (0: no limit), `burst` at once.

    The generic cell rate algorithm: a token bucket in one number per client.
    """

    def __init__(
        self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._tolerance = self._interval * (burst - 1)
        self._clock = clock
        # By client, the time at which its requests would be due if they came evenly.
        self._due: dict[str, float] = {}
        self._retry_slots = defaultdict[str, RetrySlots](RetrySlots)

    def take(self, client: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429 beyond the limit, without counting the request. Each is told to retry
                when there will be room for it behind those that were told before.
        """
        now = self._clock()
        due = max(self._due.get(client, now), now)
        wait = due - now - self._tolerance
        # Clocks round: a client that retries exactly when told is admitted.
        if wait > 1e-6:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate_limit_exceeded",
                "too many requests per minute",
                headers=retry_headers(self._retry_slots[client].take(wait, self._interval, now)),
            )
        self._due[client] = due + self._interval


class Concurrency:
    """Limit of a client's unanswered requests; 0: no limit."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._running: Counter[str] = Counter()
        self._retry_slots = defaultdict[str, RetrySlots](RetrySlots)

    def check(self, client: str) -> None:
        """Raise ApiError 429 if the client may not have one more; each is told another time."""
        if self._limit and self._running[client] >= self._limit:
            spacing_s = CONCURRENCY_RETRY_S / self._limit
            slots = self._retry_slots[client]
            wait = slots.take(CONCURRENCY_RETRY_S, spacing_s, self._clock())
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "concurrency_exceeded",
                f"at most {self._limit} requests may be unanswered at once",
                headers=retry_headers(wait),
            )

    @contextmanager
    def count(self, client: str) -> Iterator[None]:
        """Count a request of the client within the context."""
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
