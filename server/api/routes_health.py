"""What operators and their machines ask: alive, ready, measured."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.errors import NOT_READY, ApiError
from server.api.schemas import ErrorAnswer
from server.api.state import state_of

router = APIRouter(tags=["operations"])
PATHS = ("/healthz", "/readyz", "/metrics")


@router.get("/healthz", summary="Process alive", responses={200: {"content": {"application/json": {"example": {"status": "alive"}}}}})
async def healthz() -> Response:
    return JSONResponse({"status": "alive"})


@router.get(
    "/readyz",
    summary="Worker warm, stepping and accepting",
    responses={
        200: {"content": {"application/json": {"example": {"status": "ready", "device": "cpu", "dtype": "float32", "models": ["tiny"]}}}},
        503: {"description": "Not ready, with the reason", "model": ErrorAnswer},
    },
)
async def readyz(request: Request) -> Response:
    state = state_of(request)
    status = state.engine.status()
    if not status.ready:
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, NOT_READY, status.reason)
    answer: dict[str, Any] = {"status": "ready", "device": status.device, "dtype": status.dtype, "models": list(state.models)}
    return JSONResponse(answer)


@router.get("/metrics", summary="Prometheus figures", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    content, media_type = state_of(request).metrics.render(request.headers.get("accept", ""))
    return Response(content, media_type=media_type)
