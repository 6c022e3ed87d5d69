"""Checks of the Host header and of the page behind a request, against web pages that misuse it.

A page of any site can make its visitor's browser send requests to a server on the visitor's machine
or network: directly (cross-site request forgery), or under a name of its own that resolves to the
server's address (DNS rebinding). Programs that are no browsers pass both checks.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from server.api.errors import ApiError
from server.api.middleware import error_response, port_of
from server.api.routes_health import PATHS
from server.api.state import app_state
from server.settings import Settings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Sec-Fetch-Site of requests by the server's own pages, and by the user.
OWN_SITE = frozenset({"same-origin", "none"})
DEFAULT_PORTS = {"http": 80, "https": 443}
FORWARDED_HOSTS = "paellera.forwarded_hosts"

_NAME = r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\s:/@?#\\\[\],]+?)\.?(:(?P<port>\d{1,5})?)?"
_HOST = re.compile(_NAME)
_ORIGIN = re.compile(rf"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://{_NAME}/?")


@dataclass(frozen=True, slots=True)
class Authority:
    """A host name or address in lower case, and a port if one was written."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, host: str) -> Authority | None:
        """Return the parts of a Host header, or None if it is malformed."""
        match = _HOST.fullmatch(host.strip())
        return match and cls._of(match)

    @classmethod
    def of_origin(cls, origin: str) -> Authority | None:
        """Return an origin's host with its port, the scheme's default one included."""
        match = _ORIGIN.fullmatch(origin)
        if match is None:
            return None
        found = cls._of(match)
        return cls(found.name, found.port or DEFAULT_PORTS.get(match["scheme"].lower()))

    @classmethod
    def _of(cls, match: re.Match[str]) -> Authority:
        port = match["port"]
        return cls(match["name"].lower().strip("[]"), int(port) if port else None)

    @property
    def is_address(self) -> bool:
        """Whether the name is an IP address."""
        return _address(self.name) is not None


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
        return scope["path"] in PATHS or (port is not None and port == self._operations_port)


class AllowedHosts:
    """The names in `allowed_hosts`, or the default ones.

    By default any name is allowed, except where both the setting `host` and the address at which
    the connection arrived are loopback: there only localhost, names below it and IP addresses are.
    Another server than `paellera serve` may listen beyond loopback without telling the settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = [name.lower().strip("[]") for name in settings.hosts]
        self._is_local = settings.is_local
        public = Authority.of_origin(_origin(settings.public_url))
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
        address = _address((scope.get("server") or ("",))[0])
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
        self._public = _origin(settings.public_url)

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
        message = "pages of other origins may not do this: set PAELLERA_CORS_ORIGINS, or"
        message = f"{message} PAELLERA_PUBLIC_URL if it is the server's own page behind a proxy"
        shown = "" if origin is None else f" (sent: {origin[:80]!r})"
        raise ApiError(HTTPStatus.FORBIDDEN, "foreign_origin", message + shown)

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


class TrustedProxies:
    """ASGI middleware that takes client, scheme and host from the headers of trusted proxies."""

    def __init__(self, app: ASGIApp, proxies: str) -> None:
        self._app = ProxyHeadersMiddleware(cast(Any, app), proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note the hosts in X-Forwarded-Host, then let uvicorn's middleware do the rest."""
        peer = (scope.get("client") or (None,))[0]
        if scope["type"] == "http" and peer in self._app.trusted_hosts:
            scope[FORWARDED_HOSTS] = _forwarded_hosts(scope)
        await self._app(cast(Any, scope), cast(Any, receive), cast(Any, send))


def base_url(request: Request) -> str:
    """Return the server's URL as the client knows it, without a slash at its end.

    Raises:
        ApiError: 400, without `public_url` and a valid Host header.
    """
    if public := app_state(request).settings.public_url:
        return public.rstrip("/")
    scope = request.scope
    hosts = [*scope.get(FORWARDED_HOSTS, ()), *request.headers.getlist("host")]
    host = hosts[0].strip() if hosts else ""
    if Authority.parse(host) is None:
        message = f"the URL of an image needs a valid Host header (sent: {host[:80]!r})"
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_host", message)
    return f"{scope['scheme']}://{host}{scope.get('root_path', '').rstrip('/')}"


def _forwarded_hosts(scope: Scope) -> Sequence[str]:
    sent = ",".join(Headers(scope=scope).getlist("x-forwarded-host"))
    return [host.strip() for host in sent.split(",") if host.strip()]


def _origin(url: str) -> str:
    """Return the origin of an http or https URL in lower case, without its default port."""
    scheme, _, rest = url.lower().partition("://")
    return f"{scheme}://{rest.partition('/')[0]}".removesuffix(f":{DEFAULT_PORTS.get(scheme)}")


def _matches(name: str, *patterns: str) -> bool:
    """Return whether a pattern is the name, or `*.` and a domain above it."""
    return any(
        name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern
        for pattern in patterns
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
