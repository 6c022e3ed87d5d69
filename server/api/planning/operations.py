"""`Plan`: how to answer a request; and each operation's planner, from a request and its files.

Planning takes a while if there are images, so it waits for one of the decoder's threads
(`server/api/images/admission.py`) until the deadline, or until the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import Request
from pydantic import BaseModel

from model.canvas import Pixels, crop, on_white
from model.config import Operation, SamplingConfig
from model.image_request import Edit, Enlarge, InputImage, Reference, Region, parted
from model.tiles import lanczos
from server.api.errors import ApiError, invalid_value
from server.api.images.admission import Uploads
from server.api.images.decode import repaint_mask
from server.api.images.fit import Restoration, Size, decode_view, whole
from server.api.planning.conditions import (
    decode_fitted_reference,
    decode_keyframe,
    decode_references,
    decode_regions,
    enlarged_region,
    file_hash,
    image_as_prompt,
)
from server.api.planning.draft import (
    Draft,
    TooMuchWorkError,
    check_operation,
    draft,
    rows_of,
    seeds,
)
from server.api.planning.layout import choose_canvas, choose_view, inpaint_weight, lay_out, restore
from server.api.schemas import (
    AnyFormat,
    EditOrInpaintRequest,
    EditRequest,
    GenerateRequest,
    InpaintRequest,
    InterpolateRequest,
    OutpaintRequest,
    SamplingFields,
    UpscaleRequest,
    VariationsRequest,
)
from server.api.state import app_state, log_job, request_state, unless_cancelled
from server.engine.messages import Image, Job
from server.metrics import Metrics


def _unchanged(image: Image) -> Image:
    return image


@dataclass(frozen=True, slots=True)
class Plan:
    """Describe how to answer a request.

    Attributes:
        operation: name of the native endpoint.
        job: the worker's part. Its size is a multiple of the size step and may exceed `size`.
        size: (width, height) at which the image is drawn, in pixels.
        operation_parameters: effective values of the operation's own fields, files by hash.
        finish: postprocessing, from a generated image or a preview to one of `size`.
        restoration: postprocessing instead, to the sent image's resolution; None if the answer has
            `size`.
        is_transparent: whether the answer's images keep an alpha channel.
        opaque: whether they are shown over white nevertheless.
        prompt_read: what of the prompt is encoded, if the weights leave out a part.
    """

    operation: str
    job: Job
    size: Size
    operation_parameters: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Image], Image] = _unchanged
    restoration: Restoration | None = None
    is_transparent: bool = False
    opaque: bool = False
    prompt_read: str | None = None

    @property
    def answer_size(self) -> Size:
        """(width, height) of the answer's images in pixels."""
        return self.restoration.view.full_size if self.restoration else self.size

    def result(self, image: Image) -> Image:
        """Return the answer's image from a generated one. It may take seconds."""
        if self.restoration is None:
            return self.preview(image)
        return self._shown(Image.of(self.restoration.restored(image.array), image.index))

    def preview(self, image: Image) -> Image:
        """Return an image of `size` from a generated one or a preview."""
        return self._shown(self.finish(image))

    def cropped(self, size: Size | None) -> Plan:
        """Return the plan for the images' middle, with the parameters of the whole images.

        size: (width, height) in pixels; None crops nothing.
        """
        if size is None or size == self.size:
            return self
        (width, height), whole = size, self.size
        left, top = (whole[0] - width) // 2, (whole[1] - height) // 2

        def finish(image: Image) -> Image:
            pixels = self.finish(image).array
            return Image.of(pixels[top : top + height, left : left + width], image.index)

        parameters = {"width": whole[0], "height": whole[1], **self.operation_parameters}
        return replace(self, size=size, operation_parameters=parameters, finish=finish)

    def _shown(self, image: Image) -> Image:
        return Image.of(on_white(image.array), image.index) if self.opaque else image

    def parameters(self, truncated: tuple[str, ...], index: int) -> dict[str, Any]:
        """Return all effective parameters of image `index`; a request for them repeats it."""
        job, sampling = self.job, self.job.sampling
        common = {
            "operation": self.operation,
            "model": job.model,
            "model_sha256": job.model_sha256 or None,
            "preset": sampling.preset,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "width": self.size[0],
            "height": self.size[1],
            "seed": job.seeds[index],
            "num_inference_steps": sampling.steps,
            "guidance_scale": list(sampling.guidance),
            **_guidance_interval(sampling),
            "temperature": list(sampling.temperature),
            "sampler": sampling.sampler,
            "typical_mass": sampling.typical_mass,
            "renoise_steps": sampling.renoise_steps,
            "renoise_mode": sampling.renoise_mode,
            "renoise_order": sampling.renoise_order,
            "attention_weights": _attention_weights(sampling),
            "deterministic": sampling.deterministic,
        }
        frame = {"frame": index} if job.keyframes else {}
        reading = {} if self.prompt_read is None else {"prompt_read": self.prompt_read}
        truncation = {"truncated": list(truncated)}
        return {**common, **self.operation_parameters, **frame, **reading, **truncation}

    def shared_parameters(self, truncated: tuple[str, ...]) -> dict[str, Any]:
        """Return the effective parameters of all images together."""
        images = 1 if self.job.keyframes else len(self.job.seeds)
        parameters = self.parameters(truncated, 0) | {"n": images}
        parameters.pop("frame", None)
        return parameters


