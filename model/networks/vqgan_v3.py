"""The v3 VQGAN: images to codes and back (github.com/dome272/Paella `VQModel`).

    tokens = vqgan.encode(image)     # [B, 3, H, W] in [0, 1] → [B, H/f, W/f]
    image = vqgan.decode(tokens)     # and back; not clamped, as published

Inside, activations are channels-last [B, H, W, C].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu import LinearMap, PackedDepthwise, linear_map, supported
from model.network_config import VQGANConfig
from model.networks.layers import (
    FEW,
    Conv,
    ConvTranspose,
    Pointwise,
    by_place,
    channels_first,
    channels_last,
    from_patches,
    norm,
    norm_of_few,
    pixel_shuffle,
    pixel_unshuffle,
)


class ResidualBlock(nn.Module):
    """Depthwise 3×3, then a channel MLP.

    Six learned scalars scale, shift and weigh the two branches.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Index 0 is the published replication padding; here it is done in forward, on the
        # channels-last view.
        self.depthwise = nn.Sequential(
            nn.Identity(), nn.Conv2d(channels, channels, 3, groups=channels)
        )
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))
        self.packed: tuple[PackedDepthwise, LinearMap, LinearMap] | None = None

    @torch.no_grad()
    def pack(self, height: int, width: int) -> None:
        """Fold the scalars into the weights, and pack those for the CPU's kernels.

        The packed form is fastest for one image of this size.

        What the scalars do before a map that is linear (and, by its padding, knows no edge) or
        after it may as well be done by the map.
        """
        dtype, g = self.gammas.dtype, self.gammas.float()
        kernel, around = (p.float() for p in self.depthwise[1].parameters())
        expand, expand_bias, contract, contract_bias = (
            p.float() for p in self.channelwise.parameters()
        )
        folded = (
            kernel * (1 + g[0]) * g[2],
            (around + g[1] * kernel.sum((1, 2, 3))) * g[2],
            expand * (1 + g[3]),
            expand_bias + g[4] * expand.sum(1),
            contract * g[5],
            contract_bias * g[5],
        )
        k, b, e, e_bias, c, c_bias = (tensor.to(dtype) for tensor in folded)
        self.packed = (
            PackedDepthwise(k, b, (1, height + 2, width + 2, len(k)), padding=0),
            linear_map(e, e_bias, height * width, "gelu"),
            linear_map(c, c_bias, height * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        if self.packed is not None:
            depthwise, expand, contract = self.packed
            few = x.shape[-1] < FEW and not torch.compiler.is_exporting()
            normed = norm_of_few if few else norm
            x = x + depthwise(_replicated(normed(x)))
            return x + contract(expand(normed(x)))
        g = self.gammas
        y = channels_first(torch.addcmul(g[1], norm(x), 1 + g[0]))
        y = self.depthwise[1](
            F.pad(y, (1, 1, 1, 1), mode="replicate").contiguous(memory_format=torch.channels_last)
        )
        x = torch.addcmul(x, channels_last(y), g[2])
        y = self.channelwise(torch.addcmul(g[4], norm(x), 1 + g[3]))
        return torch.addcmul(x, y, g[5])


def _replicated(x: Tensor) -> Tensor:
    """Pad [B, H, W, C] by its outermost pixels to [B, H + 2, W + 2, C]."""
    return channels_last(F.pad(channels_first(x), (1, 1, 1, 1), mode="replicate"))


class VectorQuantizer(nn.Module):
    """The codebook; finding the nearest code is a matrix product."""

    def __init__(self, codebook_size: int, c_latent: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, c_latent)
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the nearest codes [...] of latents [..., c_latent].

        fp32, because half a bit decides between neighbours.
        """
        codes = self.codebook.weight.float()
        flat = latents.float().reshape(-1, latents.shape[-1])
        # |x − c|² without |x|², which is the same for every code.
        distance = torch.addmm(codes.square().sum(-1), flat, codes.T, alpha=-2)
        return distance.argmin(-1).view(latents.shape[:-1])


class VQGAN(nn.Module):
    """The published `VQModel`. Weights start at random."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = [
            config.c_hidden // 2 ** (config.levels - 1 - i) for i in range(config.levels)
        ]  # finest first
        self.in_block = nn.Sequential(nn.Identity(), Pointwise(12, widths[0]))
        self.down_blocks = nn.ModuleList(self._encoder(widths))
        self.vquantizer = VectorQuantizer(config.codebook_size, config.c_latent)
        self.up_blocks = nn.ModuleList(self._decoder(widths[::-1]))
        self.out_block = nn.Sequential(Pointwise(widths[0], 12))
        self.packed_out: LinearMap | None = None

    def _encoder(self, widths: list[int]) -> list[nn.Module]:
        blocks: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i:
                blocks.append(Conv(widths[i - 1], width, 4, stride=2, padding=1))
            blocks.append(ResidualBlock(width))
        latent = nn.Conv2d(widths[-1], self.config.c_latent, 1, bias=False)
        return [
            *blocks,
            nn.Sequential(latent, nn.BatchNorm2d(self.config.c_latent)),
        ]  # channels first, both

    def _decoder(self, widths: list[int]) -> list[nn.Module]:
        blocks: list[nn.Module] = [nn.Sequential(Pointwise(self.config.c_latent, widths[0]))]
        for i, width in enumerate(widths):
            if i:
                blocks.append(ConvTranspose(widths[i - 1], width, 4, stride=2, padding=1))
            blocks += [
                ResidualBlock(width) for _ in range(1 if i else self.config.bottleneck_blocks)
            ]
        return blocks

    def pack(self, height: int, width: int) -> None:
        """Pack the decoder's weights for the CPU's kernels if supported.

        The packed form is fastest for one image of this token grid.
        """
        if not supported(self.vquantizer.codebook.weight):
            return
        for block in self.up_blocks:
            if isinstance(block, ConvTranspose):
                block.pack(height, width)
                height, width = 2 * height, 2 * width
            elif isinstance(block, ResidualBlock):
                block.pack(height, width)
        weight, bias = (by_place(p.detach(), 2) for p in self.out_block[0].parameters())
        self.packed_out = linear_map(weight.flatten(1), bias, height * width)

    def encode_latents(self, image: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as latents [B, H/f, W/f, c_latent].

        The latents are neither quantised nor scaled. H and W are multiples of f.
        """
        x = self.in_block(pixel_unshuffle(image.permute(0, 2, 3, 1), 2))
        for block in self.down_blocks[:-1]:
            x = block(x)
        return channels_last(self.down_blocks[-1](channels_first(x)))

    def encode(self, image: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as codes [B, H/f, W/f]."""
        return self.vquantizer.nearest(self.encode_latents(image))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents [B, h, w, c_latent] to images [B, 3, h·f, w·f].

        The values are about [0, 1], not clamped.
        """
        x = latents.to(self.vquantizer.codebook.weight.dtype)
        for block in self.up_blocks:
            x = block(x)
        if self.packed_out is not None:
            return from_patches(self.packed_out(x), 2).permute(0, 3, 1, 2)
        return pixel_shuffle(self.out_block(x), 2).permute(0, 3, 1, 2)

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode codes [B, h, w] to images [B, 3, h·f, w·f], about [0, 1], not clamped."""
        return self.decode_latents(self.vquantizer.codebook(tokens))
