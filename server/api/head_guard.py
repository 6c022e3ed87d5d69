"""Reject requests whose URL or headers are ambiguous or too long."""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_handlers import error_response
from server.api.errors import ApiError, shortened

# Enough for clients, cookies and a proxy's additions; too little to fill the memory.
MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024
# Transfer codings that change nothing but the framing; empty list elements mean nothing.
CODINGS = (b"chunked", b"identity", b"")


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
        ApiError: 400 ambiguous about the host or the body's length, or an encoded body; 414 or 431
            too long.
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
    sent = b", ".join(v for name, v in scope["headers"] if name == b"transfer-encoding")
    # The parser takes chunks apart and leaves other encodings of a body as they are.
    if any(coding.strip().lower() not in CODINGS for coding in sent.split(b",")):
        allowed = "Transfer-Encoding must be chunked alone; send the body as it is"
        message = f"{allowed} (sent: {shortened(sent.decode('latin-1'))})"
        raise _malformed_head("invalid_transfer_encoding", message)


def _malformed_head(code: str, message: str) -> ApiError:
    headers = {"Connection": "close"}
    return ApiError(HTTPStatus.BAD_REQUEST, code, message, headers=headers)
