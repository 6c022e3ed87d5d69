"""Choose a request's preset and sampling, or refuse fields that do not fit each other."""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

from model.config import QUALITY, BundleConfig, Preset, Recipe, SamplingConfig
from server.api.errors import ApiError, invalid_value, shortened
from server.api.schemas import GenerateRequest, RecipeFields
from server.settings import Settings

UNGUIDED = (1.0, 1.0)


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
