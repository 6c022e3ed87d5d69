"""What a request means in tokens: a row with its start tokens, conditions, schedule, and what of a picture it keeps.

No operation has a loop of its own: `pipeline.advance` steps rows of all kinds together. Letters: H W token grid, n steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import SamplingConfig
from model.image_request import steps_skipped
from model.networks.denoiser_v1 import ConditionV1
from model.networks.denoiser_v3 import Condition
from model.runtime import to_device
from model.sampling import NEVER, Noise, ramp, renoise, timesteps

AnyCondition = Condition | ConditionV1


class PinnedTokens(NamedTuple):
    """What a row takes from a picture: tokens [H, W], and where they stay as they are, keep [H, W] (True: pinned at every step)."""

    tokens: Tensor
    keep: Tensor


class RegionBranch(NamedTuple):
    """A prompt for a part of the picture. weight: [H, W] in [0, 1], how much it counts at every token."""

    condition: AnyCondition
    weight: Tensor


@dataclass(eq=False)
class Row:
    """One image on its way.

    tokens: [H, W], now. drawn: [H, W], what the last step drew, before some start tokens were put back; None before the first.
    conditional, unconditional: conditions of one row each; without guidance the second is None. pinned: what no step may change.
    regions: other prompts for parts of it; the conditional counts where they leave something. truncated: encoders that cut a prompt.
    """

    sampling: SamplingConfig
    noise: Noise
    conditional: AnyCondition
    unconditional: AnyCondition | None
    tokens: Tensor
    step: int = 0
    pinned: PinnedTokens | None = None
    regions: tuple[RegionBranch, ...] = ()
    drawn: Tensor | None = None
    truncated: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.step >= self.sampling.steps

    @property
    def clean(self) -> Tensor:
        """[H, W], the picture as far as it has come, without start tokens put back."""
        return self.tokens if self.done or self.drawn is None else self.drawn

    def pin(self, tokens: Tensor) -> Tensor:
        """[H, W] with what is kept put back."""
        return tokens if self.pinned is None else torch.where(self.pinned.keep, self.pinned.tokens, tokens)

    @cached_property
    def times(self) -> list[float]:
        return timesteps(self.sampling.steps, self.sampling.schedule)

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
        """Chance of each token to become noise again, after every step."""
        return [t if i < self.sampling.renoise_steps else NEVER for i, t in enumerate(self.times[1:])]

    @property
    def source(self) -> Tensor:
        """[H, W]: what takes the place of the tokens that become noise again after this step."""
        match self.sampling.renoise_mode:
            case "start":
                return self.noise.start
            case "prev":
                return self.tokens
            case "rand":
                return self.noise.fresh[self.step]

    @property
    def branches(self) -> tuple[AnyCondition, ...]:
        """This step's lanes: the prompt, one more for every region, and the unconditional one while there is guidance."""
        asked = (self.conditional, *(region.condition for region in self.regions))
        if self.unconditional is None or self.guidances[self.step] == 1.0:
            return asked
        return (*asked, self.unconditional)

    @cached_property
    def guidance_weights(self) -> Tensor:
        """[n, branches]: what each branch counts at every step; on the device, as no step sends numbers there."""
        guidance = to_device(self.guidances, self.tokens.device)
        return torch.stack([*[guidance] * (1 + len(self.regions)), 1 - guidance], dim=1)

    @cached_property
    def coverage(self) -> Tensor | None:
        """[branches, H, W]: where each branch counts, or None where all count everywhere. The prompts' add up to one at every token."""
        if not self.regions:
            return None
        prompts = _prompt_coverage(self.regions)
        return torch.cat([prompts, torch.ones_like(prompts[:1])])

    @cached_property
    def schedule(self) -> Tensor:
        """[n, 3]: 1 / temperature, renoise probability and typical mass of every step, on the device."""
        inverse = [1 / temperature for temperature in self.temperatures]
        mass = [self.sampling.typical_mass] * self.sampling.steps
        parts = torch.tensor([inverse, self.renoise_probabilities, mass]).T.contiguous()
        return parts.to(self.tokens.device, non_blocking=True)


def pinned_tokens(rows: Sequence[Row]) -> tuple[Tensor, Tensor] | None:
    """Where rows' tokens stay as they are and which they are, [B, H, W] each; None if no row keeps any."""
    if all(row.pinned is None for row in rows):
        return None
    each = [row.pinned or PinnedTokens(row.tokens, torch.zeros_like(row.tokens, dtype=torch.bool)) for row in rows]
    return torch.stack([own.keep for own in each]), torch.stack([own.tokens for own in each])


def _prompt_coverage(regions: Sequence[RegionBranch]) -> Tensor:
    """[1 + regions, H, W]: where the prompt counts, then each region's; they add up to one."""
    weights = torch.stack([region.weight for region in regions])
    # Regions that overlap share what there is; the prompt itself has the rest.
    weights = weights / weights.sum(0).clamp_min(1)
    return torch.cat([1 - weights.sum(0, keepdim=True), weights])


def generate(
    sampling: SamplingConfig,
    noise: Noise,
    conditional: AnyCondition,
    unconditional: AnyCondition | None,
    *,
    regions: Sequence[RegionBranch] = (),
) -> Row:
    """Text to image: begin with nothing but noise. What v1 has for regions is one condition that differs by position, not branches."""
    unconditional = unconditional if sampling.guided else None
    if regions and isinstance(conditional, ConditionV1):
        others = [region.condition for region in regions if isinstance(region.condition, ConditionV1)]
        conditional, regions = conditional.blended(others, _prompt_coverage(regions)), ()
    return Row(sampling, noise, conditional, unconditional, tokens=noise.start, regions=tuple(regions))


def repaint(row: Row, pinned: PinnedTokens) -> Row:
    """Makes a new row an inpainting or outpainting one: noise where nothing is kept, and the kept tokens pinned at every step."""
    row.pinned = pinned
    row.tokens = row.pin(row.tokens)
    return row


def edit(row: Row, tokens: Tensor, strength: float) -> Row:
    """Makes a new row begin with a picture's tokens [H, W], renoised as far as `strength` says.

    It joins the schedule where that much is noise: 0 leaves the picture as it is and takes no step, 1 leaves nothing of it. What returns to
    noise is what the step before would have renoised, so the same seed gives the same noise at every strength.
    """
    steps = row.sampling.steps
    row.step = steps_skipped(strength, steps)
    if row.step > 0:
        probability = to_device([row.times[row.step] or NEVER], tokens.device)
        row.tokens = renoise(tokens[None], row.noise.start[None], row.noise.renoise[row.step - 1][None], probability)[0]
    return row


def token_mask(mask: Tensor, downscale: int) -> Tensor:
    """A mask of pixels [height, width], True: repaint → of tokens [H, W]: every token that a masked pixel touches. Sides are multiples."""
    height, width = mask.shape
    return mask.view(height // downscale, downscale, width // downscale, downscale).any(dim=3).any(dim=1)


def token_weight(weight: Tensor, downscale: int) -> Tensor:
    """A region's weight of pixels [height, width] → of tokens [H, W], their mean."""
    height, width = weight.shape
    return weight.view(height // downscale, downscale, width // downscale, downscale).mean(dim=(1, 3))
