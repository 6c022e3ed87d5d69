"""Define how an image is drawn: recipes, and one request's sampling. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from model.network_config import STRICT, Schedule

Sampler = Literal["multinomial", "argmax", "typical", "quant"]
PriorSampler = Literal["ddpm", "ddim"]
# The path between two conditionings: straight, or along the great circle.
Interpolation = Literal["lerp", "slerp"]
# What takes a renoised token's place: its start token, what it was before the step, or a fresh
# random one.
RenoiseMode = Literal["start", "prev", "rand"]
# Which tokens become noise again: independent random ones; the first in a low-discrepancy order,
# which spreads them evenly; or those that the denoiser is least sure of.
RenoiseOrder = Literal["random", "halton", "confidence"]

# The preset that every bundle has: its recipe and its first denoiser.
QUALITY = "quality"
# The name of the first denoiser, as of its file.
DENOISER = "denoiser"


@dataclass(frozen=True)
class SamplingConfig:
    """The sampling of one image, with all defaults filled in.

    guidance, temperature: (first step's value, last step's value), linear in between; guidance
    applies to `guidance_steps` steps, of which the first is number `guidance_start`. renoise_steps:
    after how many of the first steps start tokens are put back. preset: its prior's settings are
    used. denoiser: the network that takes the steps. attention_weights: as of a recipe; None: the
    preset's.
    """

    steps: int
    renoise_steps: int
    guidance: tuple[float, float]
    guidance_steps: int
    temperature: tuple[float, float]
    sampler: Sampler
    typical_mass: float = 0.2
    deterministic: bool = False
    schedule: Schedule = "linear"
    renoise_mode: RenoiseMode = "start"
    renoise_order: RenoiseOrder = "random"
    guidance_start: int = 0
    preset: str = QUALITY
    denoiser: str = DENOISER
    attention_weights: tuple[float, float] | None = None

    @property
    def guided(self) -> bool:
        """Return whether any step needs the unconditional branch."""
        return self.guidance_steps > 0 and self.guidance != (1.0, 1.0)

    @property
    def unguided(self) -> SamplingConfig:
        """The same sampling without guidance."""
        return replace(self, guidance=(1.0, 1.0))

    def with_steps(self, steps: int) -> SamplingConfig:
        """Return the same sampling in so many steps; other step counts keep their share of them."""
        guidance_steps = round(steps * self.guidance_steps / self.steps)
        return replace(
            self,
            steps=steps,
            renoise_steps=round(steps * self.renoise_steps / self.steps),
            guidance_steps=guidance_steps,
            guidance_start=min(
                steps - guidance_steps, round(steps * self.guidance_start / self.steps)
            ),
        )


# As in a request.
StepCount = Annotated[int, Field(ge=0, le=64)]
MAX_GUIDANCE = 30
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
Temperature = Annotated[float, Field(ge=0.05, le=5)]
AttentionWeight = Annotated[float, Field(ge=0, le=100)]


# Of a recipe, in the order in which they were added.
_ADDED_FIELDS = (
    "renoise_order",
    "guidance_start",
    "auto_regions",
    "prior_temperature",
    "averaged_start",
)


class PriorSettings(NamedTuple):
    """Settings that decide the prior's result, beside its text and its noise.

    temperature: factor on the noise, 0 to 1; at 0 the result depends on the text alone.
    """

    steps: int
    guidance: float
    sampler: PriorSampler
    temperature: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A bundle's sampling defaults, as its authors recommend them.

    attention_weights: factors on the attention given to the (text, image) condition tokens of the
    conditional branch; None is off. auto_regions: whether several things in a prompt are drawn each
    by a prompt of its own, in its own part of the image. prior_temperature: factor on the prior's
    noise. averaged_start: whether the unconditional branch of a first step, which sees nothing but
    noise, is its average over several noises, computed once for an image size.
    """

    __pydantic_config__ = STRICT

    num_inference_steps: Annotated[int, Field(ge=1, le=64)]
    renoise_steps: StepCount
    guidance_scale: tuple[Guidance, Guidance]
    guidance_steps: StepCount
    temperature: tuple[Temperature, Temperature]
    sampler: Sampler = "multinomial"
    typical_mass: Annotated[float, Field(ge=0, le=1)] = 0.2
    attention_weights: tuple[AttentionWeight, AttentionWeight] | None = None
    prior_steps: Annotated[int, Field(ge=1, le=1000)] = 60
    prior_guidance: Guidance = 3.0
    prior_sampler: PriorSampler = "ddpm"
    schedule: Schedule = "linear"
    renoise_mode: RenoiseMode = "start"
    renoise_order: RenoiseOrder = "random"
    guidance_start: StepCount = 0
    auto_regions: bool = False
    prior_temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    averaged_start: bool = False

    def __post_init__(self) -> None:
        if max(self.renoise_steps, self.guidance_steps) > self.num_inference_steps:
            raise ValueError("renoise_steps and guidance_steps must not exceed num_inference_steps")
        if self.guidance_start + self.guidance_steps > self.num_inference_steps:
            raise ValueError("guidance_start + guidance_steps must not exceed num_inference_steps")

    def sampling(  # noqa: PLR0913  (one argument for each field that a request may set)
        self,
        *,
        steps: int | None = None,
        renoise_steps: int | None = None,
        guidance: tuple[float, float] | None = None,
        guidance_steps: int | None = None,
        temperature: tuple[float, float] | None = None,
        sampler: Sampler | None = None,
        typical_mass: float | None = None,
        renoise_mode: RenoiseMode | None = None,
        renoise_order: RenoiseOrder | None = None,
        guidance_start: int | None = None,
        attention_weights: tuple[float, float] | None = None,
        deterministic: bool = False,
    ) -> SamplingConfig:
        """Return the recipe with a request's values.

        Absent step counts keep the recipe's share of the steps. If guidance_steps is given without
        guidance_start, guidance starts with the first step.
        """
        n = steps or self.num_inference_steps

        def share(of: int) -> int:
            return min(n, round(n * of / self.num_inference_steps))

        if guidance_start is None:
            last = n - share(self.guidance_steps)
            guidance_start = min(last, share(self.guidance_start)) if guidance_steps is None else 0

        return SamplingConfig(
            steps=n,
            renoise_steps=share(self.renoise_steps) if renoise_steps is None else renoise_steps,
            guidance=guidance or self.guidance_scale,
            guidance_steps=share(self.guidance_steps) if guidance_steps is None else guidance_steps,
            temperature=temperature or self.temperature,
            sampler=sampler or self.sampler,
            typical_mass=self.typical_mass if typical_mass is None else typical_mass,
            deterministic=deterministic,
            schedule=self.schedule,
            renoise_mode=renoise_mode or self.renoise_mode,
            renoise_order=renoise_order or self.renoise_order,
            guidance_start=guidance_start,
            attention_weights=attention_weights or self.attention_weights,
        )

    @property
    def prior(self) -> PriorSettings:
        """The prior's settings."""
        return PriorSettings(
            self.prior_steps, self.prior_guidance, self.prior_sampler, self.prior_temperature
        )

    @property
    def unwritten(self) -> set[str]:
        """Fields that `bundle.json` leaves out.

        They came after the first bundles and have their default. Without them an older bundle keeps
        its hash, and an older release reads a bundle that does not use them.
        """
        return {name for name in _ADDED_FIELDS if getattr(self, name) == getattr(Recipe, name)}
