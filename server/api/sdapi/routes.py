"""The table of AUTOMATIC1111's endpoints, and those that need few lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.api.body import JSON, read_body
from server.api.errors import ApiError
from server.api.images.admission import Uploads
from server.api.images.infotext import png_texts, read_infotext
from server.api.openapi import (
    describe_answers,
    describe_error,
    describe_errors,
    describe_json_body,
)
from server.api.sdapi.checkpoints import options, samplers, sd_models, set_options
from server.api.sdapi.clients import Clients
from server.api.sdapi.extras import extra_batch_images, extra_single_image
from server.api.sdapi.generation import drawing_endpoint
from server.api.sdapi.progress import interrupt, progress
from server.api.sdapi.schemas import (
    ExtraAnswer,
    ExtraBatchAnswer,
    ExtraBatchImagesRequest,
    ExtraSingleImageRequest,
    Img2ImgRequest,
    OptionsRequest,
    PngInfoAnswer,
    PngInfoRequest,
    SdAnswer,
    Txt2ImgRequest,
)
from server.api.state import app_state, request_state, unless_cancelled
from server.memory import resident_bytes

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"])
DRAWING_PATHS = tuple(
    f"{router.prefix}{path}"
    for path in ("/txt2img", "/img2img", "/extra-single-image", "/extra-batch-images")
)


def include(app: FastAPI) -> None:
    """Add the endpoints, and the state of their clients, to an app."""
    app.state.sdapi = Clients()
    app.include_router(router)


async def interrogate(_: Request) -> Response:
    """Refuse the request. Raises ApiError 400."""
    message = "this server draws images and has no model that describes them"
    raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_operation", message)


async def png_info(request: Request) -> Response:
    """Return the texts in a PNG, and the parameters among them by name."""
    state = app_state(request)
    fields = await read_body(request, PngInfoRequest, state.settings.max_body_bytes)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    deadline = time.monotonic() + state.settings.timeout_s

    def work(_: Uploads) -> dict[str, Any]:
        texts = png_texts(fields.image)
        text = texts.get("parameters", "")
        return {"info": text, "items": texts, "parameters": read_infotext(text)}

    files = [("image", fields.image)]
    info = await unless_cancelled(request, state.decoder.run(work, files, deadline))
    # Not Starlette's, which fails for half of a surrogate pair.
    return Response(json.dumps(info), media_type=JSON)


async def memory(request: Request) -> Response:
    """Return this process's memory and that of the machine, in bytes."""
    used = resident_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ram = {"free": total - used, "used": used, "total": total}
    return JSONResponse({"ram": ram, "cuda": {"error": "see /metrics for the workers' memory"}})


def _upscaler(name: str) -> dict[str, Any]:
    nowhere = {"model_name": None, "model_path": None, "model_url": None}
    return {"name": name, **nowhere, "scale": 4}


SCHEDULER = {
    "name": "automatic",
    "label": "Automatic",
    "aliases": None,
    "default_rho": -1.0,
    "need_inner_model": False,
}
# Answers that never change, by path.
FIXED: dict[str, object] = {
    "/schedulers": [SCHEDULER],
    "/upscalers": [_upscaler(name) for name in ("None", "Lanczos", "Nearest", "Paella")],
    "/latent-upscale-modes": [{"name": "Paella"}],
    "/sd-vae": [],
    "/loras": [],
    "/embeddings": {"loaded": {}, "skipped": {}},
    "/hypernetworks": [],
    "/face-restorers": [],
    "/realesrgan-models": [],
    "/prompt-styles": [],
    "/scripts": {"txt2img": [], "img2img": []},
    "/script-info": [],
    "/extensions": [],
    "/cmd-flags": {"api": True, "nowebui": True},
}


# Weights, VAEs and LoRAs are found and loaded at the start: nothing changes.
WITHOUT_EFFECT = (
    "/refresh-checkpoints",
    "/refresh-vae",
    "/refresh-loras",
    "/reload-checkpoint",
    "/unload-checkpoint",
)


def _fixed(answer: object) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(_: Request) -> Response:
        return JSONResponse(answer)

    return endpoint


# ── routes ────────────────────────────────────────────────────────────────────────────────────────


def _post(
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    summary: str,
    schema: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    status: int = 200,
) -> None:
    errors = describe_errors() if schema else describe_error(status) if status >= 400 else None
    router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        summary=summary,
        name=f"sdapi{path}",
        status_code=status,
        response_class=JSONResponse,
        responses=describe_answers(summary, answer, {}) if answer else errors,
        openapi_extra=describe_json_body(schema) if schema else None,
    )


_post("/txt2img", drawing_endpoint(Txt2ImgRequest), "Text to image", Txt2ImgRequest, SdAnswer)
_post("/img2img", drawing_endpoint(Img2ImgRequest), "Redraw an image", Img2ImgRequest, SdAnswer)
_post(
    "/extra-single-image",
    extra_single_image,
    "Enlarge an image",
    ExtraSingleImageRequest,
    ExtraAnswer,
)
_post(
    "/extra-batch-images",
    extra_batch_images,
    "Enlarge images",
    ExtraBatchImagesRequest,
    ExtraBatchAnswer,
)
_post("/interrogate", interrogate, "Refused: nothing here describes images", status=400)
_post("/png-info", png_info, "Parameters in an image", PngInfoRequest, PngInfoAnswer)
_post("/options", set_options, "Choose the model", OptionsRequest)
_post("/interrupt", interrupt, "End the client's own requests")
_post("/skip", interrupt, "As /interrupt: the images of a request are drawn together")
for _path in WITHOUT_EFFECT:
    _post(_path, _fixed(None), "Accepted without effect")
for _path, _endpoint in {
    "/options": options,
    "/sd-models": sd_models,
    "/samplers": samplers,
    "/progress": progress,
    "/memory": memory,
}.items():
    _summary = (_endpoint.__doc__ or "").partition(".")[0]
    _name = f"sdapi_get{_path}"
    router.add_api_route(_path, _endpoint, methods=["GET"], summary=_summary, name=_name)
for _path, _answer in FIXED.items():
    router.add_api_route(_path, _fixed(_answer), methods=["GET"], name=f"sdapi_get{_path}")
