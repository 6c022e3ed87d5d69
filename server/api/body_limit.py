"""Bounds on request bodies in transit: their bytes, their time, and all of them together.

docs/limits.md lists the bounds.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, retry_headers
from server.engine.retry_slots import RetrySlots

# Bodies of text alone are shorter, unless their prompts are far beyond what encoders read. Parsing
# megabytes of brackets would block the event loop for seconds.
TEXT_BODY_BYTES = 128 * 1024

# How long others' bodies take is unknown here, seconds.
BUDGET_RETRY_S = 1.0
BUDGET_SPACING_S = 0.25


def body_too_large(limit: int) -> ApiError:
    """Return the error for a body beyond `limit` bytes."""
    message = f"the body may have at most {limit} bytes"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large", message)


def body_too_slow(message: str) -> ApiError:
    """Return the error for a body that did not arrive in time."""
    # On a kept connection, the rest of the body would be taken for the next request.
    headers = {"Connection": "close"}
    return ApiError(HTTPStatus.REQUEST_TIMEOUT, "body_too_slow", message, headers=headers)


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
