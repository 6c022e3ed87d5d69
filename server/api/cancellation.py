"""Running requests: registered by id, and ended when the client disconnects or deletes them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from server.api.errors import ApiError, cancelled, client_closed
from server.api.schemas import ErrorAnswer
from server.api.state import app_state, request_state, running_key

router = APIRouter(tags=["requests"])

Result = TypeVar("Result")


@router.delete(
    "/requests/{id}",
    status_code=204,
    summary="Cancel a running request",
    response_class=Response,
    responses={
        204: {"description": "Cancelled; its rows leave at the next step"},
        404: {"description": "No such request", "model": ErrorAnswer},
    },
)
async def delete_request(request: Request, id: str) -> Response:
    """Cancel all running requests of the caller's API key with this `X-Request-Id`."""
    client = request_state(request).client or ""
    if not (running := app_state(request).running.get((client, id))):
        message = "no request with this id is running"
        raise ApiError(HTTPStatus.NOT_FOUND, "request_not_found", message, "id")
    for ended in running:
        if not ended.done():
            ended.set_result(cancelled())
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def unless_cancelled(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, or cancel it when the request ends first.

    Raises:
        ApiError: 499, the client disconnected or the request was deleted.
    """
    task = asyncio.create_task(work)
    running, key = app_state(request).running, running_key(request)
    ended: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
    disconnected = asyncio.create_task(_disconnection(request))
    running.setdefault(key, []).append(ended)
    events: tuple[asyncio.Future[Any], ...] = (task, ended, disconnected)
    try:
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ended.result() if ended.done() else client_closed()
        return task.result()
    finally:
        running[key].remove(ended)
        if not running[key]:
            del running[key]
        disconnected.cancel()
        task.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
