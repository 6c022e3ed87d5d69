"""One image being denoised, and the meaning of every operation as such a row.

No operation has a loop of its own: `Pipeline.advance` steps rows of all kinds together. The fields
of a `Row` differ by what it begins from, what it keeps and which conditions it reads.

Letters: H W token grid, n steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import SamplingConfig
from model.image_request import InputImage, steps_skipped
from model.networks.denoiser_v1 import ConditionV1
from model.networks.denoiser_v3 import Condition
from model.networks.layers import to_device
from model.sampling import NEVER, Noise, guidances, ramp, renoise, timesteps

AnyCondition = Condition | ConditionV1


class PinnedTokens(NamedTuple):
    """An image's tokens [H, W], and the mask `keep` [H, W].

    Where the mask is true, every step keeps the token.
    """

    tokens: Tensor
    keep: Tensor


class RegionBranch(NamedTuple):
    """A condition for a part of the image. weight: [H, W] in [0, 1], its weight at every token."""

    condition: AnyCondition
    weight: Tensor


@dataclass(eq=False)
class Row:
    """One image being denoised.

    tokens: [H, W], now. drawn: [H, W], the latest step's draw, before some tokens became noise
    again; None before the first step. conditional, unconditional: conditions of one row each;
    without guidance the second is None. pinned: tokens that no step may change. regions: conditions
    for parts of the image; the conditional one has the weight that they leave. truncated: the
    encoders that cut one of its prompts. unconditional_start: the unconditional branch's features
    of the first step, [H, W, c_out], if they are known without computing that branch.
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
    unconditional_start: Tensor | None = None

    @property
    def done(self) -> bool:
        """Return whether all steps are taken."""
        return self.step >= self.sampling.steps

    @property
    def clean(self) -> Tensor:
        """Tokens [H, W] without renoised ones, as decoded for a preview."""
        return self.tokens if self.done or self.drawn is None else self.drawn

    def pin(self, tokens: Tensor) -> Tensor:
        """Return tokens [H, W] with the pinned ones put in."""
        return (
            tokens
            if self.pinned is None
            else torch.where(self.pinned.keep, self.pinned.tokens, tokens)
        )

    @cached_property
    def times(self) -> list[float]:
        """Share of noise before every step and at the end, n + 1 values."""
        return timesteps(self.sampling.steps, self.sampling.schedule)

    @cached_property
    def temperatures(self) -> list[float]:
        """Temperature of every step."""
        return ramp(self.sampling.temperature, self.sampling.steps)

    @cached_property
    def guidances(self) -> list[float]:
        """Guidance of every step; 1 outside of its interval of steps."""
        return guidances(self.sampling)

    @cached_property
    def renoise_probabilities(self) -> list[float]:
        """Probability of each token to become noise again, after every step."""
        return [
            t if i < self.sampling.renoise_steps else NEVER for i, t in enumerate(self.times[1:])
        ]

    @property
    def renoises_by_confidence(self) -> bool:
        """Return whether this step renoises the tokens that the denoiser is least sure of."""
        s = self.sampling
        return s.renoise_order == "confidence" and self.step < s.renoise_steps

    @property
    def source(self) -> Tensor:
        """Replacements [H, W] of the tokens that become noise again after this step."""
        match self.sampling.renoise_mode:
            case "start":
                return self.noise.start
            case "prev":
                return self.tokens
            case "rand":
                return self.noise.fresh[self.step]

    @property
    def branches(self) -> tuple[AnyCondition, ...]:
        """This step's conditions: the prompt's, the regions', the unconditional one if guided."""
        asked = (self.conditional, *(region.condition for region in self.regions))
        known = self.known_unconditional is not None
        if self.unconditional is None or self.guidances[self.step] == 1.0 or known:
            return asked
        return (*asked, self.unconditional)

    @property
    def known_unconditional(self) -> Tensor | None:
        """The unconditional branch's features of this step, if it is the first and they are known.

        The row's features are then guided after the branches are mixed.
        """
        return self.unconditional_start if self.step == 0 else None

    @cached_property
    def guidance_weights(self) -> Tensor:
        """Every branch's weight at every step, [n, branches], on the device."""
        own = [1.0, *self.guidances[1:]] if self.unconditional_start is not None else self.guidances
        guidance = to_device(own, self.tokens.device)
        return torch.stack([*[guidance] * (1 + len(self.regions)), 1 - guidance], dim=1)

    @cached_property
    def coverage(self) -> Tensor | None:
        """Every branch's weight at every token, [branches, H, W]; None without regions.

        The prompt's and the regions' weights add up to one at every token.
        """
        if not self.regions:
            return None
        prompts = _prompt_coverage(self.regions)
        return torch.cat([prompts, torch.ones_like(prompts[:1])])

    @cached_property
    def schedule(self) -> Tensor:
        """1 / temperature, renoise probability and typical mass of every step, [n, 3]."""
        inverse = [1 / temperature for temperature in self.temperatures]
        mass = [self.sampling.typical_mass] * self.sampling.steps
        parts = torch.tensor([inverse, self.renoise_probabilities, mass]).T.contiguous()
        return parts.to(self.tokens.device, non_blocking=True)


