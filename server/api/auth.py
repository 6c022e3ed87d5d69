"""Who may ask, how often, how much at once, and with how long a head. The settings, and what is open to everybody: docs/limits.md."""

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

from server.api.errors import ApiError, come_back, refusal
from server.settings import Settings

# What clients, cookies and a proxy's additions come to, and far from what could fill the memory.
MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024

# In place of a key's name where there are no keys: the limits then hold for all requests together.
ANYBODY = "anybody"
# How long requests run is not known here.
CONCURRENCY_RETRY_S = 1.0


class Guard:
    """Refuses what is too long, has no key where one is needed, or exceeds its key's limits; lets the rest in as `state.client`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = Keys(settings.keys)
        self._rate = Rate(settings.key_rate_per_minute, settings.key_burst)
        self._concurrency = Concurrency(settings.key_concurrency)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            check_head(scope)
            client = request.state.client = self._client(request)
            place = self._place(client) if request.method == "POST" else nullcontext()
        except ApiError as error:
            await refusal(error, request)(scope, receive, send)
            return
        with place:
            await self._app(scope, receive, send)

    def _client(self, request: Request) -> str:
        if not self._settings.keys or self._settings.is_open(request.scope["path"]):
            return ANYBODY
        return self._keys.name(request.headers.get("authorization", ""))

    def _place(self, client: str) -> AbstractContextManager[None]:
        self._concurrency.check(client)
        self._rate.take(client)
        return self._concurrency.counted(client)


def check_head(scope: Scope) -> None:
    """Raises ApiError: 414 for a URL, 431 for headers beyond the bounds."""
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
        raise ApiError(HTTPStatus.REQUEST_URI_TOO_LONG, "url_too_long", f"the URL may have at most {MAX_URL_BYTES} bytes")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        message = f"the headers may have at most {MAX_HEADER_BYTES} bytes"
        raise ApiError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message)


class Keys:
    """Known by their hashes. A key's name is its sha256's first eight digits, which say nothing about it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def name(self, authorization: str) -> str:
        """Of the key in this header. Raises ApiError 401."""
        scheme, _, sent = authorization.partition(" ")
        digest = hashlib.sha256(sent.strip().encode()).digest()
        # All of them every time: how long it takes tells nothing.
        known = sum([hmac.compare_digest(digest, other) for other in self._digests])
        if scheme.lower() != "bearer" or not known:
            raise unauthorized(wrong=bool(authorization))
        return digest.hex()[:8]


def unauthorized(wrong: bool) -> ApiError:
    """wrong: a key was sent, but not one of ours."""
    challenge = 'Bearer realm="paellera"' + (', error="invalid_token"' if wrong else "")
    message = "this API key is not known" if wrong else "an API key is needed, as the header Authorization: Bearer <key>"
    return ApiError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", message, headers={"WWW-Authenticate": challenge})


class Rate:
    """At most `per_minute` requests of a client on average, `burst` of them at once; 0 is without limit.

    The generic cell rate algorithm: a token bucket in one number a client.
    """

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._tolerance = self._interval * (burst - 1)
        self._clock = clock
        # When each client would be through if its requests had come evenly.
        self._due: dict[str, float] = {}

    def take(self, client: str) -> None:
        """Counts a request. Raises ApiError 429 for one too many, which does not count."""
        now = self._clock()
        due = max(self._due.get(client, now), now)
        wait = due - now - self._tolerance
        # Clocks round: who comes exactly when told is let in.
        if wait > 1e-6:
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_exceeded", "too many requests a minute", headers=come_back(wait))
        self._due[client] = due + self._interval


class Concurrency:
    """At most `limit` unanswered requests of a client; 0 is without limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: Counter[str] = Counter()

    def check(self, client: str) -> None:
        """Raises ApiError 429 if there is no room for one more."""
        if self._limit and self._running[client] >= self._limit:
            message = f"at most {self._limit} requests may be unanswered at once"
            headers = come_back(CONCURRENCY_RETRY_S)
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, "concurrency_exceeded", message, headers=headers)

    @contextmanager
    def counted(self, client: str) -> Iterator[None]:
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
