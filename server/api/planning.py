"""A validated request to a `Plan`: decoded and laid out images, the worker's job, postprocessing.

Planning takes a while if there are images, so it waits for one of the decoder's threads
(`server/api/images/admission.py`) until the deadline, or until the client leaves.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

import numpy as np
from fastapi import Request
from pydantic import BaseModel

from model.canvas import (
    Array,
    Mask,
    Pixels,
    box_mask,
    composite,
    crop,
    fill,
    outpaint_canvas,
    pad_to_multiple,
    region_weight,
)
from model.config import BundleConfig, Operation, SamplingConfig
from model.image_request import Edit, InputImage, Keyframe, Reference, Region, Repaint
from server.api.errors import ApiError, invalid_value
from server.api.images.admission import Uploads
from server.api.images.decode import DecodedImage, repaint_mask
from server.api.schemas import (
    INT64,
    AnyFormat,
    EditRequest,
    GenerateRequest,
    InpaintRequest,
    InterpolateRequest,
    KeyframeEntry,
    OutpaintRequest,
    RegionEntry,
    SamplingFields,
    VariationsRequest,
)
from server.api.state import app_state, log_job, request_state, unless_cancelled
from server.engine.messages import Image, Job
from server.metrics import Metrics
from server.settings import Settings

# JavaScript reads JSON numbers exactly up to here, so that any client can send a seed back.
RANDOM_SEEDS = 2**53
# CLIP reads images of at most a few hundred pixels a side: no more than this crosses the pipe.
REFERENCE_SIDE = 512

# The cost of a result per pixel beside its steps, in branches of a step: tokens to pixels, and
# pixels to a file. Measured on a CPU: docs/log.md.
DECODING_WORK = 3
FILE_WORK: dict[AnyFormat, int] = {"png": 1, "json": 1, "jpeg": 1, "webp": 1, "gif": 6}
PREVIEW_WORK = 1

Models = Mapping[str, BundleConfig]


def _unchanged(image: Image) -> Image:
    return image


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer a request.

    Attributes:
        operation: name of the native endpoint.
        job: the worker's part. Its size is a multiple of the size step and may exceed `size`.
        size: (width, height) of the answer in pixels.
        operation_parameters: effective values of the operation's own fields, files by hash.
        finish: postprocessing, from a generated image to the image of the answer.
    """

    operation: str
    job: Job
    size: tuple[int, int]
    operation_parameters: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Image], Image] = _unchanged

    def parameters(self, truncated: tuple[str, ...], index: int) -> dict[str, Any]:
        """Return all effective parameters of image `index`; a request for them repeats it."""
        job, sampling = self.job, self.job.sampling
        common = {
            "operation": self.operation,
            "model": job.model,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "width": self.size[0],
            "height": self.size[1],
            "seed": job.seeds[index],
            "num_inference_steps": sampling.steps,
            "guidance_scale": list(sampling.guidance),
            "guidance_steps": sampling.guidance_steps,
            "temperature": list(sampling.temperature),
            "sampler": sampling.sampler,
            "typical_mass": sampling.typical_mass,
            "renoise_steps": sampling.renoise_steps,
            "renoise_mode": sampling.renoise_mode,
            "deterministic": sampling.deterministic,
        }
        frame = {"frame": index} if job.keyframes else {}
        return {**common, **self.operation_parameters, **frame, "truncated": list(truncated)}


