"""A validated request to a `Plan`: decoded and laid out images, the worker's job, postprocessing.

Planning takes a while if there are images, so it waits for one of the decoder's threads
(`server/api/images/admission.py`) until the deadline, or until the client leaves.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from fastapi import Request
from pydantic import BaseModel

from model.canvas import (
    FEATHER,
    Array,
    Mask,
    Pixels,
    box_mask,
    composite,
    corrected,
    crop,
    fill,
    on_white,
    outpaint_canvas,
    pad_to_multiple,
    region_weight,
)
from model.config import BundleConfig, Operation, SamplingConfig
from model.image_request import (
    Edit,
    Enlarge,
    InputImage,
    Keyframe,
    Reference,
    Region,
    Repaint,
)
from model.tiles import lanczos
from server.api.errors import ApiError, invalid_value
from server.api.images.admission import REFERENCE_SIDE, Uploads
from server.api.images.decode import DecodedImage, repaint_mask
from server.api.images.fit import (
    FitMode,
    Restoration,
    Size,
    View,
    decode_view,
    extended,
    fitted,
    follow,
    framed,
    keeps_ratio,
    whole,
    within,
)
from server.api.schemas import (
    INT64,
    AnyFormat,
    EditOrInpaintRequest,
    EditRequest,
    GenerateRequest,
    InpaintRequest,
    InterpolateRequest,
    KeyframeEntry,
    OutpaintRequest,
    RegionEntry,
    SamplingFields,
    UpscaleRequest,
    VariationsRequest,
)
from server.api.state import app_state, log_job, request_state, unless_cancelled
from server.engine.messages import Image, Job
from server.metrics import Metrics
from server.settings import Settings

# JavaScript reads JSON numbers exactly up to here, so that any client can send a seed back.
RANDOM_SEEDS = 2**53

# The cost of a result per pixel beside its steps, in branches of a step: tokens to pixels, and
# pixels to a file. Measured on a CPU: docs/log.md.
DECODING_WORK = 3
FILE_WORK: dict[AnyFormat, int] = {
    "png": 1,
    "json": 1,
    "url": 1,
    "jpeg": 1,
    "webp": 1,
    "gif": 6,
}
PREVIEW_WORK = 1
# The cost of a pixel that is enlarged to the sent image's resolution, beside that of its file.
ENLARGING_WORK = 2

Models = Mapping[str, BundleConfig]

# Areas in native ones at which the weights still draw well, the least and the most.
NEAREST_AREAS = (0.5, 1.5)
# Operations whose width and height may be any; those of others follow from an image.
RESIZED: tuple[Operation, ...] = ("generate", "variations", "edit", "inpaint", "interpolate")
# The alias of every name that has none.
ANY_NAME = "*"


def _unchanged(image: Image) -> Image:
    return image


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer a request.

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
    """

    operation: str
    job: Job
    size: Size
    operation_parameters: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Image], Image] = _unchanged
    restoration: Restoration | None = None
    is_transparent: bool = False
    opaque: bool = False

    @property
    def answer_size(self) -> Size:
        """(width, height) of the answer's images in pixels."""
        return self.restoration.view.full_size if self.restoration else self.size

    def result(self, image: Image) -> Image:
        """Return the answer's image from a generated one. It may take seconds."""
        if self.restoration is None:
            return self.preview(image)
        return self._shown(image_of(self.restoration.restored(array_of(image)), image.index))

    def preview(self, image: Image) -> Image:
        """Return an image of `size` from a generated one or a preview."""
        return self._shown(self.finish(image))

    def _shown(self, image: Image) -> Image:
        return image_of(on_white(array_of(image)), image.index) if self.opaque else image

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

    def shared_parameters(self, truncated: tuple[str, ...]) -> dict[str, Any]:
        """Return the effective parameters of all images together."""
        images = 1 if self.job.keyframes else len(self.job.seeds)
        parameters = self.parameters(truncated, 0) | {"n": images}
        parameters.pop("frame", None)
        return parameters


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
        if self.settings.sizes == "nearest":
            return nearest_size((width, height), self.config, self.settings)
        sides = possible_sides(self.config, self.settings)
        for param, pixels in (("width", width), ("height", height)):
            if pixels not in sides:
                allowed = (
                    f"must be a multiple of {sides.step} from {sides[0]} to {sides[-1]} pixels"
                )
                raise invalid_value(param, allowed, pixels)
        return width, height

    def size_for(self, source: Size) -> Size:
        """Return `size`; if one side is missing, it follows the ratio of an image of this size.

        The missing side is rounded to one that the weights generate.
        """
        sides = possible_sides(self.config, self.settings)
        width, height = self.request.width, self.request.height
        if (width is None) == (height is None) or (width or height) not in sides:
            return self.size()
        ideal = follow(source, width, height)
        return width or _nearest(ideal[0], sides), height or _nearest(ideal[1], sides)

    def fitted_size(
        self, source: Size, steps: int | None = None, regions: int = 0, enlarged: int = 0
    ) -> Size:
        """Return the size at which an image of this size is drawn.

        It is the requested one, of which a missing side follows the image's ratio. Otherwise it is
        the image's own; a larger image is scaled so that its longer side is the largest that the
        settings and the request's work allow.

        Args:
            source: (width, height) of the image.
            steps: steps that each row takes, if not all.
            regions: the request's regions.
            enlarged: pixels of each result that are enlarged to the image's resolution.

        Raises:
            ApiError: 422, the requested size is too large.
        """
        width, height = self.request.width, self.request.height
        sides = possible_sides(self.config, self.settings)
        if width or height:
            size = follow(source, width, height)
            if max(size) > sides[-1]:
                allowed = f"the result may have at most {sides[-1]} pixels a side"
                name = "width" if width and (not height or width >= height) else "height"
                raise invalid_value(name, allowed, f"{size[0]}x{size[1]}")
            return size
        workload = self.workload(steps, regions)
        own = [source] if max(source) <= sides[-1] else []
        reduced = (within(source, side) for side in reversed(sides) if side < max(source))
        for size in chain(own, reduced):
            more = 0 if size == source else enlarged
            if workload.of(self.padded_size(size), more) <= self.settings.max_request_work:
                return size
        # The job is refused for its work.
        return own[0] if own else within(source, sides[-1])

    def workload(self, steps: int | None = None, regions: int = 0) -> Workload:
        """Return the request's work but for its size. The arguments are those of `fitted_size`."""
        steps = self.sampling.steps if steps is None else steps
        previews = min(self.request.partial_images, max(0, steps - 1))
        return Workload(
            images=_rows(self.request),
            steps=steps,
            branches=1 + regions + self.sampling.guided,
            output=DECODING_WORK
            + FILE_WORK[self.output]
            + previews * (DECODING_WORK + PREVIEW_WORK),
            enlarging=ENLARGING_WORK + FILE_WORK[self.output],
        )

    def padded_size(self, size: Size) -> Size:
        """Return the size of an image of this size after `padded`."""
        step, least = self.config.size_step, self.config.smallest_side
        return max(least, size[0] + -size[0] % step), max(least, size[1] + -size[1] % step)

    def padded(self, array: Array) -> Array:
        """Return [H, W, …] mirrored at the right and lower edge to a size the weights generate."""
        return pad_to_multiple(array, self.config.size_step, self.config.smallest_side)

    def enlarge(
        self,
        size: tuple[int, int],
        scale: float,
        strength: float,
        sampling: SamplingConfig | None = None,
        param: str = "scale",
    ) -> Enlarge:
        """Return how images of `size` (width, height) are drawn larger, as `Enlarge.of` does.

        Args:
            size: (width, height) of an image in pixels.
            scale: factor of both.
            strength: share that is drawn.
            sampling: of the tiles, by default the request's.
            param: the field to name in errors.

        Raises:
            ApiError: 422, the result would be too large.
        """
        sampling, largest = sampling or self.sampling, self.settings.upscale_max_side
        width, height = (round(side * scale) for side in size)
        if max(width, height) > largest:
            allowed = f"the result may have at most {largest} pixels a side"
            raise invalid_value(param, allowed, f"{width}x{height}")
        return Enlarge.of(self.config, size, scale, strength, sampling)

    def job(
        self,
        size: Size,
        prompt: str,
        *,
        steps: int | None = None,
        enlarged: int = 0,
        **parts: Any,
    ) -> Job:
        """Return the job.

        Args:
            size: (width, height) in pixels, multiples of the size step.
            prompt: the main prompt.
            steps: steps that each row takes, if not all.
            enlarged: pixels of each result that are enlarged to the sent image's resolution.
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
            # Clients keep the field when they turn streams off.
            previews=request.partial_images if request.stream else 0,
            cache_scope=self.cache_scope,
            **{"seeds": seeds(request.seed, request.n), **parts},
        )
        if job.enlarge:
            _check_tiles_work(job, job.enlarge, self.output, self.settings.max_request_work)
            return job
        workload = self.workload(steps, len(job.regions))
        workload.check(size, enlarged, self.settings.max_request_work)
        return job


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a request but for its size, in branches of a step for each pixel.

    Attributes:
        images: images or frames.
        steps: steps of each image.
        branches: branches of a step.
        output: work for decoding, previews and files.
        enlarging: work for a pixel that is enlarged, its file included.
    """

    images: int
    steps: int
    branches: int
    output: int
    enlarging: int

    def of(self, size: Size, enlarged: int = 0) -> int:
        """Return the work. size: of the generated images. enlarged: pixels of each result."""
        generated = size[0] * size[1] * (self.steps * self.branches + self.output)
        return self.images * (generated + enlarged * self.enlarging)

    def check(self, size: Size, enlarged: int, allowed: int) -> None:
        """Raise ApiError 422 if the work is more than allowed."""
        work, pixels = self.of(size, enlarged), size[0] * size[1]
        if work > allowed:
            enlarging = f", {enlarged} pixels as much as {self.enlarging} to enlarge"
            message = (
                f"the request's work is {work}, the maximum {allowed}"
                f" ({self.images} images of {pixels} pixels, {self.steps} steps of {self.branches}"
                f" branches, and as much as {self.output} for decoding and files"
                f"{enlarging if enlarged else ''})"
            )
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


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
    config = find_model(request.model, models, settings.aliases)
    check_operation(config, operation)
    sampling = _sampling(request, config, settings)
    if settings.sizes == "nearest" and operation in RESIZED and request.width and request.height:
        size = nearest_size((request.width, request.height), config, settings)
        request = request.model_copy(update={"width": size[0], "height": size[1]})
    return Draft(request, config, sampling, settings, output, cache_scope)


