"""A `Draft`: a request with its weights, preset, sampling and bounds, and the job it becomes."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import chain
from typing import Any

from model.canvas import Array, pad_to_multiple
from model.config import BundleConfig, Operation, SamplingConfig
from model.image_request import Enlarge
from model.prompt_reading import Reading
from server.api.errors import ApiError, invalid_value, unprocessable
from server.api.images.fit import Size, follow, within
from server.api.planning.sampling_choice import choose_sampling
from server.api.planning.sizes import drawn_size, nearest_side, nearest_size
from server.api.planning.work import (
    DECODING_WORK,
    ENLARGING_WORK,
    FILE_WORK,
    PREVIEW_WORK,
    Workload,
    check_tiles_work,
    rows_of,
)
from server.api.schemas import (
    INT64,
    AnyFormat,
    GenerateRequest,
    OutpaintRequest,
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
        if (width is None) == (height is None):
            return self.size()
        ideal = follow(source, width, height)
        if self.settings.sizes == "nearest":
            return nearest_size(ideal, self.config, self.settings)
        if (width or height) not in sides:
            return self.size()
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
            size = self._followed(source)
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

    def _followed(self, source: Size) -> Size:
        """Return the requested size; a missing side follows the ratio of an image of this size."""
        size = follow(source, self.request.width, self.request.height)
        if self.settings.sizes != "nearest":
            return size
        if not isinstance(self.request, OutpaintRequest):
            return nearest_size(size, self.config, self.settings)
        # A canvas keeps its ratio.
        largest = self.config.sides(self.settings.max_side)[-1]
        return within(size, largest) if max(size) > largest else size

    def read(self, prompt: str) -> Reading:
        """Return what of a text of this request is encoded, which is found out once."""
        if prompt not in self._readings:
            self._readings[prompt] = self.config.read_prompt(prompt)
        return self._readings[prompt]

    def reading(self, prompt: str, *, whole: bool = False) -> dict[str, str]:
        """Return a parameter that tells what of a prompt is encoded, if that is not the prompt.

        whole: whether the prompt is that of a whole image.
        """
        reading = self.read(prompt)
        read = reading.whole if whole else reading.text
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
            problem = (
                f"the result may have at most {largest} pixels a side;"
                f" {scale:g} times the {kind} {size[0]}x{size[1]} is {width}x{height}"
            )
            raise unprocessable("invalid_value", param, problem)
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
        readings = {text: self.read(text).text for text in job.prompts} | dict(job.readings)
        return replace(
            job,
            readings=tuple((text, read) for text, read in readings.items() if read != text),
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
