"""AUTOMATIC1111's endpoints, mapped to the native operations so that its clients work unchanged.

docs/automatic1111.md has the mapping. `PAELLERA_SDAPI` switches them on.
"""

from __future__ import annotations

import asyncio
import base64
import html
import io
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import numpy as np
import PIL.Image
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from model.config import BundleConfig
from server.api.body import JSON, read_body
from server.api.errors import ApiError, cancelled, from_engine, invalid_value
from server.api.images.admission import Uploads
from server.api.images.decode import OPAQUE
from server.api.images.encode import encode
from server.api.images.infotext import png_texts, read_infotext, write_infotext
from server.api.openapi import (
    describe_answers,
    describe_error,
    describe_errors,
    describe_json_body,
)
from server.api.planning.draft import find_model
from server.api.planning.operations import OPERATIONS, Plan, plan
from server.api.responses import answer_headers, encode_all, stage_seconds, until_deadline
from server.api.sdapi_clients import Clients, Drawing
from server.api.sdapi_schemas import (
    Enlargement,
    ExtraAnswer,
    ExtraBatchAnswer,
    ExtraBatchImagesRequest,
    ExtraSingleImageRequest,
    ExtrasRequest,
    Img2ImgRequest,
    OptionsRequest,
    PngInfoAnswer,
    PngInfoRequest,
    SdAnswer,
    SdRequest,
    Txt2ImgRequest,
)
from server.api.state import AppState, app_state, owner_of, request_state, unless_cancelled
from server.engine.errors import DeadlineExceeded, EngineError
from server.engine.hooks import Hooks
from server.engine.messages import Finished, Timings
from server.memory import resident_bytes

HASH_DIGITS = 10
# The setting in place of the native field `timeout_s`.
DEADLINE = "PAELLERA_TIMEOUT_S"
HALF = 128

router = APIRouter(prefix="/sdapi/v1", tags=["automatic1111"])
DRAWING_PATHS = tuple(
    f"{router.prefix}{path}"
    for path in ("/txt2img", "/img2img", "/extra-single-image", "/extra-batch-images")
)


def include(app: FastAPI) -> None:
    """Add the endpoints, and the state of their clients, to an app."""
    app.state.sdapi = Clients()
    app.include_router(router)


def _clients(request: Request) -> Clients:
    return cast(Clients, request.app.state.sdapi)


def _json(value: object) -> Response:
    # Not Starlette's, which fails for half of a surrogate pair.
    return Response(json.dumps(value), media_type=JSON)


