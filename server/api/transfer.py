"""ASGI middleware for bodies and answers in transit.

It bounds how many of their bytes are in memory, and how long, and compresses JSON answers for
clients that accept gzip. docs/limits.md lists the bounds.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body import TEXT_BODY_BYTES, body_too_large, body_too_slow
from server.api.errors import ApiError, retry_headers
from server.engine.retry_slots import RetrySlots

# The scope's key for the connection's transport, where the server gives it.
TRANSPORT = "paellera.transport"
# A message's key for the bytes that are in memory beside its body until the body is sent.
HELD_BYTES = "paellera.held_bytes"
# A client must take one piece of an answer within the send timeout, whatever the answer's length.
PIECE_BYTES = 64 * 1024
# How long others' bodies take is unknown here, seconds.
BUDGET_RETRY_S = 1.0
BUDGET_SPACING_S = 0.25
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


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False, slots=True)
class _Body:
    """The body of one request, from its first byte until its answer begins.

    Attributes:
        began: loop time in seconds.
        received: bytes so far.
        counted: bytes that count towards the budget.
        wait: the timeout of the wait for the next chunk.
    """

    began: float
    received: int = 0
    counted: int = 0
    complete: bool = False
    rejected: bool = False
    wait: asyncio.Timeout | None = None

    def rate(self, now: float) -> float:
        """Return the average bytes per second."""
        return self.received / max(now - self.began, 1e-3)


class BodyBudget:
    """Bounds the bytes of all bodies whose answers have not begun, together.

    Beyond `limit` bytes the slowest unfinished body is rejected, so that clients which stall cannot
    exclude the others. Bodies of `TEXT_BODY_BYTES` or less are exempt; the number of connections
    bounds them.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._bodies: set[_Body] = set()
        self._retry_slots = RetrySlots()

    def add(self, body: _Body, size: int) -> None:
        """Count received bytes; reject one or more bodies, perhaps this one, beyond the limit."""
        body.received += size
        if body.received <= TEXT_BODY_BYTES or body.rejected:
            return
        self._bodies.add(body)
        self._total += body.received - body.counted
        body.counted = body.received
        while self._total > self._limit:
            self._reject(self._slowest(body))

    def release(self, body: _Body) -> None:
        """Stop counting a body."""
        self._bodies.discard(body)
        self._total -= body.counted
        body.counted = 0

    def exceeded(self) -> ApiError:
        """Return the error for a rejected body; each client is told another time to retry."""
        now = asyncio.get_running_loop().time()
        wait_s = self._retry_slots.take(BUDGET_RETRY_S, BUDGET_SPACING_S, now)
        return ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "body_budget_exceeded",
            "the bodies of all unanswered requests together are too large; try again",
            headers=retry_headers(wait_s),
        )

    def _slowest(self, latest: _Body) -> _Body:
        now = asyncio.get_running_loop().time()
        unfinished = (body for body in self._bodies if not body.complete)
        return min(unfinished, key=lambda body: body.rate(now), default=latest)

    def _reject(self, body: _Body) -> None:
        body.rejected = True
        self.release(body)
        if body.wait is not None and not body.wait.expired():
            body.wait.reschedule(asyncio.get_running_loop().time())


