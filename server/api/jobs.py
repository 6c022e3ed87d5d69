"""A validated request and the chosen weights → the job the worker gets, and the parameters the client is told."""

from __future__ import annotations

import secrets
import time
import uuid
from http import HTTPStatus
from typing import Any

from model.config import BundleConfig, Operation, SamplingConfig
from server.api.errors import ApiError, invalid
from server.api.models import model_named
from server.api.schemas import INT64, GenerateRequest, SamplingFields
from server.api.state import AppState
from server.engine.protocol import Job
from server.settings import Settings

# JavaScript clients read JSON numbers exactly up to here, so a drawn seed can be sent back by any of them.
DRAWN_SEEDS = 2**53


def plan(request: GenerateRequest, state: AppState) -> Job:
    """Raises ApiError: 404 for unknown weights, 400 for what they were not made for, 422 for what they or the settings do not allow."""
    config = next(iter(state.models.values())) if request.model is None else model_named(request.model, state.models)
    check_operation(config, "generate")
    width, height = _size(request, config, state.settings)
    sampling = _sampling(request, config, state.settings)
    _check_work(request.n, sampling, width * height, state.settings.max_request_work)
    return Job(
        id=uuid.uuid4().hex,
        model=config.name,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        seeds=_seeds(request.seed, request.n),
        sampling=sampling,
        deadline=time.monotonic() + (state.settings.timeout_s if request.timeout_s is None else request.timeout_s),
        priority=request.priority,
    )


def parameters(job: Job, truncated: tuple[str, ...], index: int) -> dict[str, Any]:
    """All that makes image `index` what it is; asking for exactly this gives the same image again."""
    sampling = job.sampling
    return {
        "model": job.model,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "width": job.width,
        "height": job.height,
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
        "truncated": list(truncated),
    }


def check_operation(config: BundleConfig, operation: Operation) -> None:
    """Raises ApiError if these weights were not made for it."""
    if operation not in config.operations:
        message = f"model: {config.name} cannot {operation}; it can {', '.join(config.operations)}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "unsupported_operation", message, "model")


def _size(request: SamplingFields, config: BundleConfig, settings: Settings) -> tuple[int, int]:
    width, height = (sent or native for sent, native in zip((request.width, request.height), config.native_size, strict=True))
    step = config.size_step
    for param, pixels in (("width", width), ("height", height)):
        if pixels % step or not config.smallest_side <= pixels <= settings.max_side:
            bounds = f"from {config.smallest_side} to {settings.max_side // step * step} pixels"
            raise invalid(param, f"must be a multiple of {step} {bounds}", pixels)
    return width, height


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


def _check_work(n: int, sampling: SamplingConfig, pixels: int, allowed: int) -> None:
    branches = 2 if sampling.guided else 1
    work = n * sampling.steps * pixels * branches
    if work > allowed:
        message = (
            f"the request costs {work}, more than the {allowed} allowed"
            f" ({n} images of {pixels} pixels, {sampling.steps} steps of {branches} branches)"
        )
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_work", message)


def _seeds(asked: int | None, n: int) -> tuple[int, ...]:
    first = secrets.randbelow(DRAWN_SEEDS) if asked is None else asked
    return tuple((first + i + INT64) % (2 * INT64) - INT64 for i in range(n))
