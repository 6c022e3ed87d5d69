"""Send answers in pieces within a timeout each, and bound the bytes of all unread answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ClientStalledError

# The scope's key for the connection's transport, where the server gives it.
TRANSPORT = "paellera.transport"
# A message's key for the bytes that are in memory beside its body until the body is sent.
HELD_BYTES = "paellera.held_bytes"
# A client must take one piece of an answer within the send timeout, whatever the answer's length.
PIECE_BYTES = 64 * 1024


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

    The server must pause `send` while bytes are unsent (`http_protocol.BoundedProtocol`).
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