class BodyLimit:
    """Bounds a body to `limit` bytes, announced or not, and the time that it takes.

    The reader of the body gets ApiError 413, 408 or, beyond the budget, 429.

    Args:
        limit: bytes.
        timeout_s: seconds between two chunks.
        total_s: seconds for the whole body.
        budget: of all bodies together.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        timeout_s: float,
        total_s: float = math.inf,
        budget: BodyBudget | None = None,
    ) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s, self._total_s = timeout_s, total_s
        self._budget = budget or BodyBudget(limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on with a bounded body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = announced.isdecimal() and int(announced) > self._limit
        body = _Body(asyncio.get_running_loop().time())

        async def receive_bounded() -> Message:
            if body.complete:
                # After the body only the client's disconnect follows; it has no timeout.
                return await receive()
            if too_large:
                raise body_too_large(self._limit)
            message = await self._next(receive, body)
            self._budget.add(body, len(message.get("body", b"")))
            body.complete = not message.get("more_body", False)
            if body.received > self._limit:
                raise body_too_large(self._limit)
            if body.rejected:
                raise self._budget.exceeded()
            return message

        async def send_and_release(message: Message) -> None:
            # The handler has returned, and with it the last reference to the fields.
            self._budget.release(body)
            await send(message)

        try:
            await self._app(scope, receive_bounded, send_and_release)
        finally:
            self._budget.release(body)

    async def _next(self, receive: Receive, body: _Body) -> Message:
        if body.rejected:
            raise self._budget.exceeded()
        last = body.began + self._total_s
        pause_ends = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(min(pause_ends, last)) as body.wait:
                return await receive()
        except TimeoutError:
            if body.rejected:
                raise self._budget.exceeded() from None
            raise body_too_slow(
                f"no data of the body arrived for {self._timeout_s:g} s"
                if pause_ends < last
                else f"the body took longer than {self._total_s:g} s"
            ) from None
        finally:
            body.wait = None


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


class ClientStalledError(Exception):
    """The client did not take its answer in time; its connection was aborted."""


@dataclass(eq=False, slots=True)
class _Answer:
    """An answer that the client has not taken completely.

    Attributes:
        transport: of the connection, None if the server does not give it.
        bytes: of the body, as far as the application has made it.
        moved_at: `time.monotonic()` at which the client last took a piece.
    """

    transport: asyncio.Transport | None
    bytes: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    aborted: bool = False

    def abort(self) -> None:
        """Close the connection without waiting for the client to read."""
        self.aborted = True
        if self.transport is not None:
            self.transport.abort()


class SendTimeout:
    """Sends answers in pieces, each of which the client must take within `timeout_s`.

    An application's last `send` returns when the client's system has all bytes, so whatever the
    application holds for a request is held until then. All answers together may have `budget`
    bytes; beyond it, the answer that has waited longest for its client is aborted.

    The server must pause `send` while bytes are unsent (`uvicorn_server.BoundedProtocol`).
    """

    def __init__(self, app: ASGIApp, timeout_s: float, budget: int) -> None:
        self._app = app
        self._timeout_s, self._budget = timeout_s, budget
        self._answers: set[_Answer] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on. Raises ClientStalledError."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with self._answer(scope) as answer:

            async def send_in_pieces(message: Message) -> None:
                for piece in self._pieces(answer, message):
                    await self._send(answer, send, piece)

            await self._app(scope, receive, send_in_pieces)

    @asynccontextmanager
    async def _answer(self, scope: Scope) -> AsyncIterator[_Answer]:
        answer = _Answer(scope.get(TRANSPORT))
        self._answers.add(answer)
        try:
            yield answer
        except BaseException:
            # The rest of a broken answer is of no use, and its client may never read it.
            answer.abort()
            raise
        finally:
            self._answers.discard(answer)

    def _pieces(self, answer: _Answer, message: Message) -> Iterable[Message]:
        if message["type"] != "http.response.body":
            yield message
            return
        body, held = message.get("body", b""), message.get(HELD_BYTES, 0)
        answer.bytes += len(body) + held
        self._enforce_budget()
        for offset in range(0, len(body), PIECE_BYTES):
            piece = body[offset : offset + PIECE_BYTES]
            yield {"type": message["type"], "body": piece, "more_body": True}
            answer.bytes -= len(piece)
        answer.bytes -= held
        if not message.get("more_body", False):
            yield {"type": message["type"], "body": b"", "more_body": False}

    def _enforce_budget(self) -> None:
        while sum(answer.bytes for answer in self._answers) > self._budget:
            stalest = min(self._answers, key=lambda answer: answer.moved_at)
            self._answers.discard(stalest)
            stalest.abort()

    async def _send(self, answer: _Answer, send: Send, message: Message) -> None:
        answer.moved_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                await send(message)
        except TimeoutError:
            answer.abort()
        if answer.aborted:
            # The server learns of the lost connection before the end of the request.
            await asyncio.sleep(0)
            raise ClientStalledError


# ── compression ───────────────────────────────────────────────────────────────────────────────────


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
    weights = {}
    for entry in header.split(","):
        coding, *options = (part.strip().lower() for part in entry.split(";"))
        weight = next((option[2:] for option in options if option.startswith("q=")), "1")
        weights[coding] = _weight(weight)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


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
