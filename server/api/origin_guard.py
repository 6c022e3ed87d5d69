"""Reject requests to foreign hosts and by foreign web pages.

A page of any site can make its visitor's browser send requests to a server on the visitor's machine
or network: directly (cross-site request forgery), or under a name of its own that resolves to the
server's address (DNS rebinding). Programs other than browsers pass both checks. Settings:
docs/limits.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_handlers import METHODS, error_response
from server.api.errors import ApiError
from server.api.origins import (
    DEFAULT_PORTS,
    FORWARDED_HOSTS,
    Authority,
    address_of,
    origin_of,
    port_of,
)
from server.paths import HEALTH_PATHS
from server.settings import Settings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Sec-Fetch-Site of requests by the server's own pages, and by the user.
OWN_SITE = frozenset({"same-origin", "none"})


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
