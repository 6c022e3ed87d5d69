"""Requests that are being worked on: each under its X-Request-Id, and ended early when its client goes away or somebody deletes it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from server.api.errors import ApiError, cancelled, client_closed
from server.api.schemas import ErrorAnswer
from server.api.state import client_of, request_id_of, state_of

router = APIRouter(tags=["operations"])

Result = TypeVar("Result")


@router.delete(
    "/requests/{id}",
    status_code=204,
    summary="Cancel a running request",
    response_class=Response,
    responses={204: {"description": "Its rows leave at the next step"}, 404: {"description": "No such request", "model": ErrorAnswer}},
)
async def delete_request(request: Request, id: str) -> Response:
    """id: the X-Request-Id the client sent with it, and the same API key. Several requests of one id are all cancelled."""
    if not (running := state_of(request).running.get((client_of(request), id))):
        raise ApiError(HTTPStatus.NOT_FOUND, "request_not_found", "no request with this id is running", "id")
    for ended in running:
        if not ended.done():
            ended.set_result(cancelled())
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def unless_cancelled(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits the work, or cancels it and raises ApiError 499 when the client goes away or the request is deleted first."""
    task = asyncio.create_task(work)
    running, id = state_of(request).running, (client_of(request), request_id_of(request))
    ended: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
    gone = asyncio.create_task(_disconnection(request))
    running.setdefault(id, []).append(ended)
    events: tuple[asyncio.Future[Any], ...] = (task, ended, gone)
    try:
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ended.result() if ended.done() else client_closed()
        return task.result()
    finally:
        running[id].remove(ended)
        if not running[id]:
            del running[id]
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
