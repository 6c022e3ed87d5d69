"""The v1 denoiser: token grid, CLIP embedding and time in, logits over the codebook out.

The v1 VQGAN is in `model/networks/vqgan_v1.py`.

A fully convolutional U-Net on the token grid. All it knows of prompt and time is a factor on every
channel of every block, linear in both. Parameter names and shapes are those of the published state
dict (github.com/dome272/Paella, `DenoiseUNet`), so it loads strictly; the code is arranged for
speed. What a request's tokens do not change is computed once and handed to every step:

    condition = denoiser.condition(clip, grid)      # the prompt's part of every scale and shift
    times = denoiser.times(t)                       # the time's part
    features = denoiser.features(tokens, times, condition)      # one step
    logits = denoiser.project(features)             # guidance mixes before this last projection

The published time r runs from 0 (all noise) to 1, and the network sees cos(r · π/2), the chance
that a token is noise: here that is t, 1 at the start as in v3, which goes through the steps along a
cosine instead of a line.

Letters: B rows of the batch, H W token grid, C channels, K codes. A level has H/2ⁱ · W/2ⁱ pixels
and C·2ⁱ channels, the finest is first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network_config import DenoiserV1Config
from model.networks.layers import (
    Conv,
    ConvTranspose,
    Pointwise,
    channels_first,
    channels_last,
    norm,
    sinusoid,
)
from model.networks.vqgan_v1 import VQGANV1

__all__ = ["VQGANV1", "ConditionV1", "DenoiserV1", "noise_probability"]


def noise_probability(r: Tensor) -> Tensor:
    """Return the probability that a token is noise at published time r, 0 (all noise) to 1."""
    return torch.cos(r * (torch.pi / 2))


@dataclass(frozen=True, slots=True)
class ConditionV1:
    """A prompt's share of every block's scale and shift, for B rows.

    levels: for each, [B, 1, 1, S] or a different one for every position [B, H/2ⁱ, W/2ⁱ, S]: scale,
    shift, scale, … of its blocks.
    """

    levels: tuple[Tensor, ...]

    @classmethod
    def stack(cls, conditions: Sequence[ConditionV1]) -> ConditionV1:
        """Stack conditions of one row each.

        If one of them differs by position, all are spread over the positions.
        """
        return cls(
            tuple(
                torch.cat(_spread(level))
                for level in zip(*(c.levels for c in conditions), strict=True)
            )
        )

    @property
    def length(self) -> int:
        """Positions that differ."""
        return self.levels[0].shape[1:3].numel()

    def put(self, row: int, other: ConditionV1) -> None:
        """Overwrite one row with a condition of one row with as many positions."""
        for own, level in zip(self.levels, other.levels, strict=True):
            own[row] = level[0]

    def blended(self, others: Sequence[ConditionV1], coverage: Tensor) -> ConditionV1:
        """Return one condition that differs by position.

        coverage: [1 + others, H, W], weights of this and each other one, adding up to one.

        What a condition does is linear, so this is what the published model makes of a map of
        embeddings blended in the same way.
        """
        levels = zip(self.levels, *(other.levels for other in others), strict=True)
        return ConditionV1(
            tuple(_blend(torch.cat(level), coverage, depth) for depth, level in enumerate(levels))
        )


def _spread(tensors: Sequence[Tensor]) -> list[Tensor]:
    grid = max(t.shape[1:3] for t in tensors)
    return [t.expand(-1, *grid, -1) for t in tensors]


def _blend(shares: Tensor, coverage: Tensor, depth: int) -> Tensor:
    """Blend [n, 1, 1, S] by weights [n, H, W] to [1, H/2ⁱ, W/2ⁱ, S]."""
    H, W = coverage.shape[1:]
    weights = F.interpolate(
        coverage[:, None].float(),
        size=(H >> depth, W >> depth),
        mode="bilinear",
        align_corners=False,
    )
    return (weights.permute(0, 2, 3, 1) * shares).sum(0, keepdim=True).to(shares.dtype)


class _Scalable(nn.Module):
    """Parameters of the published modulated layer norm, γ · w · LN(x) + β · w.

    w comes from the condition and an affine layer norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.ones(1, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1))


