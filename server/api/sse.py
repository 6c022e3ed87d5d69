"""Answers that arrive bit by bit: server-sent events, ended early when the reader goes away or takes no more, or the request is deleted.

What a reader has not taken yet is bounded: previews give way to later ones of the same picture, and files are made when it is their turn.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from server.api.cancellation import unless_cancelled
from server.api.errors import ApiError, from_engine, internal_error
from server.api.state import request_id_of, state_of
from server.engine.errors import EngineError
from server.settings import Settings

log = logging.getLogger(__name__)

# Previews that wait for a reader who is only a moment behind; beyond them, the latest of each picture.
PREVIEWS = 16
# A reader takes at least one of these in `send_timeout_s`, whatever an event's length: bytes.
PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """name: what clients listen for. data: becomes JSON, on one line."""

    name: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Comment:
    """What clients ignore, but proxies see."""

    text: str

    def encode(self) -> bytes:
        return f": {self.text}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Later:
    """An event that is made, in a thread, when its reader is there to take it. preview_of: a picture's index; None, it is never dropped."""

    make: Callable[[], Event]
    preview_of: int | None = None

    def encode(self) -> bytes:
        return self.make().encode()


Item = Event | Comment | Later
Emit = Callable[[Item], None]
HEARTBEAT = Comment("still there")


class Outbox:
    """What a reader has not taken yet: at most `PREVIEWS` previews and one of each picture, and all that is no preview."""

    def __init__(self) -> None:
        self._waiting: deque[Item] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, item: Item) -> None:
        if isinstance(item, Later) and item.preview_of is not None:
            self._make_room(item.preview_of)
        self._waiting.append(item)
        self._changed.set()

    def close(self) -> None:
        """Nothing more is put."""
        self._closed = True
        self._changed.set()

    async def take(self, patience_s: float | None = None) -> Item | None:
        """The next; None if there will be none. Raises TimeoutError if there is none for so long."""
        async with asyncio.timeout(patience_s):
            await self.wait()
        return self._waiting.popleft() if self._waiting else None

    async def wait(self) -> bool:
        """Until there is something to take, or never will be: False."""
        while not self._waiting and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return bool(self._waiting)

    def _make_room(self, picture: int) -> None:
        previews = [item for item in self._waiting if isinstance(item, Later) and item.preview_of is not None]
        earlier = next((item for item in previews if item.preview_of == picture), None)
        if len(previews) >= PREVIEWS and earlier is not None:
            self._waiting.remove(earlier)


async def streamed(request: Request, work: Callable[[Emit], Coroutine[Any, Any, None]]) -> Response:
    """The events that `work` emits. What it raises before the first is the answer's own status, and afterwards an event `error`."""
    outbox = Outbox()
    task = asyncio.create_task(unless_cancelled(request, work(outbox.put)))
    task.add_done_callback(lambda _: outbox.close())
    if await outbox.wait():
        return EventStream(outbox, task, state_of(request).settings, request_id_of(request))
    await task
    return Response(status_code=204)


class EventStream(Response):
    """Sends what is in the outbox until `work` is through. A reader that takes nothing for `send_timeout_s` loses the connection."""

    media_type = "text/event-stream"

    def __init__(self, outbox: Outbox, work: asyncio.Task[None], settings: Settings, request_id: str) -> None:
        # Without Response's own, which would announce a body of no bytes.
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._outbox, self._work, self._settings, self._request_id = outbox, work, settings, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._chunks():
                for start in range(0, len(chunk), PIECE):
                    await self._send(send, chunk[start : start + PIECE], more=True)
            await self._send(send, b"", more=False)
        except TimeoutError:
            # The server closes the connection of an answer that has no end.
            log.warning("a reader takes nothing", extra={"fields": {"request_id": self._request_id}})
        finally:
            self._work.cancel()

    async def _send(self, send: Send, body: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._settings.send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
            await self._work
        except Exception as error:
            yield self._failure(error).encode()

    async def _next(self) -> bytes | None:
        try:
            item = await self._outbox.take(self._settings.heartbeat_s)
        except TimeoutError:
            return HEARTBEAT.encode()
        if isinstance(item, Later):
            return await asyncio.to_thread(item.encode)
        return None if item is None else item.encode()

    def _failure(self, error: Exception) -> Event:
        match error:
            case ApiError():
                answer = error
            case EngineError():
                answer = from_engine(error)
            case _:
                log.error("unhandled", exc_info=error, extra={"fields": {"request_id": self._request_id}})
                answer = internal_error()
        return Event("error", {"error": answer.body})
