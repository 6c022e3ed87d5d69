"""`GET /v1/models`: the loaded weights, their capabilities and limits, for OpenAI's clients."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from model.config import BundleConfig
from server.api.planning import find_model
from server.api.schemas import ErrorAnswer
from server.api.state import AppState, app_state

router = APIRouter(tags=["models"])


class ModelLimits(BaseModel):
    """Limits of requests. Sizes are in pixels.

    text: units of a prompt that each encoder reads, end marks included; the rest is truncated.
    """

    size_step: Annotated[int, Field(description="Widths and heights are multiples of it")]
    min_side: int
    max_side: int
    max_request_work: Annotated[
        int, Field(description="Images times steps times pixels times branches of one request")
    ]
    text: dict[str, int]


class ModelEntry(BaseModel):
    """OpenAI's fields, then extensions."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="Start of this server, in Unix seconds")]
    owned_by: str = "paellera"
    family: str
    sha256: str
    native_size: Annotated[tuple[int, int], Field(description="[width, height] in pixels")]
    limits: ModelLimits
    capabilities: Annotated[
        dict[str, list[str]], Field(description="Operations, samplers and networks, by name")
    ]
    recipe: Annotated[dict[str, Any], Field(description="Defaults of a request's absent fields")]


class ModelList(BaseModel):
    """OpenAI's list."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


SHOW_MODEL = "show_model"
DEFAULT_LINK = {
    "default": {
        "operationId": SHOW_MODEL,
        "parameters": {"name": "$response.body#/data/0/id"},
    }
}


@router.get(
    "/v1/models",
    summary="The loaded weights, the default first",
    responses={200: {"links": DEFAULT_LINK}},
)
async def list_models(request: Request) -> ModelList:
    """Return all loaded weights."""
    state = app_state(request)
    return ModelList(data=[describe(config, state) for config in state.models.values()])


@router.get(
    "/v1/models/{name}",
    summary="One of the loaded weights",
    operation_id=SHOW_MODEL,
    responses={404: {"description": "Unknown weights", "model": ErrorAnswer}},
)
async def show_model(request: Request, name: str) -> ModelEntry:
    """Return the loaded weights of this name."""
    state = app_state(request)
    return describe(find_model(name, state.models), state)


def describe(config: BundleConfig, state: AppState) -> ModelEntry:
    """Return the capabilities of the weights within this server's limits."""
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
        capabilities={
            "operations": list(config.operations),
            "samplers": list(config.samplers),
            "networks": list(config.networks),
        },
        recipe=asdict(config.recipe),
    )