def _guidance_interval(sampling: SamplingConfig) -> dict[str, float]:
    """Return the fields for the steps with guidance: their number, unless others come before."""
    first, steps = sampling.guidance_start, sampling.steps
    if first == 0:
        return {"guidance_steps": sampling.guidance_steps}
    end = (first + sampling.guidance_steps) / steps
    return {"guidance_start": first / steps, "guidance_end": end}


def _attention_weights(sampling: SamplingConfig) -> dict[str, float] | None:
    if sampling.attention_weights is None:
        return None
    text, image = sampling.attention_weights
    return {"text": text, "image": image}


def _generate(request: GenerateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    if request.regions:
        regions, parameters = decode_regions(request.regions, whole(size, size), drafted, uploads)
        return _generate_with(request, drafted, size, parameters, regions=regions)
    auto_regions = drafted.auto_regions(request)
    if drafted.config.vocabulary is None:
        return _generate_with(request, drafted, size, {})
    if auto_regions and (parts := drafted.read(request.prompt).parts):
        first, regions = parted(parts, *size)
        readings = ((request.prompt, first),)
        try:
            return _generate_with(
                request, drafted, size, {"auto_regions": True}, regions=regions, readings=readings
            )
        except TooMuchWorkError:
            auto_regions = False
    return _generate_with(request, drafted, size, {"auto_regions": auto_regions})


def _generate_with(
    request: GenerateRequest,
    drafted: Draft,
    size: Size,
    parameters: dict[str, Any],
    *,
    regions: tuple[Region, ...] = (),
    readings: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """Return the plan with these regions. The other arguments are those of `Draft.job`."""
    job_with = partial(drafted.job, size, request.prompt, regions=regions, readings=readings)
    if request.hires is None:
        return Plan("generate", job_with(), size, parameters)
    scale, strength = request.hires.scale, request.hires.strength
    sampling = drafted.sampling.with_steps(request.hires.steps or drafted.sampling.steps).unguided
    enlarge = drafted.enlarge(size, scale, strength, sampling, "hires.scale")
    enlarge = replace(enlarge, regions=tuple(enlarged_region(each, enlarge) for each in regions))
    job = job_with(enlarge=enlarge)
    hires = {"scale": scale, "strength": strength, "steps": sampling.steps}
    parameters |= {"width": size[0], "height": size[1], "hires": hires}
    return Plan("generate", job, enlarge.size, parameters, partial(_shown, enlarge))


def _inpaint(request: InpaintRequest, drafted: Draft, uploads: Uploads) -> Plan:
    choose = choose_view(request, drafted, uploads, regions=len(request.regions))
    image, view = decode_view(request.image, "image", choose, uploads)
    weight = inpaint_weight(request, image, view, uploads)
    # Without a mask, the transparent part is drawn, and the answer is opaque.
    is_cut_out = request.mask is None
    layout = lay_out(
        replace(image, alpha=None) if is_cut_out else image,
        view.placed(weight, outside=255),
        view,
        drafted,
        request.feather,
    )
    if not layout.weight.any():
        raise _empty_mask("mask: nothing to repaint in the part that width and height leave")
    regions, region_parameters = decode_regions(request.regions, view, drafted, uploads)
    references, reference_parameters = decode_references(request.references, drafted, uploads)
    parameters = {
        "image": file_hash(request.image),
        **({} if request.mask is None else {"mask": file_hash(request.mask)}),
        "mask_mode": request.mask_mode,
        "keep_unmasked": request.keep_unmasked,
        "feather": request.feather,
        "fit": request.fit,
        "return_size": request.return_size,
        **reference_parameters,
        **region_parameters,
    }
    # Only the files that the result needs: the others need not wait with it.
    kept = request.model_copy(update={"references": [], "regions": ()})

    def original() -> tuple[Pixels, Pixels]:
        files = Uploads(uploads.limits)
        if kept.mask is None:
            sent = files.decode(kept.image)
            return sent.rgb, repaint_mask(sent, "alpha", sent.size, "image")
        # The mask first, which takes a third of the decoded image's memory.
        sent_weight = files.mask(kept.mask, kept.mask_mode, view.source)
        return files.decode(kept.image).stored, sent_weight

    files = [kept.image, *([] if kept.mask is None else [kept.mask])]
    keeps = request.keep_unmasked
    restoration, held = restore(request, layout, view, original if keeps else None, files)
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
        **held,
    )
    finish = layout.composited if keeps else layout.cropped
    has_alpha = keeps and layout.transparent is not None
    return Plan("inpaint", job, layout.size, parameters, finish, restoration, has_alpha)


def _outpaint(request: OutpaintRequest, drafted: Draft, uploads: Uploads) -> Plan:
    margins = {
        "left": request.left,
        "right": request.right,
        "up": request.up,
        "down": request.down,
    }
    if not any(margins.values()):
        allowed = "at least one of left, right, up and down must be above 0"
        raise invalid_value("left", allowed, 0)
    choose = choose_canvas(request, margins, drafted, uploads)
    image, view = decode_view(request.image, "image", choose, uploads)
    kept = np.zeros(image.rgb.shape[:2], dtype=np.uint8)
    layout = lay_out(image, view.placed(kept, outside=255), view, drafted, request.feather)
    canvas = whole(view.full_size, view.size)
    regions, region_parameters = decode_regions(request.regions, canvas, drafted, uploads)
    references = image_as_prompt(request.prompt, request.image, drafted, uploads)
    content = request.image

    def original() -> tuple[Pixels, Pixels]:
        sent = Uploads(uploads.limits).decode(content).stored
        return sent, np.zeros(sent.shape[:2], dtype=np.uint8)

    restoration, held = restore(request, layout, view, original, [content])
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
        **held,
    )
    parameters = {
        "image": file_hash(request.image),
        **margins,
        "feather": request.feather,
        "return_size": request.return_size,
        **region_parameters,
    }
    finish, has_alpha = layout.composited, layout.transparent is not None
    return Plan("outpaint", job, layout.size, parameters, finish, restoration, has_alpha)