def find_model(name: str | None, models: Models, aliases: Mapping[str, str]) -> BundleConfig:
    """Return the weights of this name or alias; None is the default. Raises ApiError 404.

    aliases: names of weights by other names; `*` stands for every other name.
    """
    if name is None:
        return next(iter(models.values()))
    known = name if name in models else aliases.get(name, aliases.get(ANY_NAME, name))
    if known not in models:
        named = ", ".join([*models, *aliases])
        message = f"model: unknown; loaded are {named} (sent: {name[:80]!r})"
        raise ApiError(HTTPStatus.NOT_FOUND, "model_not_found", message, "model")
    return models[known]


def possible_sides(config: BundleConfig, settings: Settings) -> range:
    """Return the widths and heights that the weights generate, in pixels."""
    return range(config.smallest_side, settings.max_side + 1, config.size_step)


def _nearest(pixels: int, sides: range) -> int:
    return min(sides, key=lambda side: abs(side - pixels))


def check_operation(config: BundleConfig, operation: Operation) -> None:
    """Raise ApiError 400 if the weights do not support the operation."""
    if operation not in config.operations:
        supported = ", ".join(config.operations)
        message = f"model: {config.name} does not support {operation}, only {supported}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_operation", message, "model")


def nearest_size(
    size: tuple[int, int], config: BundleConfig, settings: Settings
) -> tuple[int, int]:
    """Return the (width, height) in pixels at which the weights draw best what was asked for.

    The ratio of the sides comes first, then the native area. The area is within `NEAREST_AREAS` of
    the native one, for which the weights were trained. A size that is possible there is unchanged.
    """
    sides = possible_sides(config, settings)
    native = config.native_size[0] * config.native_size[1]
    ratio = size[0] / size[1]

    def is_possible(candidate: tuple[int, int]) -> bool:
        area = candidate[0] * candidate[1] / native
        return candidate[1] in sides and NEAREST_AREAS[0] <= area <= NEAREST_AREAS[1]

    def distance(candidate: tuple[int, int]) -> tuple[float, float]:
        width, height = candidate
        return abs(math.log(width / height / ratio)), abs(math.log(width * height / native))

    if size[0] in sides and is_possible(size):
        return size
    candidates = []
    for width in sides:
        # The sides next to the one in the ratio, within the areas.
        lowest, highest = (native * share / width for share in NEAREST_AREAS)
        ideal = min(max(width / ratio, lowest, sides[0]), highest, sides[-1])
        below = sides[0] + int((ideal - sides[0]) // sides.step) * sides.step
        candidates += [(width, below), (width, below + sides.step)]
    return min(filter(is_possible, candidates), key=distance)


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


def _check_tiles_work(job: Job, enlarge: Enlarge, output: AnyFormat, allowed: int) -> None:
    """Raise ApiError 422 if a job with enlarged images is more work than allowed.

    Tiles are encoded and decoded, those of previews decoded once more each.
    """
    images, tiles = len(job.seeds), len(enlarge.tiling)
    tile_pixels = images * tiles * math.prod(enlarge.tiling.tile)
    previews = min(job.previews, max(0, job.steps - 1))
    drawn = 0 if enlarge.image else images * job.width * job.height
    decoded = drawn + (2 + previews) * tile_pixels
    files = images * math.prod(enlarge.size) * (FILE_WORK[output] + previews * PREVIEW_WORK)
    branches = 1 + len(job.regions)
    steps = drawn * job.passes[0][1] * (branches + job.sampling.guided)
    steps += tile_pixels * enlarge.steps * (branches + enlarge.sampling.guided)
    work = steps + decoded * DECODING_WORK + files
    if work > allowed:
        message = (
            f"the request's work is {work}, the maximum {allowed}"
            f" ({images} images in {tiles} tiles of {math.prod(enlarge.tiling.tile)} pixels,"
            f" {job.steps} steps, encoding, decoding and files)"
        )
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


# ── operations ────────────────────────────────────────────────────────────────────────────────────


class Layout(NamedTuple):
    """An image padded for the networks, its sides multiples of the size step.

    Attributes:
        rgb: uint8 [H, W, 3], as the networks see it.
        weight: uint8 [H, W], how much of each pixel is repainted: 0 keeps it.
        size: (width, height) of the answer, the upper left part.
        transparent: uint8 [height, width, 4] of this size, the image as stored, if the answer keeps
            its transparency.
        feather: of the composite, in pixels.
    """

    rgb: Pixels
    weight: Pixels
    size: tuple[int, int]
    transparent: Pixels | None = None
    feather: int = FEATHER

    @property
    def canvas(self) -> Repaint:
        """The worker's input: the image, filled where it is repainted, and the mask."""
        repainted = self.weight > 0
        return Repaint(InputImage.of(fill(self.rgb, repainted)), InputImage.of(repainted))

    @property
    def padded_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def cropped(self, image: Image) -> Image:
        """Return a generated image without the padding."""
        return image_of(self.cropped_pixels(array_of(image)), image.index)

    def cropped_pixels(self, image: Pixels) -> Pixels:
        """Return a generated image [H, W, 3] without the padding."""
        return crop(image, *self.size)

    def composited(self, image: Image) -> Image:
        """Return the kept pixels bit for bit, generated ones elsewhere, without a seam."""
        weight = crop(self.weight, *self.size)
        original = crop(self.rgb, *self.size) if self.transparent is None else self.transparent
        generated = crop(array_of(image), *self.size)
        return image_of(composite(original, generated, weight, self.feather), image.index)

    def corrected(self, image: Pixels) -> Pixels:
        """Return a generated image [H, W, 3] without the padding and without a seam to the kept."""
        weight, original = crop(self.weight, *self.size), crop(self.rgb, *self.size)
        return corrected(original, crop(image, *self.size), weight > 0, self.feather)


def _generate(request: GenerateRequest, drafted: Draft, uploads: Uploads) -> Plan:
    size = drafted.size()
    regions, parameters = _regions(request.regions, whole(size, size), drafted, uploads)
    if request.hires is None:
        job = drafted.job(size, request.prompt, regions=regions)
        return Plan("generate", job, size, parameters)
    scale, strength = request.hires.scale, request.hires.strength
    sampling = drafted.sampling.with_steps(request.hires.steps or drafted.sampling.steps).unguided
    enlarge = drafted.enlarge(size, scale, strength, sampling, "hires.scale")
    enlarge = replace(enlarge, regions=tuple(_enlarged_region(each, enlarge) for each in regions))
    job = drafted.job(size, request.prompt, regions=regions, enlarge=enlarge)
    hires = {"scale": scale, "strength": strength, "steps": sampling.steps}
    parameters |= {"width": size[0], "height": size[1], "hires": hires}
    return Plan("generate", job, enlarge.size, parameters, partial(_shown, enlarge))


def _inpaint(request: InpaintRequest, drafted: Draft, uploads: Uploads) -> Plan:
    choose = _choose_view(request, drafted, uploads, regions=len(request.regions))
    image, view = decode_view(request.image, "image", choose, uploads)
    weight = _inpaint_weight(request, image, view, uploads)
    # Without a mask, the transparent part is drawn, and the answer is opaque.
    is_cut_out = request.mask is None
    layout = _layout(
        replace(image, alpha=None) if is_cut_out else image,
        view.placed(weight, outside=255),
        view,
        drafted,
        request.feather,
    )
    if not layout.weight.any():
        raise _empty_mask("mask: nothing to repaint in the part of the image that fit leaves")
    regions, region_parameters = _regions(request.regions, view, drafted, uploads)
    references, reference_parameters = _references(request.references, drafted, uploads)
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
    restoration, held = _restore(request, layout, view, original if keeps else None, files)
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
    choose = _choose_canvas(request, margins, drafted, uploads)
    image, view = decode_view(request.image, "image", choose, uploads)
    kept = np.zeros(image.rgb.shape[:2], dtype=np.uint8)
    layout = _layout(image, view.placed(kept, outside=255), view, drafted, request.feather)
    canvas = whole(view.full_size, view.size)
    regions, region_parameters = _regions(request.regions, canvas, drafted, uploads)
    references = _shown_by_image(request.prompt, request.image, drafted, uploads)
    content = request.image

    def original() -> tuple[Pixels, Pixels]:
        sent = Uploads(uploads.limits).decode(content).stored
        return sent, np.zeros(sent.shape[:2], dtype=np.uint8)

    restoration, held = _restore(request, layout, view, original, [content])
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
        image, view = _fitted_reference(content, size, request.fit, drafted, uploads)
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
    choose = _choose_view(request, drafted, uploads, steps=steps)
    image, view = decode_view(request.image, "image", choose, uploads)
    if isinstance(request, EditOrInpaintRequest) and image.has_alpha:
        check_operation(drafted.config, "inpaint")
        return _inpaint(request.inpaint, drafted, uploads)
    beyond = view.placed(np.zeros(image.rgb.shape[:2], dtype=np.uint8), outside=255)
    layout = _layout(image, beyond, view, drafted)
    references, reference_parameters = _references(request.references, drafted, uploads)
    restoration, held = _restore(request, layout, view, None, [])
    job = drafted.job(
        layout.padded_size,
        request.prompt,
        steps=steps,
        canvas=Edit(layout.canvas.picture, request.strength),
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
    scale, strength = request.scale, request.strength
    # Each tile knows the whole prompt, and guidance would draw all of it in every tile.
    if request.guidance_scale is None:
        drafted = replace(drafted, sampling=drafted.sampling.unguided)
    # Before the image is decoded. A rotation swaps the sides, which have one bound.
    drafted.enlarge(uploads.stored_size(request.image), scale, strength)
    image = uploads.decode(request.image)
    enlarge = drafted.enlarge(image.size, scale, strength)
    for param, side, actual in (
        ("width", request.width, enlarge.size[0]),
        ("height", request.height, enlarge.size[1]),
    ):
        if side not in (None, actual):
            raise invalid_value(param, f"must be the result's, {actual}; leave it out", side)
    canvas = lanczos(image.on_white, enlarge.size, enlarge.tiling.canvas)
    references = _shown_by_image(request.prompt, request.image, drafted, uploads)
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
    "upscale": (UpscaleRequest, _upscale),
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
    planner = partial(OPERATIONS[operation][1], drafted.request, drafted)
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


def _choose_view(
    request: InpaintRequest | EditRequest,
    drafted: Draft,
    uploads: Uploads,
    *,
    steps: int | None = None,
    regions: int = 0,
) -> Callable[[Size], View]:
    """Return the choice of an image's view by its size. steps, regions: as in `fitted_size`."""

    def choose(source: Size) -> View:
        enlarged = source[0] * source[1] if request.return_size == "original" else 0
        view = fitted(source, drafted.fitted_size(source, steps, regions, enlarged), request.fit)
        _check_restorable(request, view, uploads)
        return view

    return choose


def _choose_canvas(
    request: OutpaintRequest, margins: dict[str, int], drafted: Draft, uploads: Uploads
) -> Callable[[Size], View]:
    """Return the choice of a canvas with these margins by the image's size.

    margins: in pixels of the sent image.
    """

    def choose(source: Size) -> View:
        width = source[0] + margins["left"] + margins["right"]
        height = source[1] + margins["up"] + margins["down"]
        enlarged = width * height if request.return_size == "original" else 0
        regions = len(request.regions)
        size = drafted.fitted_size((width, height), regions=regions, enlarged=enlarged)
        if not keeps_ratio((width, height), size):
            allowed = f"must keep the ratio of the canvas, {width}x{height}; leave it out"
            raise invalid_value("width", allowed, f"{size[0]}x{size[1]}")
        view = extended(source, margins, size)
        _check_restorable(request, view, uploads)
        return view

    return choose


def _check_restorable(
    request: InpaintRequest | OutpaintRequest | EditRequest, view: View, uploads: Uploads
) -> None:
    """Raise ApiError 422 if an image is to be returned in a size that is too large for that."""
    most = uploads.limits.max_pixels
    width, height = view.full_size
    if request.return_size == "result" or not view.is_scaled:
        return
    if max(width * height, view.source[0] * view.source[1]) > most:
        allowed = f"an original may have at most {most} pixels; send result"
        raise invalid_value("return_size", allowed, f"original, {width}x{height}")


def _restore(
    request: InpaintRequest | OutpaintRequest | EditRequest,
    layout: Layout,
    view: View,
    original: Callable[[], tuple[Pixels, Pixels]] | None,
    files: Sequence[bytes],
) -> tuple[Restoration | None, dict[str, int]]:
    """Return how to restore the sent image's resolution, if at all, and what the job counts for it.

    files: those that `original` decodes.
    """
    if request.return_size == "result" or not view.is_scaled:
        return None, {}
    # Kept pixels come from the sent image, so only the drawn ones are enlarged.
    drawn = layout.corrected if original else layout.cropped_pixels
    restoration = Restoration(view, drawn, original, layout.feather > 0)
    held = sum(map(len, files)) if original else 0
    return restoration, {"enlarged": restoration.pixels, "held_bytes": held}


def _inpaint_weight(
    request: InpaintRequest, image: DecodedImage, view: View, uploads: Uploads
) -> Pixels:
    """Return how much of each pixel is repainted, by the mask or the image's transparency.

    image: the part of the sent image that lies in the view.
    """
    if request.mask is not None:
        mode, source = request.mask_mode, view.source
        return view.part_of_mask(uploads.mask(request.mask, mode, source, scaled=view.scaled))
    if not image.has_alpha:
        message = "mask: required, unless the image is transparent where it is to be repainted"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "missing_field", message, "mask")
    return repaint_mask(image, "alpha", image.size, "image")


def _empty_mask(message: str) -> ApiError:
    return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "empty_mask", message, "mask")