@contextmanager
def _as_sent(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors of the server's own endpoints as those of the fields that the client sent.

    names: the client's, by native name.
    """
    try:
        yield
    except EngineError as error:
        raise _renamed(from_engine(error), names) from None
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    where, colon, problem = error.message.partition(":")
    message = names.get(where, where) + colon + problem
    for native, sent in {**names, "timeout_s": DEADLINE}.items():
        # Other names are words too.
        if "_" in native or "." in native:
            message = message.replace(native, sent)
    # These clients send no deadline.
    param = None if error.param == "timeout_s" else error.param
    if param is not None:
        param = names.get(param, param).partition(".")[0]
    return ApiError(error.status, error.code, message, param, error.headers)


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class A1111Answer:
    """A finished plan as AUTOMATIC1111's JSON answer. fields: the request, without its images."""

    state: AppState
    fields: SdRequest
    config: BundleConfig
    plan: Plan

    async def respond(self, finished: Finished, *, interrupted: bool = False) -> Response:
        """Return the images that are finished. interrupted: they are previews."""
        text = partial(self._infotext, interrupted=interrupted)
        contents, seconds = await encode_all(self.state, self.plan, finished, "png", 90, text)

        def body() -> bytes:
            images = contents if self.fields.send_images else []
            answer = {
                "images": [base64.b64encode(content).decode() for content in images],
                "parameters": self.fields.echoed,
                "info": json.dumps(self._info(finished, interrupted=interrupted)),
            }
            return json.dumps(answer).encode()

        headers = answer_headers(self.plan, finished, stage_seconds(finished, seconds), "json")
        return Response(await asyncio.to_thread(body), media_type=JSON, headers=headers)

    def _infotext(self, parameters: dict[str, Any], *, interrupted: bool) -> str:
        fields = {
            "Steps": parameters["num_inference_steps"],
            "Sampler": parameters["sampler"],
            "Schedule type": "Automatic",
            "CFG scale": f"{self.fields.cfg_scale:g}",
            "Seed": parameters["seed"],
            "Size": f"{parameters['width']}x{parameters['height']}",
            "Model hash": self.config.sha256[:HASH_DIGITS],
            "Model": self.config.name,
            **self._details,
            **self._extra(interrupted=interrupted),
        }
        return write_infotext(parameters["prompt"], parameters["negative_prompt"], fields)

    @property
    def _details(self) -> dict[str, object]:
        return self.fields.details(self.config, self.state.settings)

    def _extra(self, *, interrupted: bool) -> dict[str, object]:
        """Return what was drawn otherwise than requested, and what its clients do not ask for."""
        extra: dict[str, object] = {}
        sent, steps = self.fields.sampler_name, self.fields.steps
        sampling = self.plan.job.sampling
        if sent and sent.lower() != sampling.sampler:
            extra["Requested sampler"] = sent
        if steps not in (None, sampling.steps):
            extra["Requested steps"] = steps
        if self.config.presets:
            extra["Preset"] = sampling.preset
        if sampling.renoise_order != "random":
            extra["Renoise order"] = sampling.renoise_order
        return extra | ({"Interrupted": True} if interrupted else {})

    def _info(self, finished: Finished, *, interrupted: bool) -> dict[str, Any]:
        fields, job = self.fields, self.plan.job
        indices = sorted(image.index for image in finished.images)
        parameters = [self.plan.parameters(finished.truncated, index) for index in indices]
        first, count = parameters[0], len(indices)
        return {
            "prompt": job.prompt,
            "all_prompts": [job.prompt] * count,
            "negative_prompt": job.negative_prompt,
            "all_negative_prompts": [job.negative_prompt] * count,
            "seed": first["seed"],
            "all_seeds": [each["seed"] for each in parameters],
            "subseed": first["seed"],
            "all_subseeds": [each["seed"] for each in parameters],
            "subseed_strength": 0,
            "width": first["width"],
            "height": first["height"],
            "sampler_name": first["sampler"],
            "cfg_scale": fields.cfg_scale,
            "guidance_scale": first["guidance_scale"],
            "steps": first["num_inference_steps"],
            "batch_size": fields.batch_size,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": self.config.name,
            "sd_model_hash": self.config.sha256[:HASH_DIGITS],
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": self._details.get("Denoising strength"),
            "extra_generation_params": self._extra(interrupted=interrupted),
            "index_of_first_image": 0,
            "infotexts": [self._infotext(each, interrupted=interrupted) for each in parameters],
            "styles": [],
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "clip_skip": 1,
            "is_using_inpainting_conditioning": False,
            "truncated": list(finished.truncated),
        }


def _drawing_endpoint(schema: type[SdRequest]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        with _clients(request).drawing(owner_of(request), schema.job) as drawing:
            answer = await drawing.unless_interrupted(_draw(request, schema, drawing))
            return answer or await _interrupted(drawing)

    return endpoint


async def _draw(request: Request, schema: type[SdRequest], drawing: Drawing) -> Response:
    """Plan and run a request; note its plan. Raises ApiError and EngineError."""
    fields = await read_body(request, schema, app_state(request).settings.max_body_bytes)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    names = fields.sent_names
    with _as_sent(names):
        answer = await _planned(request, fields)
    # The files may be large, and are not needed while the job waits.
    del fields
    drawing.plan = planned = answer.plan
    drawing.answer_early = partial(answer.respond, interrupted=True)

    async def run() -> Response:
        hooks = Hooks(on_admitted=drawing.admit, on_preview=drawing.preview)
        finished = await answer.state.engine.run(planned.job, hooks)
        drawing.finish_drawing()
        async with until_deadline(planned):
            return await answer.respond(finished)

    with _as_sent(names):
        return await unless_cancelled(request, run())


async def _interrupted(drawing: Drawing) -> Response:
    """Return the latest previews. Raises ApiError 499 if there are none."""
    images = tuple(preview.image for preview in drawing.previews.values())
    if drawing.answer_early is None or not images:
        raise cancelled()
    return await drawing.answer_early(Finished("", images, Timings()))


async def _planned(request: Request, fields: SdRequest) -> A1111Answer:
    """Plan a request; the answer does not hold its images."""
    state = app_state(request)
    config = _config(request, fields.checkpoint)
    operation, native = fields.native(config, state.settings)
    if isinstance(fields, Img2ImgRequest) and fields.mask is not None:
        native["mask"] = await _white_mask(request, fields.mask, fields.inpainting_mask_invert)
    # Validated already: the native fields have the same types.
    native_fields = OPERATIONS[operation][0].model_construct(**native)
    planned = (await plan(request, native_fields, operation)).cropped(fields.cropped_size)
    return A1111Answer(state, fields.without_files(), config, planned)


async def _white_mask(request: Request, mask: bytes, inverted: bool) -> bytes:
    """Return a PNG that is white where AUTOMATIC1111 repaints by this mask."""

    def work(uploads: Uploads) -> bytes:
        image = uploads.decode(mask, "mask")
        white = image.whiteness
        if image.alpha is not None:
            white = np.where(image.alpha > HALF, np.uint8(OPAQUE), np.uint8(0))
        file = io.BytesIO()
        PIL.Image.fromarray(OPAQUE - white if inverted else white).save(
            file, "PNG", compress_level=1
        )
        return file.getvalue()

    state = app_state(request)
    deadline = time.monotonic() + state.settings.timeout_s
    return await unless_cancelled(request, state.decoder.run(work, [("mask", mask)], deadline))


class Enlarged(NamedTuple):
    """An enlarged image: a PNG in base64, what was done, as HTML, and headers for the answer."""

    image: str
    html: str
    headers: dict[str, str]


async def extra_single_image(request: Request) -> Response:
    """Return the image, enlarged."""
    with _clients(request).drawing(owner_of(request), "extras") as drawing:
        answer = await drawing.unless_interrupted(_single(request, drawing))
        if answer is None:
            raise cancelled()
        return answer


async def _single(request: Request, drawing: Drawing) -> Response:
    limit = app_state(request).settings.max_body_bytes
    fields = await read_body(request, ExtraSingleImageRequest, limit)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    upscaler, names = fields.upscaler_1, fields.sent_names
    with _as_sent(names):
        planned = await _enlarging(request, fields, fields.image)
        # The files may be large, and are not needed while the job waits.
        del fields
        image, html_info, headers = await _enlarged(request, drawing, planned, upscaler)
    return await _large_json({"html_info": html_info, "image": image}, headers)


async def extra_batch_images(request: Request) -> Response:
    """Return the images, enlarged one after the other; of an interrupted request the first ones."""
    state = app_state(request)
    deadline = time.monotonic() + state.settings.timeout_s
    fields = await read_body(request, ExtraBatchImagesRequest, state.settings.max_body_bytes)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    files = [(f"imageList.{i}.data", entry.data) for i, entry in enumerate(fields.imageList)]
    with _as_sent(fields.sent_names):
        # All headers, before the first image is drawn.
        check = state.decoder.run(lambda _: None, files, deadline)
        await unless_cancelled(request, check)
    done = list[Enlarged]()
    for name, file in files:
        work = partial(_one_of, request, fields, file, deadline, len(files))
        with (
            _as_sent({**fields.sent_names, "image": name}),
            _clients(request).drawing(owner_of(request), "extras") as drawing,
        ):
            enlarged = await drawing.unless_interrupted(work(drawing))
        if enlarged is None:
            break
        done.append(enlarged)
    if not done:
        raise cancelled()
    shown = "".join(each.html for each in done)
    return await _large_json({"html_info": shown, "images": [each.image for each in done]})


async def _one_of(
    request: Request,
    fields: ExtrasRequest,
    file: bytes,
    deadline: float,
    parts: int,
    drawing: Drawing,
) -> Enlarged:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceeded("the deadline passed")
    planned = await _enlarging(request, fields, file, left_s, parts)
    return await _enlarged(request, drawing, planned, fields.upscaler_1)


async def _enlarging(
    request: Request,
    fields: ExtrasRequest,
    file: bytes,
    timeout_s: float | None = None,
    parts: int = 1,
) -> Plan:
    """Plan to enlarge a file. parts: files of the request. Raises ApiError and EngineError."""
    native = {**fields.native(file), "model": _config(request, None).name, "timeout_s": timeout_s}
    # Validated already: the native fields have the same types.
    planned = await plan(request, Enlargement.model_construct(**native), "upscale", parts=parts)
    return planned.cropped(fields.cropped_size)


async def _enlarged(request: Request, drawing: Drawing, planned: Plan, upscaler: str) -> Enlarged:
    """Run a plan. upscaler: its name, to be shown. Raises ApiError and EngineError."""
    state = app_state(request)
    drawing.plan = planned

    async def run() -> Enlarged:
        finished = await state.engine.run(planned.job, Hooks(on_admitted=drawing.admit))
        drawing.finish_drawing()
        async with until_deadline(planned):
            (content,), seconds = await encode_all(state, planned, finished, "png", 90)
        scale = planned.operation_parameters["scale"]
        shown = html.escape(f"Upscaled by: {scale:g}, upscaler: {upscaler}")
        headers = answer_headers(planned, finished, stage_seconds(finished, seconds), "json")
        return Enlarged(base64.b64encode(content).decode(), f"<p>{shown}</p>", headers)

    return await unless_cancelled(request, run())


async def _large_json(body: object, headers: dict[str, str] | None = None) -> Response:
    content = await asyncio.to_thread(lambda: json.dumps(body).encode())
    return Response(content, media_type=JSON, headers=headers)


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
    return _json(await unless_cancelled(request, state.decoder.run(work, files, deadline)))


# ── models ────────────────────────────────────────────────────────────────────────────────────────


def _title(config: BundleConfig) -> str:
    return f"{config.name} [{config.sha256[:HASH_DIGITS]}]"


def _config(request: Request, sent: object) -> BundleConfig:
    """Return the weights of a checkpoint's name, title or hash.

    sent: None is the one that the client chose, or the default. Raises ApiError 404, or 422 for no
    text, about `model`.
    """
    state = app_state(request)
    if sent is None:
        sent = _clients(request).chosen(owner_of(request))
    if sent is None:
        return find_model(None, state.models, state.settings.aliases)
    if not isinstance(sent, str):
        raise invalid_value("model", "must be the name of a model", sent)
    for config in state.models.values():
        known = (config.name, _title(config), config.sha256, config.sha256[:HASH_DIGITS])
        if sent.lower() in [name.lower() for name in known]:
            return config
    name = sent.partition(" [")[0].removesuffix(".safetensors").removesuffix(".ckpt")
    return find_model(name, state.models, state.settings.aliases)


async def options(request: Request) -> Response:
    """Return the options that clients read."""
    config = _config(request, None)
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
        with _as_sent(fields.sent_names):
            chosen = _config(request, fields.sd_model_checkpoint)
        _clients(request).choose(owner_of(request), chosen.name)
    return JSONResponse(None)


async def sd_models(request: Request) -> Response:
    """Return the loaded weights."""
    return JSONResponse(
        [
            {
                "title": _title(config),
                "model_name": config.name,
                "hash": config.sha256[:HASH_DIGITS],
                "sha256": config.sha256,
                "filename": config.name,
                "config": None,
            }
            for config in app_state(request).models.values()
        ]
    )


async def samplers(request: Request) -> Response:
    """Return the samplers of the client's model, the recipe's first."""
    config = _config(request, None)
    names = sorted(config.samplers, key=lambda name: name != config.recipe.sampler)
    return JSONResponse([{"name": name, "aliases": [], "options": {}} for name in names])


# ── progress ──────────────────────────────────────────────────────────────────────────────────────


async def progress(request: Request) -> Response:
    """Return the progress of the client's oldest running request, with its latest preview."""
    drawings = _clients(request).drawings(owner_of(request))
    drawing = drawings[0] if drawings else None
    part = drawing.progress if drawing else 0.0
    skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1")
    return JSONResponse(
        {
            "progress": round(part, 4),
            "eta_relative": round(drawing.eta_s, 3) if drawing else 0.0,
            "state": {
                "skipped": False,
                "interrupted": bool(drawing and drawing.interrupted.done()),
                "stopping_generation": False,
                "job": drawing.job if drawing else "",
                "job_count": len(drawings),
                "job_timestamp": drawing.timestamp if drawing else "0",
                "job_no": 0,
                "sampling_step": int(part * drawing.steps) if drawing else 0,
                "sampling_steps": drawing.steps if drawing else 0,
            },
            "current_image": None if skip else await _current_image(request, drawing),
            "textinfo": None,
        }
    )


async def _current_image(request: Request, drawing: Drawing | None) -> str | None:
    """Return the first image's latest preview as a PNG in base64, None if there is none."""
    if drawing is None or drawing.plan is None or not drawing.previews:
        return None
    preview, planned = drawing.previews[min(drawing.previews)], drawing.plan
    if drawing.shown is None or drawing.shown[0] is not preview:
        state = app_state(request)
        marking = state.marker.of_preview(planned.operation)

        def work() -> str:
            content = encode(planned.finish(preview.image), "png", 90, {}, marking=marking)
            return base64.b64encode(content).decode()

        file = asyncio.ensure_future(state.encoder.run(work))
        drawing.shown = preview, file
    # Shared by those that ask meanwhile; any of them may leave.
    return await asyncio.shield(drawing.shown[1])


async def interrupt(request: Request) -> Response:
    """End the client's own running requests."""
    _clients(request).interrupt(owner_of(request))
    return JSONResponse({})


# ── what there is ─────────────────────────────────────────────────────────────────────────────────


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


_post("/txt2img", _drawing_endpoint(Txt2ImgRequest), "Text to image", Txt2ImgRequest, SdAnswer)
_post("/img2img", _drawing_endpoint(Img2ImgRequest), "Redraw an image", Img2ImgRequest, SdAnswer)
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