def _variations(request: VariationsRequest, drafted: Draft, uploads: Uploads) -> Plan:
    count = len(request.image)
    weights = [1.0] * count if request.weights is None else request.weights
    if len(weights) != count or not any(weights):
        allowed = f"one for each image ({count}), at least one of them above 0"
        raise invalid_value("weights", allowed, request.weights)
    size: Size | None = None
    images: list[InputImage] = []
    for content in request.image:
        image, view = decode_fitted_reference(content, size, request.fit, drafted, uploads)
        images.append(image)
        # A missing side follows the first image.
        size = size or drafted.size_for(view.source)
    assert size
    references = tuple(map(Reference, images, weights))
    job = drafted.job(size, request.prompt, references=references)
    hashes = [file_hash(content) for content in request.image]
    parameters = {"image": hashes, "weights": weights, "fit": request.fit}
    return Plan("variations", job, size, parameters)


def _edit(request: EditRequest, drafted: Draft, uploads: Uploads) -> Plan:
    steps = round(request.strength * drafted.sampling.steps)
    choose = choose_view(request, drafted, uploads, steps=steps)
    image, view = decode_view(request.image, "image", choose, uploads)
    if isinstance(request, EditOrInpaintRequest) and image.has_alpha:
        check_operation(drafted.config, "inpaint")
        return _inpaint(request.inpaint, drafted, uploads)
    beyond = view.placed(np.zeros(image.rgb.shape[:2], dtype=np.uint8), outside=255)
    layout = lay_out(image, beyond, view, drafted)
    references, reference_parameters = decode_references(request.references, drafted, uploads)
    restoration, held = restore(request, layout, view, None, [])
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        steps=steps,
        canvas=Edit(layout.canvas.image, request.strength),
        references=references,
        **held,
    )
    parameters = {
        "image": file_hash(request.image),
        "strength": request.strength,
        "fit": request.fit,
        "return_size": request.return_size,
        **reference_parameters,
    }
    return Plan("edit", job, layout.size, parameters, layout.cropped, restoration)


