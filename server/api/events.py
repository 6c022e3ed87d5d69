"""Answers that arrive bit by bit: server-sent events, ended early when the client goes away or the request is deleted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from server.api.errors import ApiError, from_engine, internal_error
from server.api.requests import unless_cancelled
from server.engine.errors import EngineError


@dataclass(frozen=True, slots=True)
class Event:
    """name: what clients listen for. data: becomes JSON, on one line."""

    name: str
    data: dict[str, Any]

    def encode(self) -> bytes:
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n".encode()


Emit = Callable[[Event], None]


async def streamed(request: Request, work: Callable[[Emit], Coroutine[Any, Any, None]]) -> Response:
    """The events that `work` emits. What it raises before the first is the answer's own status, and afterwards an event `error`."""
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    task = asyncio.create_task(unless_cancelled(request, work(events.put_nowait)))
    task.add_done_callback(lambda _: events.put_nowait(None))
    first = await events.get()
    if first is None:
        await task
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_bytes(first, events, task), media_type="text/event-stream", headers=headers)


async def _bytes(first: Event, events: asyncio.Queue[Event | None], task: asyncio.Task[None]) -> AsyncIterator[bytes]:
    event: Event | None = first
    try:
        while event is not None:
            yield event.encode()
            event = await events.get()
        if (error := task.exception()) is not None:
            yield _failure(error).encode()
    finally:
        task.cancel()


def _failure(error: BaseException) -> Event:
    match error:
        case ApiError():
            answer = error
        case EngineError():
            answer = from_engine(error)
        case _:
            answer = internal_error()
    return Event("error", {"error": answer.body})
