"""How the v1 family draws tokens: time runs from 0 to 1, drawing is locally typical, and noise may come from three places. Pure functions.

    noise = draw_noise([7], codes=8192, grid=(32, 32), steps=12)
    for tokens in sample(denoiser, clip, noise, config): ...        # [B, H, W] after every step

Letters: B rows, N branches (one or two a row), H W token grid, C channels, K codes, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.config import SamplingConfig
from model.sampling import NEVER, inverse_cdf, keep_typical, mix, ramp, renoise
from model.v1 import DenoiserV1, Modulation, modulate, noise_probability

# What takes a renoised token's place: its start token, what it was before the step, or a fresh random one.
RenoiseMode = Literal["start", "prev", "rand"]


@dataclass(frozen=True, slots=True)
class Noise:
    """The randomness of B images, drawn up front.

    start: [B, H, W] tokens. draw, renoise: [n, B, H, W] uniforms in [0, 1). fresh: [n, B, H, W] tokens, which only `rand` reads.
    """

    start: Tensor
    draw: Tensor
    renoise: Tensor
    fresh: Tensor


@dataclass(frozen=True, slots=True)
class Known:
    """A picture of which a part stays: tokens [B, H, W], and repaint [B, H, W], True where new ones are drawn."""

    tokens: Tensor
    repaint: Tensor

    def pin(self, tokens: Tensor) -> Tensor:
        return torch.where(self.repaint, tokens, self.tokens)


def draw_noise(seeds: Sequence[int], *, codes: int, grid: tuple[int, int], steps: int) -> Noise:
    """Everything random about the images of `seeds` (any int64), on the CPU; an image's is the same whatever the other seeds are.

    Start tokens come first and uniforms step by step, so the same seed at another step count begins from the same picture.
    """
    generators = [np.random.Generator(np.random.Philox(seed % 2**64)) for seed in seeds]
    start = np.stack([rng.integers(codes, size=grid, dtype=np.int64) for rng in generators])
    uniforms = np.stack([rng.random((steps, 3, *grid), dtype=np.float32) for rng in generators], axis=2)  # [n, 3, B, H, W]
    draw, renoising, fresh = torch.from_numpy(uniforms).unbind(1)
    return Noise(torch.from_numpy(start), draw, renoising, (fresh * codes).long())


def times(steps: int) -> Tensor:
    """The n + 1 times from 0 (all noise) to 1; step i goes from entry i to entry i + 1."""
    return torch.linspace(0, 1, steps + 1)


def renoise_probabilities(steps: int, renoise_steps: int) -> list[float]:
    """Each token's chance to become noise again, after every step. The last step's result has none, however many are to be renoised."""
    renoised = min(renoise_steps, steps - 1)
    chances = noise_probability(times(steps)[1:]).tolist()
    return [chance if i < renoised else NEVER for i, chance in enumerate(chances)]


def filtered(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Guided logits [..., K] in fp32, every untypical code at −∞ if that is the sampler. Raises ValueError for one v1 does not know."""
    if config.sampler == "multinomial":
        return logits.float()
    if config.sampler == "typical":
        return keep_typical(logits.float(), torch.full(logits.shape[:-1], config.typical_mass, device=logits.device))
    raise ValueError(f"v1 draws by typical or multinomial, not by {config.sampler}")


def guided_features(denoiser: DenoiserV1, tokens: Tensor, modulation: Modulation, guidance: float) -> Tensor:
    """Tokens [B, H, W] → features [B, H, W, C], mixed as uncond + guidance · (cond − uncond).

    modulation: of B conditional rows, then of B unconditional ones, which a guidance of 1 does without.
    """
    B = len(tokens)
    branches = 1 if guidance == 1.0 else 2
    row_of = torch.arange(B, device=tokens.device).repeat(branches)
    share = torch.tensor([guidance, 1 - guidance][:branches], device=tokens.device).repeat_interleave(B)
    features = denoiser.features(tokens, tuple(m[: len(row_of)] for m in modulation), row_of)
    return mix(features, row_of, share, B)


def sample(
    denoiser: DenoiserV1,
    clip: Tensor,
    noise: Noise,
    config: SamplingConfig,
    *,
    renoise_mode: RenoiseMode = "start",
    known: Known | None = None,
    draw: Callable[[Tensor, Tensor], Tensor] = inverse_cdf,
) -> Iterator[Tensor]:
    """Tokens [B, H, W] after every step, the last ones being the picture.

    clip: [B, c_clip], or [B, c_clip, h, w] where every position has its own. known: what no step changes. draw: logits [B, H, W, K] and the
    step's `noise.draw` → codes. Raises ValueError for a sampler that v1 does not know.
    """
    condition = denoiser.condition(torch.cat([clip, torch.zeros_like(clip)]), (noise.start.shape[1], noise.start.shape[2]))
    shares = denoiser.times(times(config.steps)[:-1].to(clip.device))
    temperatures, guidances = ramp(config.temperature, config.steps), ramp(config.guidance, config.steps)
    probabilities = renoise_probabilities(config.steps, config.renoise_steps)
    tokens = start = noise.start if known is None else known.pin(noise.start)
    for i in range(config.steps):
        modulation = modulate(condition, tuple(share[i : i + 1] for share in shares))
        features = guided_features(denoiser, tokens, modulation, guidances[i] if i < config.guidance_steps else 1.0)
        drawn = draw(filtered(denoiser.project(features), config) / temperatures[i], noise.draw[i])
        if probabilities[i] != NEVER:
            source = {"start": start, "prev": tokens, "rand": noise.fresh[i]}[renoise_mode]
            drawn = renoise(drawn, source, noise.renoise[i], torch.full((len(drawn),), probabilities[i], device=drawn.device))
        tokens = drawn if known is None else known.pin(drawn)
        yield tokens
