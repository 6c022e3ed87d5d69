"""What a request means in tokens: a row with its start tokens, conditions and schedule. The sampling loop itself is `pipeline.advance`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
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

    @cached_property
    def renoise_probabilities(self) -> list[float]:
        """Chance of each token to return to its start token, after every step."""
        return [t if i < self.sampling.renoise_steps else NEVER for i, t in enumerate(self.times[1:])]

    @property
    def branches(self) -> tuple[Condition, ...]:
        """This step's lanes."""
        if self.unconditional is None or self.guidances[self.step] == 1.0:
            return (self.conditional,)
        return (self.conditional, self.unconditional)

    @cached_property
    def shares(self) -> Tensor:
        """[n, 2]: what the conditional and the unconditional branch count at every step; on the device, as no step sends numbers there."""
        guidance = torch.tensor(self.guidances, device=self.tokens.device)
        return torch.stack([guidance, 1 - guidance], dim=1)

    @cached_property
    def schedule(self) -> Tensor:
        """[n, 3]: 1 / temperature, renoise probability and typical mass of every step, on the device."""
        inverse = [1 / temperature for temperature in self.temperatures]
        mass = [self.sampling.typical_mass] * self.sampling.steps
        return torch.tensor([inverse, self.renoise_probabilities, mass], device=self.tokens.device).T.contiguous()


def generate(sampling: SamplingConfig, noise: Noise, conditional: Condition, unconditional: Condition | None) -> Row:
    """Text to image: begin with nothing but noise."""
    return Row(sampling, noise, conditional, unconditional if sampling.guided else None, tokens=noise.start)