def pinned_tokens(rows: Sequence[Row]) -> tuple[Tensor, Tensor] | None:
    """Return where rows keep tokens, and those tokens, [B, H, W] each; None if no row keeps any."""
    if all(row.pinned is None for row in rows):
        return None
    each = [
        row.pinned or PinnedTokens(row.tokens, torch.zeros_like(row.tokens, dtype=torch.bool))
        for row in rows
    ]
    return torch.stack([own.keep for own in each]), torch.stack([own.tokens for own in each])


def _prompt_coverage(regions: Sequence[RegionBranch]) -> Tensor:
    """Return the weight of the prompt, then of each region, [1 + regions, H, W].

    The weights of a token add up to one.
    """
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
    """Return a text-to-image row, which begins with nothing but noise.

    For v1, regions are blended into one condition that differs by position, not into branches.
    """
    unconditional = unconditional if sampling.guided else None
    if regions and isinstance(conditional, ConditionV1):
        others = [
            region.condition for region in regions if isinstance(region.condition, ConditionV1)
        ]
        conditional, regions = conditional.blended(others, _prompt_coverage(regions)), ()
    return Row(
        sampling, noise, conditional, unconditional, tokens=noise.start, regions=tuple(regions)
    )


def repaint(row: Row, pinned: PinnedTokens) -> Row:
    """Turn a new row into an inpainting or outpainting one; return it.

    pinned: the tokens to keep at every step.
    """
    row.pinned = pinned
    row.tokens = row.pin(row.tokens)
    row.unconditional_start = None  # of nothing but noise
    return row


def edit(row: Row, tokens: Tensor, strength: float) -> Row:
    """Turn a new row into one that begins with an image's tokens [H, W]; return it.

    strength: the share of the tokens that is renoised; the row joins the schedule where that much
    is noise. 0 leaves the image as it is and takes no step, 1 leaves nothing of it. The renoised
    tokens are those of the step before, so the same seed gives the same noise at every strength.
    """
    steps = row.sampling.steps
    row.step = steps_skipped(strength, steps)
    if row.step > 0:
        probability = to_device([row.times[row.step] or NEVER], tokens.device)
        row.tokens = renoise(
            tokens[None], row.noise.start[None], row.noise.renoise[row.step - 1][None], probability
        )[0]
    return row


def refine(row: Row, tokens: Tensor, strength: float) -> Row:
    """Turn a new row into one that redraws a share of an image's tokens [H, W]; return it.

    strength: as of `edit`; the tokens that are not renoised stay as they are.
    """
    row = edit(row, tokens, strength)
    if row.step > 0:
        keep = row.noise.renoise[row.step - 1] > (row.times[row.step] or NEVER)
        row.pinned = PinnedTokens(tokens, keep)
    return row


def token_mask(mask: Tensor, downscale: int) -> Tensor:
    """Return a mask of tokens [H, W] from a mask of pixels [height, width], true where to repaint.

    Every token that a masked pixel touches is masked. The sides are multiples of `downscale`.
    """
    height, width = mask.shape
    return (
        mask.view(height // downscale, downscale, width // downscale, downscale)
        .any(dim=3)
        .any(dim=1)
    )


def token_weight(weight: Tensor, downscale: int) -> Tensor:
    """Return a region's weight of tokens [H, W]: means of its weight of pixels.

    weight: [height, width].
    """
    height, width = weight.shape
    return weight.view(height // downscale, downscale, width // downscale, downscale).mean(
        dim=(1, 3)
    )


def as_tensor(image: InputImage) -> Tensor:
    """Return uint8 [H, W, 3], or [H, W] where there is one byte a pixel."""
    flat = torch.frombuffer(bytearray(image.content), dtype=torch.uint8)
    channels = flat.numel() // (image.width * image.height)
    return flat.view(image.height, image.width, *[channels] * (channels > 1))
