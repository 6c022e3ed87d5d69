"""Compress JSON answers with gzip."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.headers import weighted
from server.api.send_timeout import HELD_BYTES

# Below, the headers of compression cost more than it saves.
MIN_GZIP_BYTES = 500
# Longer answers are compressed in a thread.
MAX_INLINE_GZIP_BYTES = 64 * 1024
# The fastest: on two cores of a Xeon 5 ms for a PNG of 123 KiB in base64, 32 ms at level 6.
GZIP_LEVEL = 1
GZIP_FORMAT, MEMORY_LEVEL = 31, 8
# Images in base64 shrink by a quarter, by code lengths alone: the search for repetitions finds
# nothing, and without it the same PNG takes 1 ms. A sample of so many bytes tells.
SAMPLE_BYTES = 8 * 1024
MAX_REPETITIVE_RATIO = 0.6


class Compression:
    """Compresses JSON, and nothing else: image files are compressed already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on; compress its answer if the client accepts that."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        accepted = accepts_gzip(Headers(scope=scope).get("accept-encoding", ""))
        # Held until the body's length is known.
        start: Message | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_json(message):
                MutableHeaders(scope=message).add_vary_header("Accept-Encoding")
                if accepted:
                    start = message
                    return
            if start is not None:
                first, start = start, None
                if _is_compressible(message):
                    message = await _compressed(first, message)
                await send(first)
            await send(message)

        await self._app(scope, receive, send_compressed)


def accepts_gzip(header: str) -> bool:
    """Return whether an `Accept-Encoding` header allows gzip (RFC 9110, 12.5.3)."""
    weights = dict(weighted(header))
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def _is_json(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    return media_type == "application/json" and "content-encoding" not in headers


def _is_compressible(body: Message) -> bool:
    return not body.get("more_body", False) and len(body.get("body", b"")) >= MIN_GZIP_BYTES


async def _compressed(start: Message, message: Message) -> Message:
    """Return the compressed body; change the headers of `start` to fit."""
    body = message["body"]
    if len(body) > MAX_INLINE_GZIP_BYTES:
        compressed = await asyncio.to_thread(_gzip, body)
    else:
        compressed = _gzip(body)
    headers = MutableHeaders(scope=start)
    headers["Content-Encoding"] = "gzip"
    headers["Content-Length"] = str(len(compressed))
    # The answer's object keeps the original until it is sent.
    return {**message, "body": compressed, HELD_BYTES: len(body)}


def _gzip(body: bytes) -> bytes:
    strategy = zlib.Z_DEFAULT_STRATEGY if _is_repetitive(body) else zlib.Z_HUFFMAN_ONLY
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP_FORMAT, MEMORY_LEVEL, strategy)
    return compressor.compress(body) + compressor.flush()


def _is_repetitive(body: bytes) -> bool:
    middle = max(0, len(body) - SAMPLE_BYTES) // 2
    sample = body[middle : middle + SAMPLE_BYTES]
    return len(zlib.compress(sample, GZIP_LEVEL)) < MAX_REPETITIVE_RATIO * len(sample)