@dataclass(frozen=True, slots=True)
class Draft:
    """A request with weights and sampling chosen, before any image is decoded.

    Attributes:
        output: format of the answer's images.
        cache_scope: the client's name; encodings are cached apart for each.
        arrived_at: monotonic seconds.
    """

    request: SamplingFields
    config: BundleConfig
    sampling: SamplingConfig
    settings: Settings
    output: AnyFormat = "png"
    cache_scope: str = ""
    arrived_at: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """The time by which the answer must be ready, monotonic seconds."""
        timeout_s = self.request.timeout_s
        return self.arrived_at + (self.settings.timeout_s if timeout_s is None else timeout_s)

    def size(self) -> tuple[int, int]:
        """Return the requested or the native size, (width, height). Raises ApiError 422."""
        width = self.request.width or self.config.native_size[0]
        height = self.request.height or self.config.native_size[1]
        sides = possible_sides(self.config, self.settings)
        for param, pixels in (("width", width), ("height", height)):
            if pixels not in sides:
                allowed = (
                    f"must be a multiple of {sides.step} from {sides[0]} to {sides[-1]} pixels"
                )
                raise invalid_value(param, allowed, pixels)
        return width, height

    def padded(self, array: Array) -> Array:
        """Return [H, W, …] mirrored at the right and lower edge to a size the weights generate."""
        return pad_to_multiple(array, self.config.size_step, self.config.smallest_side)

    def check_side(self, size: tuple[int, int], param: str) -> None:
        """Raise ApiError 422 if an answer of this size would be too large."""
        largest = possible_sides(self.config, self.settings)[-1]
        if max(size) > largest:
            allowed = f"the result may have at most {largest} pixels a side"
            raise invalid_value(param, allowed, f"{size[0]}x{size[1]}")

    def check_requested_size(self, size: tuple[int, int]) -> None:
        """Raise ApiError 422 if the request has a width or height other than the answer's."""
        width, height = size
        for param, sent, actual in (
            ("width", self.request.width, width),
            ("height", self.request.height, height),
        ):
            if sent not in (None, actual):
                raise invalid_value(param, f"must be the image's, {actual}; leave it out", sent)

    def job(
        self, size: tuple[int, int], prompt: str, *, steps: int | None = None, **parts: Any
    ) -> Job:
        """Return the job.

        Args:
            size: (width, height) in pixels, multiples of the size step.
            prompt: the main prompt.
            steps: steps that each row takes, if not all.
            parts: the operation's fields of `Job`.

        Raises:
            ApiError: 422, more work than allowed.
        """
        request = self.request
        job = Job(
            id=uuid.uuid4().hex,
            model=self.config.name,
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            width=size[0],
            height=size[1],
            sampling=self.sampling,
            deadline=self.deadline,
            arrived_at=self.arrived_at,
            priority=request.priority,
            previews=request.partial_images,
            cache_scope=self.cache_scope,
            **{"seeds": seeds(request.seed, request.n), **parts},
        )
        row_steps = self.sampling.steps if steps is None else steps
        _check_work(job, row_steps, self.output, self.settings.max_request_work)
        return job


def draft(
    request: SamplingFields,
    operation: Operation,
    models: Models,
    settings: Settings,
    output: AnyFormat = "png",
    cache_scope: str = "",
) -> Draft:
    """Choose weights and sampling. The parameters are `Draft`'s.

    Raises:
        ApiError: 404 unknown weights, 400 unsupported by them, 422 contradictory fields.
    """
    if request.partial_images and not request.stream:
        allowed = "previews are part of a stream: send stream true"
        raise invalid_value("partial_images", allowed, request.partial_images)
    config = find_model(request.model, models)
    check_operation(config, operation)
    sampling = _sampling(request, config, settings)
    return Draft(request, config, sampling, settings, output, cache_scope)


def find_model(name: str | None, models: Models) -> BundleConfig:
    """Return the weights of this name; None is the default. Raises ApiError 404."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        message = f"model: unknown; loaded are {', '.join(models)} (sent: {name[:80]!r})"
        raise ApiError(HTTPStatus.NOT_FOUND, "model_not_found", message, "model")
    return models[name]


def possible_sides(config: BundleConfig, settings: Settings) -> range:
    """Return the widths and heights that the weights generate, in pixels."""
    return range(config.smallest_side, settings.max_side + 1, config.size_step)


def check_operation(config: BundleConfig, operation: Operation) -> None:
    """Raise ApiError 400 if the weights do not support the operation."""
    if operation not in config.operations:
        supported = ", ".join(config.operations)
        message = f"model: {config.name} does not support {operation}, only {supported}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_operation", message, "model")


def seeds(first: int | None, n: int) -> tuple[int, ...]:
    """Return the seeds of n images: consecutive int64 from `first`, or from a random one."""
    start = secrets.randbelow(RANDOM_SEEDS) if first is None else first
    return tuple((start + i + INT64) % (2 * INT64) - INT64 for i in range(n))


def file_hash(content: bytes) -> str:
    """Return the hash that stands for a sent file in parameters; `paellera replay` needs it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _sampling(request: SamplingFields, config: BundleConfig, settings: Settings) -> SamplingConfig:
    deterministic = request.deterministic
    sampling = config.recipe.sampling(
        steps=request.num_inference_steps,
        renoise_steps=request.renoise_steps,
        guidance=request.guidance_scale,
        guidance_steps=request.guidance_steps,
        temperature=request.temperature,
        sampler=request.sampler,
        typical_mass=request.typical_mass,
        renoise_mode=request.renoise_mode,
        deterministic=settings.deterministic if deterministic is None else deterministic,
    )
    if sampling.sampler not in config.samplers:
        supported = ", ".join(config.samplers)
        message = f"sampler: {config.name} supports {supported} (sent: {sampling.sampler!r})"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_sampler", message, "sampler")
    for param, count in (
        ("renoise_steps", sampling.renoise_steps),
        ("guidance_steps", sampling.guidance_steps),
    ):
        if count > sampling.steps:
            allowed = f"must be from 0 to num_inference_steps, which is {sampling.steps}"
            raise invalid_value(param, allowed, count)
    return sampling


