"""Server-sent events: a bounded queue per client, heartbeat, cancellation.

Events that wait for a slow client are bounded: a new preview replaces an older one of the same
image, and files are encoded only when it is their turn.
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

from server.api.errors import ApiError, from_engine, internal_error
from server.api.state import REQUEST_STATE, app_state, request_state, unless_cancelled
from server.engine.errors import EngineError
from server.settings import Settings

log = logging.getLogger(__name__)

# Previews kept for a client that is only a moment behind; beyond them, the latest of each image.
MAX_PREVIEWS = 16


@dataclass(frozen=True, slots=True)
class Event:
    """A named event. data: becomes JSON, on one line."""

    name: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        """Return the event as sent."""
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment: clients ignore it, proxies see traffic."""

    text: str

    def encode(self) -> bytes:
        """Return the comment as sent."""
        return f": {self.text}\n\n".encode()


@dataclass(frozen=True, slots=True)
class DeferredEvent:
    """An event made in a thread when the client takes it.

    Attributes:
        make: returns the event.
        preview_of: index of the image it previews; None for an event that is never dropped.
    """

    make: Callable[[], Event]
    preview_of: int | None = None

    def encode(self) -> bytes:
        """Make the event and return it as sent."""
        return self.make().encode()


Item = Event | Comment | DeferredEvent
Emit = Callable[[Item], None]
HEARTBEAT = Comment("heartbeat")


class EventQueue:
    """Items that the client has not taken.

    Holds at most `MAX_PREVIEWS` previews plus one per image, and any number of other items.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, item: Item) -> None:
        """Append an item; a preview may replace an older one of the same image."""
        if isinstance(item, DeferredEvent) and item.preview_of is not None:
            self._drop_older_preview(item.preview_of)
        self._items.append(item)
        self._changed.set()

    def close(self) -> None:
        """Mark the end: no more items follow."""
        self._closed = True
        self._changed.set()

    async def get(self, timeout_s: float | None = None) -> Item | None:
        """Return the next item, None at the end. Raises TimeoutError if none arrives in time."""
        async with asyncio.timeout(timeout_s):
            await self.wait()
        return self._items.popleft() if self._items else None

    async def wait(self) -> bool:
        """Wait until there is an item (True), or the queue is closed and empty (False)."""
        while not self._items and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return bool(self._items)

    def _drop_older_preview(self, image: int) -> None:
        previews = [
            item
            for item in self._items
            if isinstance(item, DeferredEvent) and item.preview_of is not None
        ]
        older = next((item for item in previews if item.preview_of == image), None)
        if len(previews) >= MAX_PREVIEWS and older is not None:
            self._items.remove(older)


async def stream_events(
    request: Request, work: Callable[[Emit], Coroutine[Any, Any, None]]
) -> Response:
    """Return a stream of the events that `work` emits.

    An exception before the first event becomes the answer's own status, later an event `error`.
    """
    queue = EventQueue()
    task = asyncio.create_task(unless_cancelled(request, work(queue.put)))
    task.add_done_callback(lambda _: queue.close())
    if await queue.wait():
        settings = app_state(request).settings
        return EventStream(queue, task, settings, request_state(request).id)
    await task
    return Response(status_code=204)


class EventStream(Response):
    """Sends the queue's events until `work` is done.

    `send_timeout.SendTimeout` disconnects a client that takes nothing; that cancels `work`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, queue: EventQueue, work: asyncio.Task[None], settings: Settings, request_id: str
    ) -> None:
        # Response's own __init__ would announce a body of 0 bytes.
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._queue, self._work = queue, work
        self._settings, self._request_id = settings, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            await send(start)
            async for chunk in self._chunks(scope):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._work.cancel()

    async def _chunks(self, scope: Scope) -> AsyncIterator[bytes]:
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
            await self._work
        except Exception as error:
            answer = self._answer_of(error)
            if REQUEST_STATE in scope:
                request_state(scope).error_code = answer.code
            yield Event("error", {"error": answer.body}).encode()

    async def _next(self) -> bytes | None:
        try:
            item = await self._queue.get(self._settings.heartbeat_s)
        except TimeoutError:
            return HEARTBEAT.encode()
        if isinstance(item, DeferredEvent):
            return await asyncio.to_thread(item.encode)
        return None if item is None else item.encode()

    def _answer_of(self, error: Exception) -> ApiError:
        match error:
            case ApiError():
                return error
            case EngineError():
                return from_engine(error)
        fields = {"request_id": self._request_id}
        log.error("unhandled exception", exc_info=error, extra={"fields": fields})
        return internal_error()