def _layout(
    image: DecodedImage, weight: Pixels, view: View, drafted: Draft, feather: int = FEATHER
) -> Layout:
    """Lay an image out on its view, and the view on a size that the weights generate.

    Args:
        image: the part of the image that lies in the view.
        weight: uint8 [H, W] of the view, how much of each pixel is repainted.
        view: the view.
        drafted: the request.
        feather: of the composite, in pixels.
    """
    step, margins = drafted.config.size_step, view.margins
    # Padding beyond a new edge is generated; beyond an old one it mirrors the image.
    right = -view.size[0] % step if margins["right"] else 0
    down = -view.size[1] % step if margins["down"] else 0
    padded_margins = {
        **margins,
        "right": margins["right"] + right,
        "down": margins["down"] + down,
    }
    canvas, _ = outpaint_canvas(image.on_white, **padded_margins)
    stored = outpaint_canvas(image.stored, **margins)[0] if image.has_alpha else None
    weight = np.pad(weight, [(0, down), (0, right)], constant_values=255)
    return Layout(drafted.padded(canvas), drafted.padded(weight), view.size, stored, feather)


def _regions(
    entries: Sequence[RegionEntry], view: View, drafted: Draft, uploads: Uploads
) -> tuple[tuple[Region, ...], dict[str, Any]]:
    """Return the regions of a view, and their parameters; masks are as large as its source."""
    if not entries:
        return (), {}
    check_operation(drafted.config, "regions")
    regions, parameters = [], []
    for i, entry in enumerate(entries):
        mask = _region_mask(entry, view, i, uploads)
        weight = region_weight(mask, entry.weight, entry.softness)
        regions.append(Region(entry.prompt, InputImage.of(drafted.padded(weight))))
        place = {"box": list(entry.box)} if entry.box else {"mask": file_hash(entry.mask or b"")}
        shape = {"weight": entry.weight, "softness": entry.softness}
        parameters.append({"prompt": entry.prompt, **place, **shape})
    return tuple(regions), {"regions": parameters}


