"""`GET /v1/models`: the loaded weights, what they can do and how large, as OpenAI's clients list them, and more."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from model.config import BundleConfig
from server.api.errors import ApiError
from server.api.schemas import ErrorAnswer
from server.api.state import AppState, state_of

router = APIRouter(tags=["models"])


class ModelLimits(BaseModel):
    """Sizes are in pixels. text: how much of a prompt each encoder reads, end marks included; the rest is cut."""

    size_step: Annotated[int, Field(description="Widths and heights are multiples of it")]
    min_side: int
    max_side: int
    max_request_work: Annotated[int, Field(description="Images times steps times pixels times branches of one request")]
    text: dict[str, int]


class ModelEntry(BaseModel):
    """OpenAI's fields, then ours."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="When this server started, in seconds since 1970")]
    owned_by: str = "paellera"
    family: str
    sha256: str
    native_size: Annotated[tuple[int, int], Field(description="[width, height] in pixels")]
    limits: ModelLimits
    capabilities: Annotated[dict[str, list[str]], Field(description="Operations, samplers and networks, by name")]
    recipe: Annotated[dict[str, Any], Field(description="What absent fields of a request follow")]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


SHOW_MODEL = "show_model"


@router.get(
    "/v1/models",
    summary="The loaded weights, the default first",
    responses={200: {"links": {"default": {"operationId": SHOW_MODEL, "parameters": {"name": "$response.body#/data/0/id"}}}}},
)
async def list_models(request: Request) -> ModelList:
    state = state_of(request)
    return ModelList(data=[describe(config, state) for config in state.models.values()])


@router.get(
    "/v1/models/{name}",
    summary="One of the loaded weights",
    operation_id=SHOW_MODEL,
    responses={404: {"description": "No such weights", "model": ErrorAnswer}},
)
async def show_model(request: Request, name: str) -> ModelEntry:
    state = state_of(request)
    return describe(model_named(name, state.models), state)


def model_asked(name: str | None, models: dict[str, BundleConfig]) -> BundleConfig:
    """The default if none is named. Raises ApiError for weights that are not loaded."""
    return next(iter(models.values())) if name is None else model_named(name, models)


def model_named(name: str, models: dict[str, BundleConfig]) -> BundleConfig:
    """Raises ApiError for weights that are not loaded."""
    if name not in models:
        message = f"model: no such weights; there are {', '.join(models)} (sent: {name[:80]!r})"
        raise ApiError(HTTPStatus.NOT_FOUND, "model_not_found", message, "model")
    return models[name]


def describe(config: BundleConfig, state: AppState) -> ModelEntry:
    """What these weights are and can do, in this server's limits."""
    step = config.size_step
    return ModelEntry(
        id=config.name,
        created=state.started_at,
        family=config.family,
        sha256=config.sha256,
        native_size=config.native_size,
        limits=ModelLimits(
            size_step=step,
            min_side=config.smallest_side,
            max_side=state.settings.max_side // step * step,
            max_request_work=state.settings.max_request_work,
            text=config.text_limits,
        ),
        capabilities={"operations": list(config.operations), "samplers": list(config.samplers), "networks": list(config.networks)},
        recipe=asdict(config.recipe),
    )
