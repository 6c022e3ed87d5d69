"""A `Draft`: a request with its weights, preset, sampling and bounds, and the job it becomes."""

from __future__ import annotations

import math
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import chain
from typing import Any, NamedTuple

from model.canvas import Array, pad_to_multiple
from model.config import QUALITY, BundleConfig, Operation, Preset, Recipe, SamplingConfig
from model.image_request import Enlarge
from model.prompt_reading import Reading
from server.api.errors import ApiError, invalid_value, shortened
from server.api.images.fit import Size, follow, within
from server.api.planning.sizes import nearest_side, nearest_size
from server.api.schemas import (
    INT64,
    AnyFormat,
    GenerateRequest,
    InterpolateRequest,
    RecipeFields,
    SamplingFields,
)
from server.engine.job import Job
from server.settings import Settings

# JavaScript reads JSON numbers exactly up to here, so that any client can send a seed back.
RANDOM_SEEDS = 2**53

Models = Mapping[str, BundleConfig]
# Operations whose width and height may be any; those of others follow from an image.
RESIZED: tuple[Operation, ...] = ("generate", "variations", "edit", "inpaint", "interpolate")
# The alias of every name that has none.
ANY_NAME = "*"
UNGUIDED = (1.0, 1.0)
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
    _readings: dict[str, Reading] = field(default_factory=dict, repr=False, compare=False)

    @property
    def deadline(self) -> float:
        """The time by which the answer must be ready, monotonic seconds."""
        timeout_s = self.request.timeout_s
        return self.arrived_at + (self.settings.timeout_s if timeout_s is None else timeout_s)

    def size(self) -> Size:
        """Return the requested or the native size, (width, height). Raises ApiError 422."""
        return drawn_size(self.request.width, self.request.height, self.config, self.settings)

    def size_for(self, source: Size) -> Size:
        """Return `size`; if one side is missing, it follows the ratio of an image of this size.

        The missing side is rounded to one that the weights generate.
        """
        sides = self.config.sides(self.settings.max_side)
        width, height = self.request.width, self.request.height
        if (width is None) == (height is None) or (width or height) not in sides:
            return self.size()
        ideal = follow(source, width, height)
        return width or nearest_side(ideal[0], sides), height or nearest_side(ideal[1], sides)

    def fitted_size(self, source: Size, steps: int | None, regions: int, enlarged: int) -> Size:
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
        sides = self.config.sides(self.settings.max_side)
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

    def read(self, prompt: str) -> Reading:
        """Return what of a text of this request is encoded, which is found out once."""
        if prompt not in self._readings:
            self._readings[prompt] = self.config.read_prompt(prompt)
        return self._readings[prompt]

    def reading(self, prompt: str) -> dict[str, str]:
        """Return a parameter that tells what of a prompt is encoded, if that is not all of it."""
        read = self.read(prompt).text
        return {} if read == prompt else {"prompt_read": read}

    def auto_regions(self, request: GenerateRequest) -> bool:
        """Return whether the things of a prompt are drawn each by a prompt of its own.

        Raises:
            ApiError: 400, asked for although the weights have no vocabulary.
        """
        if request.auto_regions and self.config.vocabulary is None:
            message = (
                f"auto_regions: {self.config.name} has no vocabulary; leave it out (sent: true)"
            )
            raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_value", message, "auto_regions")
        if request.auto_regions is not None:
            return request.auto_regions
        return self.config.preset(self.sampling.preset).recipe.auto_regions

    @property
    def previews(self) -> int:
        """Return how many previews of each image are asked for: none without a stream.

        Clients keep the field when they turn streams off.
        """
        return self.request.partial_images if self.request.stream else 0

    def workload(self, steps: int | None, regions: int) -> Workload:
        """Return the request's work but for its size. The arguments are those of `fitted_size`."""
        steps = self.sampling.steps if steps is None else steps
        previews = min(self.previews, max(0, steps - 1))
        return Workload(
            images=rows_of(self.request),
            steps=steps,
            branches=1 + regions + self.sampling.guided,
            share=self.config.relative_work(self.sampling.denoiser),
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
            kind = "sent" if param == "scale" else "drawn"
            message = (
                f"{param}: the result may have at most {largest} pixels a side;"
                f" {scale:g} times the {kind} {size[0]}x{size[1]} is {width}x{height}"
            )
            status = HTTPStatus.UNPROCESSABLE_ENTITY
            raise ApiError(status, "invalid_value", message, param)
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
        job = self._job(size, prompt, **parts)
        if job.enlarge:
            check_tiles_work(job, job.enlarge, self.output, self.settings.max_request_work)
            return job
        workload = self.workload(steps, len(job.regions))
        workload.check(size, enlarged, self.settings.max_request_work)
        return job

    def _job(self, size: Size, prompt: str, **parts: Any) -> Job:
        request = self.request
        job = Job(
            id=uuid.uuid4().hex,
            model=self.config.name,
            model_sha256=self.config.sha256,
            step_work=self.config.relative_work(self.sampling.denoiser),
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            width=size[0],
            height=size[1],
            sampling=self.sampling,
            deadline=self.deadline,
            arrived_at=self.arrived_at,
            priority=request.priority,
            previews=self.previews,
            cache_scope=self.cache_scope,
            **{"seeds": seeds(request.seed, request.n), **parts},
        )
        if self.config.vocabulary is None:
            return job
        read = {text: self.read(text).text for text in job.prompts}
        return replace(
            job,
            readings=tuple(
                item for item in (read | dict(job.readings)).items() if len({*item}) > 1
            ),
            negative_reading=self.config.read_negative(job.negative_prompt),
        )


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
        ApiError: 404 unknown weights, 400 unsupported by them or by the preset, 422 contradictory
            fields, or other weights than those of the requested hash.
    """
    config = find_model(request.model, models, settings.aliases)
    check_operation(config, operation)
    _check_weights(request, config)
    sampling = choose_sampling(request, config, settings)
    if settings.sizes == "nearest" and operation in RESIZED and request.width and request.height:
        size = nearest_size((request.width, request.height), config, settings)
        request = request.model_copy(update={"width": size[0], "height": size[1]})
    return Draft(request, config, sampling, settings, output, cache_scope)


def drawn_size(
    width: int | None, height: int | None, config: BundleConfig, settings: Settings
) -> Size:
    """Return the size at which an image of this width and height is drawn; None: the native one's.

    Raises ApiError 422.
    """
    width, height = width or config.native_size[0], height or config.native_size[1]
    if settings.sizes == "nearest":
        return nearest_size((width, height), config, settings)
    sides = config.sides(settings.max_side)
    for param, pixels in (("width", width), ("height", height)):
        if pixels not in sides:
            allowed = f"must be a multiple of {sides.step} from {sides[0]} to {sides[-1]} pixels"
            raise invalid_value(param, allowed, pixels)
    return width, height


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


def _check_weights(request: SamplingFields, config: BundleConfig) -> None:
    """Raise ApiError 422 if the request is for weights of another hash."""
    if request.model_sha256 not in (None, config.sha256):
        loaded = f"{config.name} has {config.sha256}; leave it out to draw with these weights"
        raise invalid_value("model_sha256", loaded, request.model_sha256)


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


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────


class Misfit(NamedTuple):
    """A field for which a preset is not made. reason: follows the preset's name."""

    param: str
    reason: str
    sent: object


def choose_sampling(
    request: RecipeFields, config: BundleConfig, settings: Settings
) -> SamplingConfig:
    """Return a request's sampling.

    Raises:
        ApiError: 400 unsupported by the weights or by the preset, 422 contradictory fields.
    """
    preset = choose_preset(request, config)
    deterministic, weights = request.deterministic, request.attention_weights
    sampling = config.sampling(
        preset,
        steps=request.num_inference_steps,
        renoise_steps=request.renoise_steps,
        guidance=request.guidance_scale,
        temperature=request.temperature,
        sampler=request.sampler,
        typical_mass=request.typical_mass,
        renoise_mode=request.renoise_mode,
        renoise_order=request.renoise_order,
        attention_weights=None if weights is None else (weights.text, weights.image),
        deterministic=settings.deterministic if deterministic is None else deterministic,
        **_guidance_interval(request, config.preset(preset).recipe),
    )
    if sampling.sampler not in config.samplers:
        supported = ", ".join(config.samplers)
        message = f"sampler: {config.name} supports {supported} (sent: {sampling.sampler!r})"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_sampler", message, "sampler")
    if weights is not None and not config.attends:
        sent = shortened(weights.model_dump())
        message = f"attention_weights: {config.name} has no attention; leave it out (sent: {sent})"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_value", message, "attention_weights")
    for param, count in (
        ("renoise_steps", sampling.renoise_steps),
        ("guidance_steps", sampling.guidance_steps),
    ):
        if count > sampling.steps:
            allowed = f"must be from 0 to num_inference_steps, which is {sampling.steps}"
            raise invalid_value(param, allowed, count)
    return sampling


def choose_preset(request: RecipeFields, config: BundleConfig) -> str:
    """Return the name of the preset that draws a request.

    A request that names none has the default one or, where that does not suit it, `quality`. It
    does not suit those that few steps draw worse either.

    Raises:
        ApiError: 422 unknown preset, 400 one that does not suit the request.
    """
    if request.preset is None:
        return fitting_preset(config.default_preset, request, config)
    if request.preset not in config.preset_names:
        known = ", ".join(config.preset_names)
        raise invalid_value(
            "preset", f"must be one that {config.name} has: {known}", request.preset
        )
    misfit = find_misfit(request, config.preset(request.preset))
    if misfit and request.preset != QUALITY:
        advice = f"leave {misfit.param} out, or send another preset, such as {QUALITY}"
        message = (
            f"{misfit.param}: preset {request.preset} {misfit.reason}; {advice}"
            f" (sent: {shortened(misfit.sent)})"
        )
        raise ApiError(HTTPStatus.BAD_REQUEST, "preset_conflict", message, misfit.param)
    return request.preset


def fitting_preset(name: str, request: RecipeFields, config: BundleConfig) -> str:
    """Return the preset's name if the weights have it and it suits the request, else `quality`."""
    if name not in config.preset_names or request.needs_steps:
        return QUALITY
    return QUALITY if find_misfit(request, config.preset(name)) else name


def find_misfit(request: RecipeFields, preset: Preset) -> Misfit | None:
    """Return the first field that the preset does not suit; None if it suits all of them."""
    fewest, most = preset.steps
    hires = request.hires if isinstance(request, GenerateRequest) else None
    for param, steps in (
        ("num_inference_steps", request.num_inference_steps),
        ("hires.steps", hires.steps if hires else None),
    ):
        if steps is not None and not fewest <= steps <= most:
            return Misfit(param, f"is made for {fewest} to {most} steps", steps)
    usual = preset.recipe.num_inference_steps
    for param, count in (
        ("renoise_steps", request.renoise_steps),
        ("guidance_steps", request.guidance_steps),
    ):
        if request.num_inference_steps is None and count is not None and count > usual:
            return Misfit(param, f"takes {usual} steps", count)
    if preset.guided:
        return None
    without = "draws without guidance, which this field needs"
    if request.negative_prompt.strip():
        return Misfit("negative_prompt", without, request.negative_prompt)
    field = _asks_for_guidance(request, preset.recipe)
    return Misfit(field, without, getattr(request, field)) if field else None


def _asks_for_guidance(request: RecipeFields, recipe: Recipe) -> str | None:
    """Return the field by which a request has guidance although the recipe has none.

    The recipe may have a scale that no step uses, and so may the parameters of its images.
    """
    start, end = request.guidance_start, request.guidance_end
    if request.guidance_steps == 0 or (start is not None and start == end):
        return None
    if request.guidance_scale is not None:
        return None if request.guidance_scale == UNGUIDED else "guidance_scale"
    if recipe.guidance_scale == UNGUIDED:
        return None
    fields = ("guidance_steps", "guidance_start", "guidance_end")
    return next((name for name in fields if getattr(request, name)), None)


def _guidance_interval(request: RecipeFields, recipe: Recipe) -> dict[str, int | None]:
    """Return the first step with guidance, and the number of such steps; None is the recipe's.

    Raises:
        ApiError: 422, the fields contradict each other.
    """
    start, end = request.guidance_start, request.guidance_end
    if start is None and end is None:
        return {"guidance_steps": request.guidance_steps}
    if request.guidance_steps is not None:
        allowed = "must be absent beside guidance_start and guidance_end"
        raise invalid_value("guidance_steps", allowed, request.guidance_steps)
    if start is not None and end is not None and start > end:
        raise invalid_value("guidance_start", f"must be at most guidance_end, {end:g}", start)
    n = recipe.num_inference_steps
    steps = request.num_inference_steps or n
    first = round(steps * (recipe.guidance_start / n if start is None else start))
    last_share = (recipe.guidance_start + recipe.guidance_steps) / n if end is None else end
    return {
        "guidance_start": first,
        "guidance_steps": max(0, round(steps * last_share) - first),
    }


# ── work ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a request but for its size, in branches of a step for each pixel.

    Attributes:
        images: images or frames.
        steps: steps of each image.
        branches: branches of a step.
        output: work for decoding, previews and files.
        enlarging: work for a pixel that is enlarged, its file included.
        share: a branch's work in that of the weights' first denoiser.
    """

    images: int
    steps: int
    branches: int
    output: int
    enlarging: int
    share: float

    def of(self, size: Size, enlarged: int) -> int:
        """Return the work. size: of the generated images. enlarged: pixels of each result."""
        each = self.steps * self.branches * self.share + self.output
        generated = math.ceil(size[0] * size[1] * each)
        return self.images * (generated + enlarged * self.enlarging)

    def check(self, size: Size, enlarged: int, allowed: int) -> None:
        """Raise ApiError 422 if the work is more than allowed."""
        work = self.of(size, enlarged)
        if work > allowed:
            share = f" * {self.share:.2g}" if self.share != 1 else ""
            steps = f"{_counted(self.steps, 'step')} * {_counted(self.branches, 'branch', 'es')}"
            each = f"{size[0] * size[1]} pixels * ({steps}{share} + {self.output})"
            if enlarged:
                each = f"({each} + {enlarged} pixels * {self.enlarging} to enlarge)"
            raise _too_much_work(work, allowed, f"Cost = {_counted(self.images, 'image')} * {each}")


def check_tiles_work(job: Job, enlarge: Enlarge, output: AnyFormat, allowed: int) -> None:
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
    work = math.ceil(steps * job.step_work) + decoded * DECODING_WORK + files
    if work > allowed:
        drawn_tiles = f"{tiles} tiles of {math.prod(enlarge.tiling.tile)} pixels"
        parts = f"{_counted(images, 'image')} in {drawn_tiles}, {_counted(job.steps, 'step')}"
        raise _too_much_work(work, allowed, f"It has {parts}, encoding, decoding and files")


class TooMuchWorkError(ApiError):
    """422: a request costs more than the settings allow."""


def _too_much_work(work: int, allowed: int, reason: str) -> ApiError:
    limit = f"more than PAELLERA_MAX_REQUEST_WORK ({allowed})"
    message = f"this request costs {work}, {limit}. {reason}"
    return TooMuchWorkError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural if count != 1 else ''}"


def rows_of(fields: SamplingFields) -> int:
    """Return the number of images or frames that a request asks for."""
    return fields.frames if isinstance(fields, InterpolateRequest) else fields.n
