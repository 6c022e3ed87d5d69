"""`GET /v1/models`: the loaded weights, what they can do and how large, as OpenAI's clients list them, and more."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from model.config import BundleConfig
from server.api.errors import ApiError
from server.api.schemas import ErrorAnswer
from server.api.state import AppState, state_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="The loaded weights, the default first")
async def list_models(request: Request) -> Response:
    state = state_of(request)
    return JSONResponse({"object": "list", "data": [describe(config, state) for config in state.models.values()]})


@router.get(
    "/v1/models/{name}", summary="One of the loaded weights", responses={404: {"description": "No such weights", "model": ErrorAnswer}}
)
async def show_model(request: Request, name: str) -> Response:
    state = state_of(request)
    return JSONResponse(describe(model_named(name, state.models), state))


def model_asked(name: str | None, models: dict[str, BundleConfig]) -> BundleConfig:
    """The default if none is named. Raises ApiError for weights that are not loaded."""
    return next(iter(models.values())) if name is None else model_named(name, models)


def model_named(name: str, models: dict[str, BundleConfig]) -> BundleConfig:
    """Raises ApiError for weights that are not loaded."""
    if name not in models:
        message = f"model: no such weights; there are {', '.join(models)} (sent: {name[:80]!r})"
        raise ApiError(HTTPStatus.NOT_FOUND, "model_not_found", message, "model")
    return models[name]


def describe(config: BundleConfig, state: AppState) -> dict[str, Any]:
    """OpenAI's fields, then ours. Sizes are [width, height] in pixels; prompts are cut at what `text` says each encoder takes."""
    step = config.size_step
    return {
        "id": config.name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "paellera",
        "family": config.family,
        "sha256": config.sha256,
        "native_size": list(config.native_size),
        "limits": {
            "size_step": step,
            "min_side": config.smallest_side,
            "max_side": state.settings.max_side // step * step,
            "max_request_work": state.settings.max_request_work,
            "text": config.text_limits,
        },
        "capabilities": {"operations": list(config.operations), "samplers": list(config.samplers), "networks": list(config.networks)},
        "recipe": asdict(config.recipe),
    }