def _region_mask(entry: RegionEntry, view: View, index: int, uploads: Uploads) -> Mask | Pixels:
    if entry.box:
        return box_mask(entry.box, *view.size)
    param, source, scaled = f"regions.{index}.mask", view.source, view.scaled
    mask = uploads.mask(entry.mask or b"", None, source, param, scaled)
    return view.placed(view.part_of_mask(mask), outside=0)


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


def _shown_by_image(
    prompt: str, content: bytes, drafted: Draft, uploads: Uploads
) -> tuple[Reference, ...]:
    """Return the image itself as the condition if there is no prompt and the weights support it."""
    if prompt.strip() or "variations" not in drafted.config.operations:
        return ()
    return (Reference(reference_image(content, "image", uploads), 1.0),)


def _enlarged_region(region: Region, enlarge: Enlarge) -> Region:
    """Return a region with its weight scaled to the tiles' canvas."""
    weight = lanczos(region.weight.array, enlarge.size, enlarge.tiling.canvas)
    return Region(region.prompt, InputImage.of(weight))


def _shown(enlarge: Enlarge, image: Image) -> Image:
    """Return an enlarged image without the padding, or a preview from before it is enlarged."""
    pixels = array_of(image)
    if (image.width, image.height) != enlarge.tiling.canvas:
        return image_of(lanczos(pixels, enlarge.size), image.index)
    return image_of(crop(pixels, *enlarge.size), image.index)


