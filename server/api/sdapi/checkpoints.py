"""The loaded weights as checkpoints, and the client's choice among them."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from model.config import BundleConfig
from server.api.body import read_body
from server.api.errors import invalid_value
from server.api.planning.draft import find_model
from server.api.sdapi.clients import clients_of
from server.api.sdapi.errors import as_sent
from server.api.sdapi.schemas import OptionsRequest
from server.api.state import app_state, owner_of, request_state

HASH_DIGITS = 10


def find_checkpoint(request: Request, sent: object) -> BundleConfig:
    """Return the weights of a checkpoint's name, title or hash.

    sent: None is the one that the client chose, or the default. Raises ApiError 404, or 422 for no
    text, about `model`.
    """
    state = app_state(request)
    if sent is None:
        sent = clients_of(request).chosen(owner_of(request))
    if sent is None:
        return find_model(None, state.models, state.settings.aliases)
    if not isinstance(sent, str):
        raise invalid_value("model", "must be the name of a model", sent)
    for config in state.models.values():
        known = (config.name, _title(config), config.sha256, short_hash(config))
        if sent.lower() in [name.lower() for name in known]:
            return config
    name = sent.partition(" [")[0].removesuffix(".safetensors").removesuffix(".ckpt")
    return find_model(name, state.models, state.settings.aliases)


def short_hash(config: BundleConfig) -> str:
    """Return the first digits of the weights' hash, by which clients know them."""
    return config.sha256[:HASH_DIGITS]


def _title(config: BundleConfig) -> str:
    return f"{config.name} [{short_hash(config)}]"


async def options(request: Request) -> Response:
    """Return the options that clients read."""
    config = find_checkpoint(request, None)
    return JSONResponse(
        {
            "sd_model_checkpoint": _title(config),
            "sd_checkpoint_hash": config.sha256,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "enable_pnginfo": True,
            "samples_format": "png",
            "live_previews_enable": True,
            "live_previews_image_format": "png",
        }
    )


async def set_options(request: Request) -> Response:
    """Choose the model of this client's next requests; ignore all other options."""
    fields = await read_body(request, OptionsRequest, app_state(request).settings.max_body_bytes)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    if fields.sd_model_checkpoint is not None:
        with as_sent(fields.sent_names):
            chosen = find_checkpoint(request, fields.sd_model_checkpoint)
        clients_of(request).choose(owner_of(request), chosen.name)
    return JSONResponse(None)


async def sd_models(request: Request) -> Response:
    """Return the loaded weights."""
    return JSONResponse(
        [
            {
                "title": _title(config),
                "model_name": config.name,
                "hash": short_hash(config),
                "sha256": config.sha256,
                "filename": config.name,
                "config": None,
            }
            for config in app_state(request).models.values()
        ]
    )


async def samplers(request: Request) -> Response:
    """Return the samplers of the client's model, the recipe's first."""
    config = find_checkpoint(request, None)
    names = sorted(config.samplers, key=lambda name: name != config.recipe.sampler)
    return JSONResponse([{"name": name, "aliases": [], "options": {}} for name in names])
