"""API keys, and limits of URL, headers, request rate and concurrency. Settings: docs/limits.md."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http import HTTPStatus

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, retry_headers
from server.api.middleware import error_response
from server.api.state import request_state
from server.settings import Settings

# Enough for clients, cookies and a proxy's additions; too little to fill the memory.
MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024

# Client name of a request without a key: the limits then hold for all such requests together.
ANYBODY = "anybody"
# The remaining time of running requests is unknown here.
CONCURRENCY_RETRY_S = 1.0


class Guard:
    """ASGI middleware that rejects requests too long, unauthenticated or beyond a key's limits."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = Keys(settings.keys)
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
            slot = self._slot(client) if request.method == "POST" else nullcontext()
        except ApiError as error:
            await error_response(error, request)(scope, receive, send)
            return
        with slot:
            await self._app(scope, receive, send)

    def _client(self, request: Request) -> str:
        if not self._settings.keys or self._settings.is_open(request.scope["path"]):
            return ANYBODY
        return self._keys.name(request.headers.get("authorization", ""))

    def _slot(self, client: str) -> AbstractContextManager[None]:
        self._concurrency.check(client)
        self._rate.take(client)
        return self._concurrency.count(client)


def check_head(scope: Scope) -> None:
    """Check the lengths of URL and headers. Raises ApiError 414 or 431 beyond the limits."""
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
        message = f"the URL may have at most {MAX_URL_BYTES} bytes"
        raise ApiError(HTTPStatus.REQUEST_URI_TOO_LONG, "url_too_long", message)
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        message = f"the headers may have at most {MAX_HEADER_BYTES} bytes"
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        raise ApiError(status, "headers_too_large", message)


class Keys:
    """API keys, kept as hashes. A key's name is the first eight digits of its SHA-256."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def name(self, authorization: str) -> str:
        """Return the name of the key in an `Authorization` header. Raises ApiError 401."""
        scheme, _, sent = authorization.partition(" ")
        digest = hashlib.sha256(sent.strip().encode()).digest()
        # Compare with every key every time, so that the duration reveals nothing.
        known = sum([hmac.compare_digest(digest, other) for other in self._digests])
        if scheme.lower() != "bearer" or not known:
            raise _unauthorized(wrong=bool(authorization))
        return digest.hex()[:8]


def _unauthorized(wrong: bool) -> ApiError:
    """Return error 401. wrong: a key was sent, but an unknown one."""
    challenge = 'Bearer realm="paellera"' + (', error="invalid_token"' if wrong else "")
    message = "unknown API key"
    if not wrong:
        message = "an API key is required, as the header Authorization: Bearer <key>"
    headers = {"WWW-Authenticate": challenge}
    return ApiError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", message, headers=headers)


class Rate:
    """Limit of a client's requests: `per_minute` on average (0: no limit), `burst` at once.

    The generic cell rate algorithm: a token bucket in one number per client.
    """

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._tolerance = self._interval * (burst - 1)
        self._clock = clock
        # By client, the time at which its requests would be due if they came evenly.
        self._due: dict[str, float] = {}

    def take(self, client: str) -> None:
        """Count a request. Raises ApiError 429 beyond the limit, without counting it."""
        now = self._clock()
        due = max(self._due.get(client, now), now)
        wait = due - now - self._tolerance
        # Clocks round: a client that retries exactly when told is admitted.
        if wait > 1e-6:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate_limit_exceeded",
                "too many requests per minute",
                headers=retry_headers(wait),
            )
        self._due[client] = due + self._interval


class Concurrency:
    """Limit of a client's unanswered requests; 0: no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: Counter[str] = Counter()

    def check(self, client: str) -> None:
        """Raise ApiError 429 if the client may not have one more."""
        if self._limit and self._running[client] >= self._limit:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "concurrency_exceeded",
                f"at most {self._limit} requests may be unanswered at once",
                headers=retry_headers(CONCURRENCY_RETRY_S),
            )

    @contextmanager
    def count(self, client: str) -> Iterator[None]:
        """Count a request of the client within the context."""
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
