"""`GET /v1/models`: the loaded weights, their capabilities and limits, for OpenAI's clients."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from model.config import Preset
from server.api.planning.draft import ANY_NAME, find_model
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
        int,
        Field(
            description="Maximum per request: images times pixels times (steps times branches, plus"
            " decoding and file)"
        ),
    ]
    text: dict[str, int]


class PresetEntry(BaseModel):
    """A preset of the weights."""

    recipe: Annotated[dict[str, Any], Field(description="Defaults of a request's absent fields")]
    steps: Annotated[
        tuple[int, int], Field(description="Fewest and most denoising steps of the preset")
    ]
    guided: Annotated[
        bool, Field(description="Whether the preset has guidance and negative prompts")
    ]
    denoiser: Annotated[str, Field(description="Network that takes the preset's steps")]


class ModelEntry(BaseModel):
    """OpenAI's fields, then extensions."""

    id: str
    alias_of: Annotated[str | None, Field(description="Weights that this name stands for")] = None
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
    recipe: Annotated[dict[str, Any], Field(description="Recipe of the default preset")]
    presets: Annotated[
        dict[str, PresetEntry], Field(description="By the names for the field `preset`")
    ]
    default_preset: Annotated[str, Field(description="Preset of a request that names none")]


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
    summary="The loaded weights, the default first, then their aliases",
    responses={200: {"links": DEFAULT_LINK}},
)
async def list_models(request: Request) -> ModelList:
    """Return all loaded weights, and their aliases except `*`."""
    state = app_state(request)
    names = [*state.models, *(name for name in state.settings.aliases if name != ANY_NAME)]
    return ModelList(data=[describe(name, state) for name in names])


@router.get(
    "/v1/models/{name:path}",
    summary="One of the loaded weights",
    operation_id=SHOW_MODEL,
    responses={404: {"description": "Unknown weights", "model": ErrorAnswer}},
)
async def show_model(request: Request, name: str) -> ModelEntry:
    """Return the loaded weights of this name or alias."""
    return describe(name, app_state(request))


def describe(name: str, state: AppState) -> ModelEntry:
    """Return the capabilities of the weights within this server's limits.

    name: of the weights, or an alias. Raises ApiError 404.
    """
    config = find_model(name, state.models, state.settings.aliases)
    step = config.size_step
    return ModelEntry(
        id=name,
        alias_of=None if name == config.name else config.name,
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
            "networks": list(config.network_names),
        },
        recipe=asdict(config.preset(config.default_preset).recipe),
        presets={name: _preset_entry(config.preset(name)) for name in config.preset_names},
        default_preset=config.default_preset,
    )


def _preset_entry(preset: Preset) -> PresetEntry:
    return PresetEntry(
        recipe=asdict(preset.recipe),
        steps=preset.steps,
        guided=preset.guided,
        denoiser=preset.network,
    )
