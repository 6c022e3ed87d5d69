"""The v1 VQGAN: images to codes and back (github.com/CompVis/taming-transformers `GumbelVQ`).

    tokens = vqgan.encode(image)     # [B, 3, H, W] in [0, 1] → [B, H/f, W/f]
    image = vqgan.decode(tokens)     # and back, clamped to [0, 1]

Inside, activations are channels-last [B, H, W, C].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.network_config import VQGANV1Config
from model.networks.layers import Conv, Pointwise, channels_first, channels_last


class GroupNorm(nn.GroupNorm):
    """Group norm of 32 groups over [B, H, W, C], eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        return channels_last(super().forward(channels_first(x)))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution; a linear map on the way around where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = Pointwise(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Every pixel attends to all pixels, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (Pointwise(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        pixels = self.norm(x).flatten(1, 2)[:, None]  # [B, 1, H·W, C]
        y = F.scaled_dot_product_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        return x + self.proj_out(y).view_as(x)


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        return self.conv(F.pad(x, (0, 0, 0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat every pixel 2×2 times, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        return self.conv(
            channels_last(F.interpolate(channels_first(x), scale_factor=2.0, mode="nearest"))
        )


class Middle(nn.Module):
    """The deepest part of either half: block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, with attention if configured.

    Every level but the last ends with the way to the next.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        attention: bool,
        leave: Downsample | Upsample | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(
            AttentionBlock(outputs) for _ in range(blocks if attention else 0)
        )
        self.leave = None if leave is None else type(leave).__name__.lower()  # the published name
        if self.leave is not None:
            self.add_module(self.leave, leave)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.leave is None else self.get_submodule(self.leave)(x)


class Encoder(nn.Module):
    """Image to latents."""

    def __init__(self, config: VQGANV1Config) -> None:
        super().__init__()
        c, widths = config, config.widths
        self.conv_in = Conv(c.in_channels, c.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[i - 1] if i else c.ch,
                width,
                c.num_res_blocks,
                attention=c.attends(i),
                leave=Downsample(width) if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to image."""

    def __init__(self, config: VQGANV1Config) -> None:
        super().__init__()
        c, widths = config, config.widths
        self.conv_in = Conv(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # Listed finest first, as published, and run from the last to the first.
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, len(widths) - 1)],
                width,
                c.num_res_blocks + 1,
                attention=c.attends(i),
                leave=Upsample(width) if i else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = Conv(widths[0], c.out_ch, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class GumbelQuantizer(nn.Module):
    """A classifier over the codes, and their vectors.

    Training draws from the classifier; here the likeliest code counts.
    """

    def __init__(self, config: VQGANV1Config) -> None:
        super().__init__()
        self.proj = Pointwise(config.z_channels, config.n_embed)
        self.embed = nn.Embedding(config.n_embed, config.embed_dim)

    def likeliest(self, latents: Tensor) -> Tensor:
        """Return the likeliest codes [...] of latents [..., C].

        fp32, because half a bit decides between neighbours.
        """
        bias = None if self.proj.bias is None else self.proj.bias.float()
        return F.linear(latents.float(), self.proj.weight.flatten(1).float(), bias).argmax(-1)


class VQGANV1(nn.Module):
    """The published `GumbelVQ` without what only its training needs. Weights start at random."""

    def __init__(self, config: VQGANV1Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = GumbelQuantizer(config)
        self.quant_conv = Pointwise(config.z_channels, config.embed_dim)
        self.post_quant_conv = Pointwise(config.embed_dim, config.z_channels)

    def encode(self, image: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as codes [B, H/f, W/f].

        H and W are multiples of f.
        """
        x = channels_last(2 * image - 1)
        return self.quantize.likeliest(self.quant_conv(self.encoder(x)))

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode codes [B, h, w] to images [B, 3, h·f, w·f], clamped to [0, 1]."""
        y = self.decoder(self.post_quant_conv(self.quantize.embed(tokens)))
        return (channels_first(y) / 2 + 0.5).clamp(0, 1)
