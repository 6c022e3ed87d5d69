"""Read the hosts, ports and origins that requests and settings name."""

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
from server.api.state import app_state

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
        """Return whether the name is an IP address."""
        return address_of(self.name) is not None


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


def port_of(scope: Scope) -> int | None:
    """Return the port at which the request arrived, None if the server does not tell."""
    port: int | None = (scope.get("server") or ("", None))[1]
    return port


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


def origin_of(url: str) -> str:
    """Return the origin of an http or https URL in lower case, without its default port."""
    scheme, _, rest = url.lower().partition("://")
    return f"{scheme}://{rest.partition('/')[0]}".removesuffix(f":{DEFAULT_PORTS.get(scheme)}")


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address, None if the text is none."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