def _keyframe(entry: KeyframeEntry, prompt: str, index: int, uploads: Uploads) -> Keyframe:
    if entry.image is None:
        return Keyframe(entry.prompt or "")
    return Keyframe(prompt, reference_image(entry.image, f"keyframes.{index}.image", uploads))


# ── arrays to and from the worker's pipe ──────────────────────────────────────────────────────────


def reference_image(content: bytes, param: str, uploads: Uploads) -> InputImage:
    """Return a file's image for CLIP, scaled down if it is much larger than CLIP reads."""
    return InputImage.of(uploads.decode(content, param, reference_size).on_white)


def _fitted_reference(
    content: bytes, size: Size | None, mode: FitMode, drafted: Draft, uploads: Uploads
) -> tuple[InputImage, View]:
    """Return a file's image for CLIP in the ratio of this size, and its view.

    size: default: the one that follows the image.
    """

    def choose(source: Size) -> View:
        return framed(source, size or drafted.size_for(source), mode, REFERENCE_SIDE)

    image, view = decode_view(content, "image", choose, uploads)
    canvas, kept = outpaint_canvas(image.on_white, **view.margins)
    return InputImage.of(fill(canvas, ~kept)), view


def reference_size(stored: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of at most `REFERENCE_SIDE` pixels in the same ratio."""
    scale = min(1.0, REFERENCE_SIDE / max(stored))
    return max(1, round(stored[0] * scale)), max(1, round(stored[1] * scale))


def array_of(image: Image) -> Pixels:
    """Return an image as uint8 [H, W, 3], or [H, W, 4] with alpha; the worker's have none."""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, -1)


def image_of(array: Pixels, index: int) -> Image:
    """Return uint8 [H, W, 3], or [H, W, 4] with alpha, as an image of an answer."""
    return Image(index, array.shape[1], array.shape[0], np.ascontiguousarray(array).tobytes())
