"""A validated request to a `Plan`: decoded and laid out images, the worker's job, postprocessing.

Planning takes a while if there are images, so it runs in the decoder's threads.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

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
from server.api.images.decode import DecodedImage, ImageLimits, decode, repaint_mask
from server.api.schemas import (
    INT64,
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
from server.api.state import AppState
from server.engine.messages import Image, Job
from server.settings import Settings

# JavaScript reads JSON numbers exactly up to here, so that any client can send a seed back.
RANDOM_SEEDS = 2**53
# CLIP reads images of at most a few hundred pixels a side: no more than this crosses the pipe.
REFERENCE_SIDE = 512

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
    """A request with weights and sampling chosen, before any image is decoded."""

    request: SamplingFields
    config: BundleConfig
    sampling: SamplingConfig
    settings: Settings
    arrived_at: float = field(default_factory=time.monotonic)

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
        timeout_s = self.settings.timeout_s if request.timeout_s is None else request.timeout_s
        job = Job(
            id=uuid.uuid4().hex,
            model=self.config.name,
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            width=size[0],
            height=size[1],
            sampling=self.sampling,
            deadline=self.arrived_at + timeout_s,
            priority=request.priority,
            previews=request.partial_images,
            **{"seeds": seeds(request.seed, request.n), **parts},
        )
        row_steps = self.sampling.steps if steps is None else steps
        _check_work(job, row_steps, self.settings.max_request_work)
        return job


def draft(
    request: SamplingFields, operation: Operation, models: Models, settings: Settings
) -> Draft:
    """Choose weights and sampling.

    Raises:
        ApiError: 404 unknown weights, 400 unsupported by them, 422 contradictory fields.
    """
    if request.partial_images and not request.stream:
        allowed = "previews are part of a stream: send stream true"
        raise invalid_value("partial_images", allowed, request.partial_images)
    config = find_model(request.model, models)
    check_operation(config, operation)
    return Draft(request, config, _sampling(request, config, settings), settings)


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


def _check_work(job: Job, steps: int, allowed: int) -> None:
    images, pixels = len(job.seeds), job.width * job.height
    branches = 1 + len(job.regions) + job.sampling.guided
    work = images * steps * pixels * branches
    if work > allowed:
        message = (
            f"the request's work is {work}, the maximum {allowed}"
            f" ({images} images of {pixels} pixels, {steps} steps of {branches} branches)"
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


def _generate(request: GenerateRequest, drafted: Draft, limits: ImageLimits) -> Plan:
    size = drafted.size()
    regions, parameters = _regions(request.regions, size, drafted, limits)
    job = drafted.job(size, request.prompt, regions=regions)
    return Plan("generate", job, size, parameters)


def _inpaint(request: InpaintRequest, drafted: Draft, limits: ImageLimits) -> Plan:
    image = decode(request.image, limits)
    drafted.check_side(image.size, "image")
    drafted.check_requested_size(image.size)
    mask = _inpaint_mask(request, image, limits)
    layout = Layout(drafted.padded(image.on_white), drafted.padded(mask), image.size)
    regions, region_parameters = _regions(request.regions, image.size, drafted, limits)
    references, reference_parameters = _references(request.references, drafted, limits)
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


def _outpaint(request: OutpaintRequest, drafted: Draft, limits: ImageLimits) -> Plan:
    margins = {
        "left": request.left,
        "right": request.right,
        "up": request.up,
        "down": request.down,
    }
    if not any(margins.values()):
        allowed = "at least one of left, right, up and down must be above 0"
        raise invalid_value("left", allowed, 0)
    image = decode(request.image, limits)
    layout = _outpaint_layout(image, margins, drafted)
    drafted.check_requested_size(layout.size)
    regions, region_parameters = _regions(request.regions, layout.size, drafted, limits)
    # Without a prompt the image itself is the condition, if the weights support that.
    by_image = not request.prompt.strip() and "variations" in drafted.config.operations
    references = (Reference(reference_image(image.on_white), 1.0),) if by_image else ()
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        canvas=layout.canvas,
        references=references,
        regions=regions,
    )
    parameters = {"image": file_hash(request.image), **margins, **region_parameters}
    return Plan("outpaint", job, layout.size, parameters, layout.composited)


def _variations(request: VariationsRequest, drafted: Draft, limits: ImageLimits) -> Plan:
    count = len(request.image)
    weights = [1.0] * count if request.weights is None else request.weights
    if len(weights) != count or not any(weights):
        allowed = f"one for each image ({count}), at least one of them above 0"
        raise invalid_value("weights", allowed, request.weights)
    size = drafted.size()
    images = [reference_image(decode(content, limits).on_white) for content in request.image]
    references = tuple(map(Reference, images, weights))
    job = drafted.job(size, request.prompt, references=references)
    hashes = [file_hash(content) for content in request.image]
    return Plan("variations", job, size, {"image": hashes, "weights": weights})


def _edit(request: EditRequest, drafted: Draft, limits: ImageLimits) -> Plan:
    rgb = decode(request.image, limits).on_white
    height, width = rgb.shape[:2]
    size = request.width or width, request.height or height
    drafted.check_side(size, "image")
    padded = drafted.padded(rgb if size == (width, height) else resized(rgb, *size))
    layout = Layout(padded, np.ones(padded.shape[:2], dtype=np.bool_), size)
    steps = round(request.strength * drafted.sampling.steps)
    references, reference_parameters = _references(request.references, drafted, limits)
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


def _interpolate(request: InterpolateRequest, drafted: Draft, limits: ImageLimits) -> Plan:
    size = drafted.size()
    if any(entry.image for entry in request.keyframes):
        check_operation(drafted.config, "variations")
    keyframes = tuple(
        _keyframe(entry, request.prompt, i, limits) for i, entry in enumerate(request.keyframes)
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


Planner = Callable[[Any, Draft, ImageLimits], Plan]
OPERATIONS: dict[Operation, tuple[type[SamplingFields], Planner]] = {
    "generate": (GenerateRequest, _generate),
    "inpaint": (InpaintRequest, _inpaint),
    "outpaint": (OutpaintRequest, _outpaint),
    "variations": (VariationsRequest, _variations),
    "edit": (EditRequest, _edit),
    "interpolate": (InterpolateRequest, _interpolate),
}


async def plan(request: SamplingFields, operation: Operation, state: AppState) -> Plan:
    """Plan a request, in the decoder's threads if it has images.

    Raises:
        ApiError: 404 unknown weights, 400 unsupported by them, 413 and 422 invalid images or
            fields.
    """
    planner = OPERATIONS[operation][1]
    drafted = draft(request, operation, state.models, state.settings)
    work = partial(planner, request, drafted, state.decoder.limits)
    if isinstance(request, GenerateRequest) and not request.regions:
        return work()
    return await state.decoder.run(work)


# ── parts of operations ───────────────────────────────────────────────────────────────────────────


def _inpaint_mask(request: InpaintRequest, image: DecodedImage, limits: ImageLimits) -> Mask:
    """Return the separate mask, or the image's own transparency."""
    if request.mask is not None:
        return repaint_mask(decode(request.mask, limits, "mask"), request.mask_mode, image.size)
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
    entries: Sequence[RegionEntry], size: tuple[int, int], drafted: Draft, limits: ImageLimits
) -> tuple[tuple[Region, ...], dict[str, Any]]:
    """Return the regions of an answer of this size, and their parameters."""
    if not entries:
        return (), {}
    check_operation(drafted.config, "regions")
    regions, parameters = [], []
    for i, entry in enumerate(entries):
        mask = _region_mask(entry, size, i, limits)
        weight = region_weight(mask, entry.weight, entry.softness)
        regions.append(Region(entry.prompt, InputImage.of(drafted.padded(weight))))
        place = {"box": list(entry.box)} if entry.box else {"mask": file_hash(entry.mask or b"")}
        shape = {"weight": entry.weight, "softness": entry.softness}
        parameters.append({"prompt": entry.prompt, **place, **shape})
    return tuple(regions), {"regions": parameters}