def _upscale(request: UpscaleRequest, drafted: Draft, uploads: Uploads) -> Plan:
    strength = request.strength
    # Each tile knows the whole prompt, and guidance would draw all of it in every tile.
    if request.guidance_scale is None:
        drafted = replace(drafted, sampling=drafted.sampling.unguided)
    # Before the image is decoded. A rotation swaps the sides, which have one bound.
    drafted.enlarge(uploads.stored_size(request.image), request.scale, strength)
    image = uploads.decode(request.image)
    scale = request.scale_for(image.size)
    enlarge = drafted.enlarge(image.size, scale, strength)
    for param, side, actual in (
        ("width", request.width, enlarge.size[0]),
        ("height", request.height, enlarge.size[1]),
    ):
        if side not in (None, actual):
            raise invalid_value(param, f"must be the result's, {actual}; leave it out", side)
    canvas = lanczos(image.on_white, enlarge.size, enlarge.tiling.canvas)
    references = image_as_prompt(request.prompt, request.image, drafted, uploads)
    job = drafted.job(
        enlarge.tiling.tile,
        request.prompt,
        references=references,
        enlarge=replace(enlarge, image=InputImage.of(canvas)),
    )
    parameters = {"image": file_hash(request.image), "scale": scale, "strength": strength}
    return Plan("upscale", job, enlarge.size, parameters, partial(_shown, enlarge))


