"""A validated request and the chosen weights → the job the worker gets, and the parameters the client is told."""

from __future__ import annotations

import secrets
import time
import uuid
from http import HTTPStatus
from typing import Any

from model.config import BundleConfig, SamplingConfig
from server.api.errors import ApiError, invalid
from server.api.schemas import INT64, GenerateRequest, SamplingFields
from server.api.state import AppState
from server.engine.protocol import Job
from server.settings import Settings

# JavaScript clients read JSON numbers exactly up to here, so a drawn seed can be sent back by any of them.
DRAWN_SEEDS = 2**53


def plan(request: GenerateRequest, state: AppState) -> Job:
    """Raises ApiError: 404 for unknown weights, 422 for what these weights or the settings do not allow."""
    name, config = _choose_model(request.model, state.models)
    width, height = _size(request, config, state.settings)
    sampling = _sampling(request, config, state.settings)
    _check_work(request.n, sampling, width * height, state.settings.max_request_work)
    return Job(
        id=uuid.uuid4().hex,
        model=name,
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
        "deterministic": sampling.deterministic,
        "truncated": list(truncated),
    }


def _choose_model(asked: str | None, models: dict[str, BundleConfig]) -> tuple[str, BundleConfig]:
    name = next(iter(models)) if asked is None else asked
    if name not in models:
        message = f"model: no such weights; there are {', '.join(models)} (sent: {name!r})"
        raise ApiError(HTTPStatus.NOT_FOUND, "model_not_found", message, "model")
    return name, models[name]


def _size(request: SamplingFields, config: BundleConfig, settings: Settings) -> tuple[int, int]:
    width, height = (sent or native for sent, native in zip((request.width, request.height), config.native_size, strict=True))
    step = config.size_step
    for param, pixels in (("width", width), ("height", height)):
        if pixels % step or pixels > settings.max_side:
            raise invalid(param, f"must be a multiple of {step} from {step} to {settings.max_side // step * step} pixels", pixels)
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
        deterministic=settings.deterministic if request.deterministic is None else request.deterministic,
    )
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