class Block(nn.Module):
    """Depthwise convolution, modulated norm, then a channel MLP.

    The first block of an up level also reads the skip.
    """

    def __init__(self, channels: int, c_cond: int, skip: bool) -> None:
        super().__init__()
        # Index 0 is the published reflection padding; here it is done in forward, on the
        # channels-last view.
        self.depthwise = nn.Sequential(
            nn.Identity(), nn.Conv2d(channels, channels, 3, groups=channels)
        )
        self.ln = _Scalable(channels)
        inputs = 2 * channels if skip else channels
        self.channelwise = nn.Sequential(
            nn.Linear(inputs, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.cond_mapper = nn.Linear(c_cond, channels)

    def scale_and_shift(self, w: Tensor) -> Tensor:
        """Map a part of the mapped condition [..., C] to its part of scale and shift [..., 2C].

        The map is linear: parts add up.
        """
        scale = self.ln.gamma.view(1) * self.ln.ln.weight
        shift = self.ln.gamma.view(1) * self.ln.ln.bias + self.ln.beta.view(1)
        return torch.cat([w * scale, w * shift], dim=-1)

    def forward(self, x: Tensor, modulation: Tensor, skip: Tensor | None) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        padded = F.pad(channels_first(x), (1, 1, 1, 1), mode="reflect").contiguous(
            memory_format=torch.channels_last
        )
        scale, shift = modulation.chunk(2, dim=-1)
        y = torch.addcmul(shift, norm(channels_last(self.depthwise[1](padded))), scale)
        if skip is not None:
            y = torch.cat([y, skip], dim=-1)
        return torch.addcmul(x, self.channelwise(y), self.gamma)


class DenoiserV1(nn.Module):
    """The published `DenoiseUNet`. Weights start at random."""

    def __init__(self, config: DenoiserV1Config) -> None:
        super().__init__()
        self.config = config
        self.widths = widths = [
            config.c_hidden // 2**i for i in reversed(range(len(config.down_levels)))
        ]  # finest first
        levels = range(len(widths))
        self.embedding = nn.Embedding(config.num_labels, widths[0])
        self.down_blocks = nn.ModuleList(self._down_level(i) for i in levels)
        self.up_blocks = nn.ModuleList(self._up_level(i) for i in reversed(levels))
        self.clf = Pointwise(widths[0], config.num_labels)

    def _blocks(self, level: int, count: int, skip: bool) -> list[nn.Module]:
        c_cond = self.config.c_clip + self.config.c_r
        return [Block(self.widths[level], c_cond, skip and repeat == 0) for repeat in range(count)]

    def _down_level(self, level: int) -> nn.ModuleList:
        entry = (
            [Conv(self.widths[level - 1], self.widths[level], 4, stride=2, padding=1)]
            if level
            else []
        )
        return nn.ModuleList(
            [*entry, *self._blocks(level, self.config.down_levels[level], skip=False)]
        )

    def _up_level(self, level: int) -> nn.ModuleList:
        leave = (
            [ConvTranspose(self.widths[level], self.widths[level - 1], 4, stride=2, padding=1)]
            if level
            else []
        )
        deepest = level == len(self.widths) - 1
        return nn.ModuleList(
            [*self._blocks(level, self.config.up_levels[-1 - level], skip=not deepest), *leave]
        )

    def _blocks_of(self, level: int) -> list[Block]:
        """Return a level's blocks on the way down, then up: the order of its modulation."""
        parts = (self.down_blocks[level], self.up_blocks[-1 - level])
        return [block for part in parts for block in part.children() if isinstance(block, Block)]

    @property
    def modulation_widths(self) -> list[int]:
        """S of every level."""
        return [2 * width * len(self._blocks_of(level)) for level, width in enumerate(self.widths)]

    def forward(self, tokens: Tensor, clip: Tensor, r: Tensor) -> Tensor:
        """Return logits [B, K, H, W] of the clean tokens.

        tokens: [B, H, W] codes; H and W are multiples of `config.token_step`, and at least twice
        that. clip: [B, c_clip], or [B, c_clip, h, w] where every position has its own. r: [B] in
        [0, 1], 0 is all noise.
        """
        condition = self.condition(clip, (tokens.shape[1], tokens.shape[2]))
        return self.project(
            self.features(tokens, self.times(noise_probability(r.float())), condition)
        ).permute(0, 3, 1, 2)

    def condition(self, clip: Tensor, grid: tuple[int, int] = (1, 1)) -> ConditionV1:
        """Return a prompt's part of every block, once per request.

        clip: [B, c_clip] or [B, c_clip, h, w]; grid: (H, W) of the tokens.

        Positions are resized bilinearly to each level.
        """
        maps = clip if clip.dim() == 4 else clip[:, :, None, None]
        return ConditionV1(
            tuple(self._clip_share(level, maps, grid) for level in range(len(self.widths)))
        )

    def _clip_share(self, level: int, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        if maps.shape[2:] != (1, 1):
            maps = F.interpolate(
                maps,
                size=(grid[0] >> level, grid[1] >> level),
                mode="bilinear",
                align_corners=False,
            )
        clip, c_clip = channels_last(maps), self.config.c_clip
        shares = [
            block.scale_and_shift(
                F.linear(clip, block.cond_mapper.weight[:, :c_clip], block.cond_mapper.bias)
            )
            for block in self._blocks_of(level)
        ]
        return torch.cat(shares, dim=-1)

    def times(self, t: Tensor) -> Tensor:
        """Map times [B] in [0, 1], 1 is all noise, to their part of every block, [B, S].

        The finest level's blocks come first.
        """
        embedding = sinusoid(t.float(), self.config.c_r).to(self.clf.weight.dtype)
        return torch.cat(
            [self._time_share(level, embedding) for level in range(len(self.widths))], dim=-1
        )

    def _time_share(self, level: int, embedding: Tensor) -> Tensor:
        c_clip = self.config.c_clip
        mapped = [
            (block, F.linear(embedding, block.cond_mapper.weight[:, c_clip:]))
            for block in self._blocks_of(level)
        ]
        return torch.cat([block.scale_and_shift(w) for block, w in mapped], dim=-1)

    def features(
        self, tokens: Tensor, times: Tensor, condition: ConditionV1, row_of: Tensor | None = None
    ) -> Tensor:
        """Run a forward pass up to the last projection: codes [B, H, W] → [N, H, W, C].

        The result has one entry for each of N conditions.

        row_of: [N], the row of tokens and times that each condition is for; absent if each has its
        own.
        """
        if row_of is not None:
            tokens, times = tokens.index_select(0, row_of), times.index_select(0, row_of)
        shares = times[:, None, None].split([share.shape[-1] for share in condition.levels], dim=-1)
        modulation = [c + t for c, t in zip(condition.levels, shares, strict=True)]
        parts = [
            iter(m.split(2 * width, dim=-1))
            for m, width in zip(modulation, self.widths, strict=True)
        ]
        x = self.embedding(tokens)
        skips: list[Tensor | None] = []
        for level, part in zip(self.down_blocks, parts, strict=True):
            x = _run(level, x, part)
            skips.append(x)
        skips[-1] = None  # the deepest level goes on from where it is
        for level, part, skip in zip(self.up_blocks, reversed(parts), reversed(skips), strict=True):
            x = _run(level, x, part, skip)
        return x

    def project(self, features: Tensor) -> Tensor:
        """Map features [..., C] to logits [..., K].

        It has a bias, so features may be mixed instead of logits only by weights that add up to
        one.
        """
        return self.clf(features)

    def sharpened(self, features: Tensor, inverse: Tensor) -> Tensor:
        """Return logits divided by a temperature, after the projection because of its bias.

        inverse: one over the temperature, [B, 1, 1, 1].
        """
        return self.project(features).float() * inverse


def _run(
    level: nn.Module, x: Tensor, modulations: Iterator[Tensor], skip: Tensor | None = None
) -> Tensor:
    for block in level.children():
        if isinstance(block, Block):
            x, skip = block(x, next(modulations), skip), None
        else:
            x = block(x)
    return x