def _check_work(job: Job, steps: int, output: AnyFormat, allowed: int) -> None:
    images, pixels = len(job.seeds), job.width * job.height
    branches = 1 + len(job.regions) + job.sampling.guided
    previews = min(job.previews, max(0, steps - 1))
    output_work = DECODING_WORK + FILE_WORK[output] + previews * (DECODING_WORK + PREVIEW_WORK)
    work = images * pixels * (steps * branches + output_work)
    if work > allowed:
        message = (
            f"the request's work is {work}, the maximum {allowed}"
            f" ({images} images of {pixels} pixels, {steps} steps of {branches} branches,"
            f" and as much as {output_work} for decoding and files)"
        )
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


# ── operations ────────────────────────────────────────────────────────────────────────────────────


class Layout(NamedTuple):
    """An image padded for the networks, its sides multiples of the size step.

    Attributes:
        rgb: uint8 [H, W, 3].
        repainted: bool [H, W].
        size: (width, height) of the answer, the upper left part.
    """

    rgb: Pixels
    repainted: Mask
    size: tuple[int, int]

    @property
    def canvas(self) -> Repaint:
        """The worker's input: the image, filled where it is repainted, and the mask."""
        return Repaint(InputImage.of(fill(self.rgb, self.repainted)), InputImage.of(self.repainted))

    @property
    def padded_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def cropped(self, image: Image) -> Image:
        """Return a generated image without the padding."""
        return image_of(crop(array_of(image), *self.size), image.index)

    def composited(self, image: Image) -> Image:
        """Return the kept pixels bit for bit, generated ones elsewhere, blended at the seam."""
        kept = crop(~self.repainted, *self.size)
        original = crop(self.rgb, *self.size)
        generated = crop(array_of(image), *self.size)
        return image_of(composite(original, generated, kept), image.index)


def _generate(request: GenerateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    regions, parameters = _regions(request.regions, size, drafted, uploads)
    job = drafted.job(size, request.prompt, regions=regions)
    return Plan("generate", job, size, parameters)


def _inpaint(request: InpaintRequest, drafted: Draft, uploads: Uploads) -> Plan:
    drafted.check_side(uploads.stored_size(request.image), "image")
    image = uploads.decode(request.image)
    drafted.check_requested_size(image.size)
    mask = _inpaint_mask(request, image, uploads)
    layout = Layout(drafted.padded(image.on_white), drafted.padded(mask), image.size)
    regions, region_parameters = _regions(request.regions, image.size, drafted, uploads)
    references, reference_parameters = _references(request.references, drafted, uploads)
    parameters = {
        "image": file_hash(request.image),
        **({} if request.mask is None else {"mask": file_hash(request.mask)}),
        "mask_mode": request.mask_mode,
        "keep_unmasked": request.keep_unmasked,
        **reference_parameters,
        **region_parameters,
    }
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
    )
    finish = layout.composited if request.keep_unmasked else layout.cropped
    return Plan("inpaint", job, layout.size, parameters, finish)


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
    drafted.check_side(uploads.stored_size(request.image), "image")
    image = uploads.decode(request.image)
    layout = _outpaint_layout(image, margins, drafted)
    drafted.check_requested_size(layout.size)
    regions, region_parameters = _regions(request.regions, layout.size, drafted, uploads)
    # Without a prompt the image itself is the condition, if the weights support that.
    by_image = not request.prompt.strip() and "variations" in drafted.config.operations
    shown = [reference_image(request.image, "image", uploads)] if by_image else []
    references = tuple(Reference(each, 1.0) for each in shown)
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
    )
    parameters = {"image": file_hash(request.image), **margins, **region_parameters}
    return Plan("outpaint", job, layout.size, parameters, layout.composited)