def _interpolate(request: InterpolateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    if any(entry.image for entry in request.keyframes):
        check_operation(drafted.config, "variations")
    keyframes = tuple(
        decode_keyframe(entry, request.prompt, i, uploads)
        for i, entry in enumerate(request.keyframes)
    )
    job = drafted.job(
        size,
        request.prompt,
        # Shared noise: all frames have one seed.
        seeds=seeds(request.seed, 1) * request.frames,
        keyframes=keyframes,
        mode=request.mode,
        early=request.stream,
    )
    entries = [
        {"image": file_hash(entry.image)}
        if entry.image is not None
        else {"prompt": entry.prompt, **drafted.reading(entry.prompt or "")}
        for entry in request.keyframes
    ]
    parameters = {"keyframes": entries, "frames": request.frames, "mode": request.mode}
    return Plan("interpolate", job, size, parameters)


Planner = Callable[[Any, Draft, Uploads], Plan]


def _with_reading(planner: Planner) -> Planner:
    """Return the planner, whose plans also tell what of the prompt is encoded."""

    def plan_and_read(request: Any, drafted: Draft, uploads: Uploads) -> Plan:
        planned = planner(request, drafted, uploads)
        return replace(planned, prompt_read=drafted.reading(planned.job.prompt).get("prompt_read"))

    return plan_and_read


OPERATIONS: dict[Operation, tuple[type[SamplingFields], Planner]] = {
    "generate": (GenerateRequest, _with_reading(_generate)),
    "inpaint": (InpaintRequest, _with_reading(_inpaint)),
    "outpaint": (OutpaintRequest, _with_reading(_outpaint)),
    "variations": (VariationsRequest, _with_reading(_variations)),
    "edit": (EditRequest, _with_reading(_edit)),
    "upscale": (UpscaleRequest, _with_reading(_upscale)),
    "interpolate": (InterpolateRequest, _with_reading(_interpolate)),
}


async def plan(
    request: Request,
    fields: SamplingFields,
    operation: Operation,
    output: AnyFormat = "png",
    parts: int = 1,
) -> Plan:
    """Plan a request, in the decoder's threads if it has images, and note its job for the log.

    Args:
        request: the HTTP request, whose end ends the planning.
        fields: its fields.
        operation: what they ask for.
        output: format of the answer's images.
        parts: plans that the request has; each may be that part of a request's work.

    Raises:
        ApiError: 404 unknown weights, 400 unsupported by them, 413 and 422 invalid images or
            fields, 499 the client left.
        EngineError: the decoder's, the engine's or the encoder's queue is full, or the deadline
            passed.
    """
    state, scope = app_state(request), request_state(request).client or ""
    settings = state.settings
    if parts > 1:
        part = settings.max_request_work // parts
        settings = settings.model_copy(update={"max_request_work": part})
    drafted = draft(fields, operation, state.models, settings, output, scope)
    planner = partial(OPERATIONS[operation][1], drafted.request, drafted)
    state.encoder.check_room(rows_of(fields))
    if isinstance(fields, GenerateRequest) and not fields.regions:
        planned = planner(Uploads(state.decoder.limits))
    else:
        files = list(uploaded_files(fields))
        if files:
            # Decoding would be in vain. The engine checks again when it is done.
            state.engine.check_room(rows_of(fields))
        work = state.decoder.run(planner, files, drafted.deadline)
        planned = await unless_cancelled(request, _counted(work, state.metrics))
    log_job(request, planned.job)
    return planned


async def _counted(work: Coroutine[Any, Any, Plan], metrics: Metrics) -> Plan:
    try:
        return await work
    except asyncio.CancelledError:
        metrics.cancelled.labels("upload").inc()
        raise


def uploaded_files(value: object, param: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield (param, content) of every image file in a request's fields."""
    match value:
        case bytes():
            yield param, value
        case BaseModel():
            prefix = param and f"{param}."
            for name in type(value).model_fields:
                yield from uploaded_files(getattr(value, name), f"{prefix}{name}")
        case list() | tuple():
            for i, item in enumerate(value):
                yield from uploaded_files(
                    item, param if isinstance(item, bytes) else f"{param}.{i}"
                )


def _empty_mask(message: str) -> ApiError:
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_mask", message, "mask")


def _shown(enlarge: Enlarge, image: Image) -> Image:
    """Return an enlarged image without the padding, or a preview from before it is enlarged."""
    if (image.width, image.height) != enlarge.tiling.canvas:
        return Image.of(lanczos(image.array, enlarge.size), image.index)
    return Image.of(crop(image.array, *enlarge.size), image.index)
