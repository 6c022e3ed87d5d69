"""Check who may send a request: API keys and their limits, hosts, and web pages.

A page of any site can make its visitor's browser send requests to a server on the visitor's machine
or network: directly (cross-site request forgery), or under a name of its own that resolves to the
server's address (DNS rebinding). Programs other than browsers pass both checks. Settings of keys
and limits: docs/limits.md.
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

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, retry_headers
from server.api.middleware import METHODS, error_response
from server.api.origins import (
    DEFAULT_PORTS,
    FORWARDED_HOSTS,
    Authority,
    address_of,
    origin_of,
    port_of,
)
from server.api.state import ANYBODY, request_state
from server.engine.retry_slots import RetrySlots
from server.paths import HEALTH_PATHS, SDAPI
from server.settings import OpenPaths, Settings

# Enough for clients, cookies and a proxy's additions; too little to fill the memory.
MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024

# Paths that end requests and so count for none.
UNCOUNTED = frozenset({f"{SDAPI}v1/interrupt", f"{SDAPI}v1/skip"})
# The time that a request takes is unknown here, seconds.
CONCURRENCY_RETRY_S = 1.0

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Sec-Fetch-Site of requests by the server's own pages, and by the user.
OWN_SITE = frozenset({"same-origin", "none"})


# ── heads ─────────────────────────────────────────────────────────────────────────────────────────


class HeadGuard:
    """ASGI middleware that rejects ambiguous and too long heads, before others read them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, then pass it on."""
        if scope["type"] == "http":
            try:
                check_head(scope)
            except ApiError as error:
                await error_response(error, Request(scope))(scope, receive, send)
                return
        await self._app(scope, receive, send)


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


# ── API keys and limits ───────────────────────────────────────────────────────────────────────────


class Guard:
    """ASGI middleware that rejects requests unauthenticated or beyond a key's limits."""

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


# ── hosts and pages ───────────────────────────────────────────────────────────────────────────────


class OriginGuard:
    """ASGI middleware that rejects foreign hosts, and state changes by foreign pages.

    Health, readiness, metrics and everything on the operations port are exempt from both.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._operations_port = settings.operations_port
        self._hosts = AllowedHosts(settings)
        self._pages = AllowedPages(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, then pass it on."""
        if scope["type"] == "http" and not self._is_exempt(scope):
            try:
                self._hosts.check(scope)
                self._pages.check(scope)
            except ApiError as error:
                await error_response(error, Request(scope))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_exempt(self, scope: Scope) -> bool:
        port = port_of(scope)
        return scope["path"] in HEALTH_PATHS or (port is not None and port == self._operations_port)


class CrossOrigin(CORSMiddleware):
    """CORS for the pages of `origins`, whose server may be on a private network (a browser asks).

    Refuses a preflight with an error in the one shape.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], exposed: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=exposed,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight, or pass a request on and tell the browser who may read its answer."""
        try:
            await super().__call__(scope, receive, send)
        except _PreflightRefusedError as error:
            await error_response(error, Request(scope))(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the answer to a preflight. Raises ApiError 403 or 405."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == HTTPStatus.OK:
            return answer
        cors = {
            name: value
            for name, value in answer.headers.items()
            if name == "vary" or name.startswith("access-control-")
        }
        origin, method = (
            request_headers[name] for name in ("origin", "access-control-request-method")
        )
        if not self.is_allowed_origin(origin):
            raise _PreflightRefusedError(*_foreign_origin(origin), headers=cors)
        allowed = ", ".join(METHODS)
        message = f"pages of other origins may send {allowed} (sent: {method[:20]!r})"
        raise _PreflightRefusedError(
            HTTPStatus.METHOD_NOT_ALLOWED,
            "method_not_allowed",
            message,
            headers=cors | {"Allow": allowed},
        )


class _PreflightRefusedError(ApiError):
    """A preflight was refused. No endpoint raises it."""


def _foreign_origin(origin: str | None) -> tuple[int, str, str]:
    """Return the status, code and message of the error for a page that is not allowed."""
    message = "pages of other origins may not do this: set PAELLERA_CORS_ORIGINS, or"
    message = f"{message} PAELLERA_PUBLIC_URL if it is the server's own page behind a proxy"
    shown = "" if origin is None else f" (sent: {origin[:80]!r})"
    return HTTPStatus.FORBIDDEN, "foreign_origin", message + shown


class AllowedHosts:
    """The names in `allowed_hosts`, or the default ones.

    By default any name is allowed, except where both the setting `host` and the address at which
    the connection arrived are loopback: there only localhost, names below it and IP addresses are.
    Another server than `paellera serve` may listen beyond loopback without telling the settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = [name.lower().strip("[]") for name in settings.hosts]
        self._is_local = settings.is_local
        public = Authority.of_origin(origin_of(settings.public_url))
        self._public = public and public.name

    def check(self, scope: Scope) -> None:
        """Raise ApiError 400 if the request's Host is not allowed; browsers never omit it."""
        if "*" in self._allowed or (not self._allowed and not self._arrived_locally(scope)):
            return
        sent = Headers(scope=scope).getlist("host")
        if not sent:
            return
        host = Authority.parse(sent[0]) if len(sent) == 1 else None
        if host is None or not self._allows(host):
            shown = ", ".join(sent)[:80]
            message = "the server does not answer to this host: set PAELLERA_ALLOWED_HOSTS, or"
            message = f"{message} PAELLERA_PUBLIC_URL behind a proxy (sent: {shown!r})"
            raise ApiError(HTTPStatus.BAD_REQUEST, "host_not_allowed", message)

    def _arrived_locally(self, scope: Scope) -> bool:
        address = address_of((scope.get("server") or ("",))[0])
        return self._is_local and address is not None and address.is_loopback

    def _allows(self, host: Authority) -> bool:
        if host.name == self._public:
            return True
        if self._allowed:
            return any(_matches(host.name, entry) for entry in self._allowed)
        return host.is_address or _matches(host.name, "localhost", "*.localhost")


class AllowedPages:
    """The server's own pages, and those of `cors_origins`."""

    def __init__(self, settings: Settings) -> None:
        self._origins = frozenset(origin.lower() for origin in settings.origins)
        self._public = origin_of(settings.public_url)

    def check(self, scope: Scope) -> None:
        """Raise ApiError 403 if a foreign page's request would change the server's state."""
        if scope["method"] in SAFE_METHODS:
            return
        headers = Headers(scope=scope)
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site in OWN_SITE or (site is None and origin is None) or self._allows(origin):
            return
        if site is None and origin is not None and self._is_own(origin, scope):
            return
        raise ApiError(*_foreign_origin(origin))

    def _allows(self, origin: str | None) -> bool:
        return "*" in self._origins or (origin is not None and origin.lower() in self._origins)

    def _is_own(self, origin: str, scope: Scope) -> bool:
        """Return whether the origin is the host that the request names, or the public URL's."""
        if self._public and origin.lower() == self._public:
            return True
        page = Authority.of_origin(origin)
        if page is None:
            return False
        default = DEFAULT_PORTS.get(origin.partition(":")[0].lower())
        hosts = [*Headers(scope=scope).getlist("host"), *scope.get(FORWARDED_HOSTS, ())]
        named = [host for host in map(Authority.parse, hosts) if host is not None]
        return page in [Authority(host.name, host.port or default) for host in named]


def _matches(name: str, *patterns: str) -> bool:
    """Return whether a pattern is the name, or `*.` and a domain above it."""
    return any(
        name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
        for pattern in patterns
    )
