"""Probes and metrics: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.errors import NOT_READY, ApiError
from server.api.schemas import ErrorAnswer
from server.api.state import app_state

router = APIRouter(tags=["health"])

ALIVE = {"status": "alive"}
READY = {"status": "ready", "device": "cpu", "dtype": "float32", "models": ["tiny"]}


ALIVE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"example": ALIVE}}}
}


@router.get("/health", name="health", summary="The same as /healthz", responses=ALIVE_RESPONSES)
@router.get("/healthz", summary="Liveness probe: the process answers", responses=ALIVE_RESPONSES)
async def healthz() -> Response:
    """Return 200 while the process runs."""
    return JSONResponse(ALIVE)


@router.get(
    "/readyz",
    summary="Readiness probe: a worker is warm and accepts requests",
    responses={
        200: {"content": {"application/json": {"example": READY}}},
        503: {"description": "Not ready, with the reason", "model": ErrorAnswer},
    },
)
async def readyz(request: Request) -> Response:
    """Return 200 while a worker is ready, otherwise 503 with the reason."""
    state = app_state(request)
    if state.stopping.is_set():
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, NOT_READY, "the server is stopping")
    status = state.engine.status()
    if not status.ready:
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, NOT_READY, status.reason)
    answer: dict[str, Any] = {
        "status": "ready",
        "device": status.device,
        "dtype": status.dtype,
        "models": list(state.models),
    }
    if state.settings.exposure is not None:
        answer["warnings"] = [state.settings.exposure]
    return JSONResponse(answer)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """Return all metrics in the format that the client accepts."""
    accept = request.headers.get("accept", "")
    content, media_type = app_state(request).metrics.render(accept)
    return Response(content, media_type=media_type)
