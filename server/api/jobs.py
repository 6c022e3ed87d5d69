"""A validated request and the chosen weights → the job the worker gets, and the parameters the client is told."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from model.canvas import Array, pad_to_multiple
from model.config import BundleConfig, Operation, SamplingConfig
from server.api.errors import ApiError, invalid
from server.api.routes_models import model_asked
from server.api.schemas import INT64, SamplingFields
from server.api.state import AppState
from server.engine.protocol import Image, Job
from server.settings import Settings

# JavaScript clients read JSON numbers exactly up to here, so a drawn seed can be sent back by any of them.
DRAWN_SEEDS = 2**53


def as_drawn(image: Image) -> Image:
    return image


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for a request. operation: its endpoint's name. size: (width, height) of the answer, which the job's, a multiple
    of the size step, may exceed. own: the operation's parameters as they take effect, files by their hash. finish: drawn → answered.
    """

    operation: str
    job: Job
    size: tuple[int, int]
    own: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Image], Image] = as_drawn

    def parameters(self, truncated: tuple[str, ...], index: int) -> dict[str, Any]:
        """All that makes image `index` what it is; asking for exactly this gives the same image again."""
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
        return {**common, **self.own, **frame, "truncated": list(truncated)}


@dataclass(frozen=True, slots=True)
class Draft:
    """A request with its weights and its sampling chosen, before any picture is looked at."""

    asked: SamplingFields
    config: BundleConfig
    sampling: SamplingConfig
    settings: Settings
    began: float = field(default_factory=time.monotonic)

    def size(self) -> tuple[int, int]:
        """What was asked for, or the weights' native size. Raises ApiError 422."""
        width, height = (
            sent or native for sent, native in zip((self.asked.width, self.asked.height), self.config.native_size, strict=True)
        )
        possible = sides(self.config, self.settings)
        for param, pixels in (("width", width), ("height", height)):
            if pixels not in possible:
                raise invalid(param, f"must be a multiple of {possible.step} from {possible[0]} to {possible[-1]} pixels", pixels)
        return width, height

    def padded(self, array: Array) -> Array:
        """[H, W, …] as large as these weights draw it, mirrored at the right and the lower edge."""
        return pad_to_multiple(array, self.config.size_step, self.config.smallest_side)

    def check_side(self, size: tuple[int, int], param: str) -> None:
        """Raises ApiError 422 if a picture of this size is larger than what may be drawn."""
        largest = sides(self.config, self.settings)[-1]
        if max(size) > largest:
            raise invalid(param, f"the result may have at most {largest} pixels a side", f"{size[0]}x{size[1]}")

    def check_sent(self, size: tuple[int, int]) -> None:
        """Raises ApiError 422 if width or height is given and is not what the answer will have."""
        for param, sent, own in (("width", self.asked.width, size[0]), ("height", self.asked.height, size[1])):
            if sent not in (None, own):
                raise invalid(param, f"is {own} here, as the picture has it; leave it out", sent)

    def job(self, size: tuple[int, int], prompt: str, *, steps: int | None = None, **parts: Any) -> Job:
        """The job of this size. steps: how many each row takes, if not all. parts: the operation's, by their names in `Job`.

        Raises ApiError 422 for more work than is allowed.
        """
        asked = self.asked
        job = Job(
            id=uuid.uuid4().hex,
            model=self.config.name,
            prompt=prompt,
            negative_prompt=asked.negative_prompt,
            width=size[0],
            height=size[1],
            sampling=self.sampling,
            deadline=self.began + (self.settings.timeout_s if asked.timeout_s is None else asked.timeout_s),
            priority=asked.priority,
            previews=asked.partial_images,
            **{"seeds": seeds(asked.seed, asked.n), **parts},
        )
        _check_work(job, self.sampling.steps if steps is None else steps, self.settings.max_request_work)
        return job


def draft(asked: SamplingFields, operation: Operation, state: AppState) -> Draft:
    """Raises ApiError: 404 for unknown weights, 400 for what they were not made for, 422 for fields that do not fit each other."""
    if asked.partial_images and not asked.stream:
        raise invalid("partial_images", "previews come in a stream only: send stream true", asked.partial_images)
    config = model_asked(asked.model, state.models)
    check_operation(config, operation)
    return Draft(asked, config, _sampling(asked, config, state.settings), state.settings)


def sides(config: BundleConfig, settings: Settings) -> range:
    """What width and height may be, in pixels."""
    return range(config.smallest_side, settings.max_side + 1, config.size_step)


def check_operation(config: BundleConfig, operation: Operation) -> None:
    """Raises ApiError if these weights were not made for it."""
    if operation not in config.operations:
        message = f"model: {config.name} cannot {operation}; it can {', '.join(config.operations)}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_operation", message, "model")


def _sampling(request: SamplingFields, config: BundleConfig, settings: Settings) -> SamplingConfig:
    sampling = config.recipe.sampling(
        steps=request.num_inference_steps,
        renoise_steps=request.renoise_steps,
        guidance=request.guidance_scale,
        guidance_steps=request.guidance_steps,
        temperature=request.temperature,
        sampler=request.sampler,
        typical_mass=request.typical_mass,
        renoise_mode=request.renoise_mode,
        deterministic=settings.deterministic if request.deterministic is None else request.deterministic,
    )
    if sampling.sampler not in config.samplers:
        message = f"sampler: {config.name} draws by {', '.join(config.samplers)} (sent: {sampling.sampler!r})"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_sampler", message, "sampler")
    for param, count in (("renoise_steps", sampling.renoise_steps), ("guidance_steps", sampling.guidance_steps)):
        if count > sampling.steps:
            raise invalid(param, f"must be from 0 to num_inference_steps, which is {sampling.steps}", count)
    return sampling


def _check_work(job: Job, steps: int, allowed: int) -> None:
    pixels, branches = job.width * job.height, 1 + len(job.regions) + job.sampling.guided
    work = len(job.seeds) * steps * pixels * branches
    if work > allowed:
        message = (
            f"the request costs {work}, more than the {allowed} allowed"
            f" ({len(job.seeds)} images of {pixels} pixels, {steps} steps of {branches} branches)"
        )
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


def seeds(asked: int | None, n: int) -> tuple[int, ...]:
    """Of n images: from the one that was asked for on, or from one that is drawn."""
    first = secrets.randbelow(DRAWN_SEEDS) if asked is None else asked
    return tuple((first + i + INT64) % (2 * INT64) - INT64 for i in range(n))
