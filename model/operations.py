"""What a request means in tokens: a row with its start tokens, conditions and schedule. The sampling loop itself is `pipeline.advance`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from model.config import SamplingConfig
from model.denoiser import Condition
from model.sampling import NEVER, Noise, ramp, timesteps


@dataclass(eq=False)
class Row:
    """One image on its way.

    tokens: [H, W], now. conditional, unconditional: conditions of one row each; without guidance the second is None.
    """

    sampling: SamplingConfig
    noise: Noise
    conditional: Condition
    unconditional: Condition | None
    tokens: Tensor
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step >= self.sampling.steps

    @cached_property
    def times(self) -> list[float]:
        return timesteps(self.sampling.steps)

    @cached_property
    def temperatures(self) -> list[float]:
        return ramp(self.sampling.temperature, self.sampling.steps)

    @cached_property
    def guidances(self) -> list[float]:
        """Guidance of every step; 1 where it has stopped."""
        s = self.sampling
        return [g if i < s.guidance_steps else 1.0 for i, g in enumerate(ramp(s.guidance, s.steps))]

    @property
    def branches(self) -> tuple[tuple[Condition, float], ...]:
        """This step's lanes and their share in the outcome."""
        guidance = self.guidances[self.step]
        if self.unconditional is None or guidance == 1.0:
            return ((self.conditional, 1.0),)
        return ((self.conditional, guidance), (self.unconditional, 1.0 - guidance))

    @property
    def renoise_probability(self) -> float:
        """Chance of each token to return to its start token after this step."""
        return self.times[self.step + 1] if self.step < self.sampling.renoise_steps else NEVER


def generate(sampling: SamplingConfig, noise: Noise, conditional: Condition, unconditional: Condition | None) -> Row:
    """Text to image: begin with nothing but noise."""
    return Row(sampling, noise, conditional, unconditional if sampling.guided else None, tokens=noise.start)