def _variations(request: VariationsRequest, drafted: Draft, uploads: Uploads) -> Plan:
    count = len(request.image)
    weights = [1.0] * count if request.weights is None else request.weights
    if len(weights) != count or not any(weights):
        allowed = f"one for each image ({count}), at least one of them above 0"
        raise invalid_value("weights", allowed, request.weights)
    size = drafted.size()
    images = [reference_image(content, "image", uploads) for content in request.image]
    references = tuple(map(Reference, images, weights))
    job = drafted.job(size, request.prompt, references=references)
    hashes = [file_hash(content) for content in request.image]
    return Plan("variations", job, size, {"image": hashes, "weights": weights})


def _edit(request: EditRequest, drafted: Draft, uploads: Uploads) -> Plan:

    def fit(stored: tuple[int, int]) -> tuple[int, int]:
        size = request.width or stored[0], request.height or stored[1]
        drafted.check_side(size, "image")
        return size

    image = uploads.decode(request.image, fit=fit)
    size = image.size
    padded = drafted.padded(image.on_white)
    layout = Layout(padded, np.ones(padded.shape[:2], dtype=np.bool_), size)
    steps = round(request.strength * drafted.sampling.steps)
    references, reference_parameters = _references(request.references, drafted, uploads)
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        steps=steps,
        canvas=Edit(InputImage.of(padded), request.strength),
        references=references,
    )
    parameters = {
        "image": file_hash(request.image),
        "strength": request.strength,
        **reference_parameters,
    }
    return Plan("edit", job, size, parameters, layout.cropped)


def _interpolate(request: InterpolateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    if any(entry.image for entry in request.keyframes):
        check_operation(drafted.config, "variations")
    keyframes = tuple(
        _keyframe(entry, request.prompt, i, uploads) for i, entry in enumerate(request.keyframes)
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
        {"prompt": entry.prompt} if entry.image is None else {"image": file_hash(entry.image)}
        for entry in request.keyframes
    ]
    parameters = {"keyframes": entries, "frames": request.frames, "mode": request.mode}
    return Plan("interpolate", job, size, parameters)


Planner = Callable[[Any, Draft, Uploads], Plan]
OPERATIONS: dict[Operation, tuple[type[SamplingFields], Planner]] = {
    "generate": (GenerateRequest, _generate),
    "inpaint": (InpaintRequest, _inpaint),
    "outpaint": (OutpaintRequest, _outpaint),
    "variations": (VariationsRequest, _variations),
    "edit": (EditRequest, _edit),
    "interpolate": (InterpolateRequest, _interpolate),
}


async def plan(
    request: Request, fields: SamplingFields, operation: Operation, output: AnyFormat = "png"
) -> Plan:
    """Plan a request, in the decoder's threads if it has images, and note its job for the log.

    Args:
        request: the HTTP request, whose end ends the planning.
        fields: its fields.
        operation: what they ask for.
        output: format of the answer's images.

    Raises:
        ApiError: 404 unknown weights, 400 unsupported by them, 413 and 422 invalid images or
            fields, 499 the client left.
        EngineError: the decoder's, the engine's or the encoder's queue is full, or the deadline
            passed.
    """
    state, scope = app_state(request), request_state(request).client or ""
    drafted = draft(fields, operation, state.models, state.settings, output, scope)
    planner = partial(OPERATIONS[operation][1], fields, drafted)
    state.encoder.check_room(_rows(fields))
    if isinstance(fields, GenerateRequest) and not fields.regions:
        planned = planner(Uploads(state.decoder.limits))
    else:
        files = list(uploaded_files(fields))
        if files:
            # Decoding would be in vain. The engine checks again when it is done.
            state.engine.check_room(_rows(fields))
        work = state.decoder.run(planner, files, drafted.deadline)
        planned = await unless_cancelled(request, _counted(work, state.metrics))
    log_job(request, planned.job)
    return planned


def _rows(fields: SamplingFields) -> int:
    return fields.frames if isinstance(fields, InterpolateRequest) else fields.n


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


# ── parts of operations ───────────────────────────────────────────────────────────────────────────


def _inpaint_mask(request: InpaintRequest, image: DecodedImage, uploads: Uploads) -> Mask:
    """Return the separate mask, or the image's own transparency."""
    if request.mask is not None:
        return uploads.mask(request.mask, request.mask_mode, image.size)
    if not image.has_alpha:
        message = "mask: required, unless the image is transparent where it is to be repainted"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "missing_field", message, "mask")
    return repaint_mask(image, "alpha", image.size, "image")


