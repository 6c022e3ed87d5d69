"""Authenticate requests by API key, and limit each key's requests: rate and concurrency.

Settings: docs/limits.md.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http import HTTPStatus

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_handlers import error_response
from server.api.errors import ApiError, retry_headers
from server.api.state import ANYBODY, request_state
from server.engine.retry_slots import RetrySlots
from server.paths import SDAPI, OpenPaths
from server.settings import Settings

# Paths that end requests and so count for none.
UNCOUNTED = frozenset({f"{SDAPI}v1/interrupt", f"{SDAPI}v1/skip"})
# The time that a request takes is unknown here, seconds.
CONCURRENCY_RETRY_S = 1.0


class KeyGuard:
    """ASGI middleware that rejects requests unauthenticated or beyond a key's limits."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._sdapi = app, settings.sdapi
        self._keys = Keys(settings.keys, settings.paths_without_key)
        self._rate = RateLimit(settings.key_rate_per_minute, settings.key_burst)
        self._concurrency = ConcurrencyLimit(settings.key_concurrency)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, then pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
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
        # AUTOMATIC1111's clients send a key by HTTP Basic.
        basic = self._sdapi and path.startswith(SDAPI)
        return self._keys.name(request.headers.get("authorization", ""), basic=basic)

    def _slot(self, client: str) -> AbstractContextManager[None]:
        self._concurrency.check(client)
        self._rate.take(client)
        return self._concurrency.count(client)


class Keys:
    """API keys, kept as hashes. A key's name is the first eight digits of its SHA-256."""

    def __init__(self, keys: Sequence[str], open_paths: Sequence[str] = ()) -> None:
        """Create the keys; none: no request needs one. open_paths: as `Settings.open_paths`."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open = OpenPaths(open_paths)

    def needed_for(self, path: str) -> bool:
        """Return whether a request for the path needs a key."""
        return bool(self._digests) and path not in self._open

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
            raise _unauthorized(scheme.lower() if authorization else None, basic=basic)
        return digest.hex()[:8]


def _password(credentials: str) -> str:
    """Return the password in the credentials of HTTP Basic; empty if they are malformed."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _unauthorized(scheme: str | None, basic: bool) -> ApiError:
    """Return error 401, which never repeats what was sent.

    scheme: of the header that was sent, None without one. basic: as `Keys.name`.
    """
    wrong = ', error="invalid_token"' if scheme is not None else ""
    challenge = f'Bearer realm="paellera"{wrong}'
    if basic:
        # Some clients send a password only when they are asked for one.
        challenge = 'Basic realm="paellera", charset="UTF-8"'
    match scheme:
        case None:
            message = "an API key is required, as the header Authorization: Bearer <key>"
        case "bearer":
            message = "unknown API key"
        case "basic":
            message = "HTTP Basic is accepted under /sdapi only; send Authorization: Bearer <key>"
        case _:
            message = "the header must be Authorization: Bearer <key>, with the word Bearer"
    headers = {"WWW-Authenticate": challenge}
    return ApiError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", message, headers=headers)


class RateLimit:
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


class ConcurrencyLimit:
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