def _region_mask(
    entry: RegionEntry, size: tuple[int, int], index: int, limits: ImageLimits
) -> Mask:
    if entry.box:
        return box_mask(entry.box, *size)
    param = f"regions.{index}.mask"
    return repaint_mask(decode(entry.mask or b"", limits, param), None, size, param)


def _references(
    contents: Sequence[bytes], drafted: Draft, limits: ImageLimits
) -> tuple[tuple[Reference, ...], dict[str, Any]]:
    """Return images that replace the prior's embedding, and their parameters."""
    if not contents:
        return (), {}
    check_operation(drafted.config, "variations")
    images = [decode(content, limits, "references") for content in contents]
    references = tuple(Reference(reference_image(image.on_white), 1.0) for image in images)
    return references, {"references": [file_hash(content) for content in contents]}


def _keyframe(entry: KeyframeEntry, prompt: str, index: int, limits: ImageLimits) -> Keyframe:
    if entry.image is None:
        return Keyframe(entry.prompt or "")
    image = decode(entry.image, limits, f"keyframes.{index}.image")
    return Keyframe(prompt, reference_image(image.on_white))


# ── arrays to and from the worker's pipe ──────────────────────────────────────────────────────────


def reference_image(rgb: Pixels) -> InputImage:
    """Return uint8 [H, W, 3] for CLIP, scaled down if it is much larger than CLIP reads."""
    height, width = rgb.shape[:2]
    scale = REFERENCE_SIDE / max(width, height)
    if scale >= 1:
        return InputImage.of(rgb)
    return InputImage.of(resized(rgb, max(1, round(width * scale)), max(1, round(height * scale))))


def resized(rgb: Pixels, width: int, height: int) -> Pixels:
    """Return uint8 [H, W, 3] resampled bicubically."""
    image = PIL.Image.fromarray(rgb)
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))


def array_of(image: Image) -> Pixels:
    """Return a generated image as uint8 [H, W, 3]."""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def image_of(array: Pixels, index: int) -> Image:
    """Return uint8 [H, W, 3] as an image of an answer."""
    return Image(index, array.shape[1], array.shape[0], np.ascontiguousarray(array).tobytes())