def _outpaint_layout(image: DecodedImage, margins: dict[str, int], drafted: Draft) -> Layout:
    width = image.size[0] + margins["left"] + margins["right"]
    height = image.size[1] + margins["up"] + margins["down"]
    drafted.check_side((width, height), "image")
    step = drafted.config.size_step
    # Padding beyond a new edge is generated; beyond an old one it mirrors the image.
    extra = {
        "right": -width % step if margins["right"] else 0,
        "down": -height % step if margins["down"] else 0,
    }
    padded_margins = {side: pixels + extra.get(side, 0) for side, pixels in margins.items()}
    rgb, kept = outpaint_canvas(image.on_white, **padded_margins)
    return Layout(drafted.padded(rgb), drafted.padded(~kept), (width, height))


def _regions(
    entries: Sequence[RegionEntry], size: tuple[int, int], drafted: Draft, uploads: Uploads
) -> tuple[tuple[Region, ...], dict[str, Any]]:
    """Return the regions of an answer of this size, and their parameters."""
    if not entries:
        return (), {}
    check_operation(drafted.config, "regions")
    regions, parameters = [], []
    for i, entry in enumerate(entries):
        mask = _region_mask(entry, size, i, uploads)
        weight = region_weight(mask, entry.weight, entry.softness)
        regions.append(Region(entry.prompt, InputImage.of(drafted.padded(weight))))
        place = {"box": list(entry.box)} if entry.box else {"mask": file_hash(entry.mask or b"")}
        shape = {"weight": entry.weight, "softness": entry.softness}
        parameters.append({"prompt": entry.prompt, **place, **shape})
    return tuple(regions), {"regions": parameters}


def _region_mask(entry: RegionEntry, size: tuple[int, int], index: int, uploads: Uploads) -> Mask:
    if entry.box:
        return box_mask(entry.box, *size)
    return uploads.mask(entry.mask or b"", None, size, f"regions.{index}.mask")


def _references(
    contents: Sequence[bytes], drafted: Draft, uploads: Uploads
) -> tuple[tuple[Reference, ...], dict[str, Any]]:
    """Return images that replace the prior's embedding, and their parameters."""
    if not contents:
        return (), {}
    check_operation(drafted.config, "variations")
    images = [reference_image(content, "references", uploads) for content in contents]
    references = tuple(Reference(image, 1.0) for image in images)
    return references, {"references": [file_hash(content) for content in contents]}


def _keyframe(entry: KeyframeEntry, prompt: str, index: int, uploads: Uploads) -> Keyframe:
    if entry.image is None:
        return Keyframe(entry.prompt or "")
    return Keyframe(prompt, reference_image(entry.image, f"keyframes.{index}.image", uploads))


# ── arrays to and from the worker's pipe ──────────────────────────────────────────────────────────


def reference_image(content: bytes, param: str, uploads: Uploads) -> InputImage:
    """Return a file's image for CLIP, scaled down if it is much larger than CLIP reads."""
    return InputImage.of(uploads.decode(content, param, reference_size).on_white)


def reference_size(stored: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of at most `REFERENCE_SIDE` pixels in the same ratio."""
    scale = min(1.0, REFERENCE_SIDE / max(stored))
    return max(1, round(stored[0] * scale)), max(1, round(stored[1] * scale))


def array_of(image: Image) -> Pixels:
    """Return a generated image as uint8 [H, W, 3]."""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def image_of(array: Pixels, index: int) -> Image:
    """Return uint8 [H, W, 3] as an image of an answer."""
    return Image(index, array.shape[1], array.shape[0], np.ascontiguousarray(array).tobytes())
