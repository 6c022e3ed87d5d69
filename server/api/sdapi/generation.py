"""txt2img and img2img: plan and run a request, and answer with its images and their infotexts."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
from fastapi import Request, Response

from model.canvas import Pixels
from model.config import BundleConfig
from server.api.body import JSON, read_body
from server.api.errors import cancelled, unprocessable
from server.api.images.admission import Uploads
from server.api.images.decoded_image import FAINT, OPAQUE, DecodedImage, empty_mask
from server.api.images.fit import decode_view, whole
from server.api.images.infotext import write_infotext
from server.api.planning.operations import OPERATIONS
from server.api.planning.plan import Plan
from server.api.planning.plan_request import plan_request
from server.api.responses import answer_headers, encode_all, stage_seconds, until_deadline
from server.api.sdapi.checkpoints import find_checkpoint, short_hash
from server.api.sdapi.clients import Drawing, clients_of
from server.api.sdapi.errors import as_sent
from server.api.sdapi.schemas import Img2ImgRequest, SdRequest
from server.api.state import AppState, app_state, owner_of, request_state, unless_cancelled
from server.engine.hooks import Hooks
from server.engine.messages import Finished, Timings

# Alpha above which a mask is white.
HALF = 128


def drawing_endpoint(schema: type[SdRequest]) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint for requests of a schema."""

    async def endpoint(request: Request) -> Response:
        with clients_of(request).drawing(owner_of(request), schema.job) as drawing:
            answer = await drawing.unless_interrupted(_draw(request, schema, drawing))
            return answer or await _interrupted(drawing)

    return endpoint


async def _draw(request: Request, schema: type[SdRequest], drawing: Drawing) -> Response:
    """Plan and run a request; note its plan. Raises ApiError and EngineError."""
    fields = await read_body(request, schema, app_state(request).settings.max_body_bytes)
    if (earlier := await request_state(request).earlier_answer(request, fields)) is not None:
        return earlier
    names = fields.sent_names
    with as_sent(names):
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

    with as_sent(names):
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
    config = find_checkpoint(request, fields.checkpoint)
    operation, native = fields.native(config, state.settings)
    if isinstance(fields, Img2ImgRequest) and fields.mask is not None:
        native["mask"] = await _white_mask(request, fields, fields.mask, native["image"])
    # Validated already: the native fields have the same types.
    native_fields = OPERATIONS[operation][0].model_construct(**native)
    planned = (await plan_request(request, native_fields, operation)).cropped(fields.cropped_size)
    return A1111Answer(state, fields.without_files(), config, planned)


async def _white_mask(request: Request, fields: Img2ImgRequest, mask: bytes, image: bytes) -> bytes:
    """Return a PNG, as large as the image, that is white where AUTOMATIC1111 repaints."""

    def work(uploads: Uploads) -> bytes:
        white = _whiteness(uploads.decode(mask, "mask"), fields.inpainting_mask_invert)
        shown = PIL.Image.fromarray(white)
        if shown.size != uploads.stored_size(image):
            # The size of the upright image, which is decoded as small as possible.
            _, view = decode_view(image, "image", lambda size: whole(size, (1, 1)), uploads)
            width, height = view.source
            # A larger mask would not be decoded again.
            if width * height <= uploads.limits.max_pixels:
                shown = shown.resize((width, height), PIL.Image.Resampling.BILINEAR)
        file = io.BytesIO()
        shown.save(file, "PNG", compress_level=1)
        return file.getvalue()

    state = app_state(request)
    deadline = time.monotonic() + state.settings.timeout_s
    files = [("image", image), ("mask", mask)]
    return await unless_cancelled(request, state.decoder.run(work, files, deadline))


def _whiteness(mask: DecodedImage, inverted: bool) -> Pixels:
    """Return uint8 [H, W], white where AUTOMATIC1111 repaints by this mask.

    Raises ApiError 422 if a mask that is not inverted has nothing to repaint.
    """
    clear = mask.clearness
    if mask.alpha is not None and clear is not None and clear.any():
        white = np.where(mask.alpha > HALF, np.uint8(OPAQUE), np.uint8(0))
        if not white.any() and not inverted:
            highest = f"the mask's highest alpha is {mask.alpha.max()} of {OPAQUE}"
            message = f"nothing to repaint; alpha above {HALF} is repainted, and {highest}"
            raise unprocessable("empty_mask", "mask", message)
    else:
        white = mask.whiteness
        if 0 < white.max() <= FAINT:
            raise empty_mask("mask", int(mask.luminance.max()))
    return OPAQUE - white if inverted else white


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
            "CFG scale": self.fields.cfg_scale,
            "Seed": parameters["seed"],
            "Size": f"{parameters['width']}x{parameters['height']}",
            "Model hash": short_hash(self.config),
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
            "sd_model_hash": short_hash(self.config),
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
