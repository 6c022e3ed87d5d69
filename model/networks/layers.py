"""Layers that the networks share. Activations are channels-last: [B, H, W, C], contiguous in C."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu import PackedLinear, PackedTransposed

EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """Layer-normalise the last dimension without parameters, eps 1e-6, as all v3 networks do."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


# Channels below which `norm_of_few` is faster: a vector register holds as many bf16 numbers.
FEW = 32


def norm_of_few(x: Tensor) -> Tensor:
    """Compute `norm` for a few channels on a CPU; without gradients.

    torch's kernel takes them number by number. Here means are matrix-vector products, in fp32.
    """
    channels = x.shape[-1]
    rows = x.reshape(-1, channels).float()
    mean_of = rows.new_full((channels,), 1 / channels)
    centred = rows - torch.mv(rows, mean_of)[:, None]
    scale = torch.mv(centred * centred, mean_of).add_(EPS).rsqrt_()
    return centred.mul_(scale[:, None]).to(x.dtype).view(x.shape)


def channels_first(x: Tensor) -> Tensor:
    """View [B, H, W, C] as [B, C, H, W] in channels-last memory format; no copy."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Undo `channels_first`; a copy only where a convolution chose another memory format."""
    return x.permute(0, 2, 3, 1).contiguous()


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """Rearrange [B, H, W, C] to [B, H/f, W/f, C·f²].

    The channels have the order of `torch.nn.PixelUnshuffle`.
    """
    B, H, W, C = x.shape
    x = x.view(B, H // factor, factor, W // factor, factor, C)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(B, H // factor, W // factor, C * factor**2)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Rearrange [B, H, W, C·f²] to [B, H·f, W·f, C].

    The channels have the order of `torch.nn.PixelShuffle`.
    """
    B, H, W, C = x.shape
    x = x.view(B, H, W, C // factor**2, factor, factor)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(B, H * factor, W * factor, C // factor**2)


def from_patches(x: Tensor, factor: int) -> Tensor:
    """Rearrange [B, H, W, f²·C] to [B, H·f, W·f, C], the channels by row, column and channel.

    This is `pixel_shuffle` for weights in another order, with which rows of a patch are copied
    whole.
    """
    B, H, W, _ = x.shape
    patches = x.view(B, H, W, factor, factor, -1)
    return patches.transpose(2, 3).reshape(B, H * factor, W * factor, -1)


def by_place(parameter: Tensor, factor: int) -> Tensor:
    """Reorder the first axis of a map's weight or bias from `pixel_shuffle` to `from_patches`."""
    places = factor**2
    return parameter.view(-1, places, *parameter.shape[1:]).transpose(0, 1).flatten(0, 1)


class Norm(nn.Module):
    """`norm` as a member of a published nn.Sequential."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute it; shapes as in the class."""
        return norm(x)


class Conv(nn.Conv2d):
    """A convolution [B, H, W, C] → [B, H', W', O]."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute it; shapes as in the class."""
        return channels_last(super().forward(channels_first(x)))


class ConvTranspose(nn.ConvTranspose2d):
    """A transposed convolution [B, H, W, C] → [B, H', W', O]."""

    packed: PackedTransposed | None = None

    def pack(self, height: int, width: int) -> None:
        """Pack the weights for the CPU's kernels, for one image of this size."""
        shape = (1, height, width, self.in_channels)
        padding = [int(zeros) for zeros in self.padding]
        self.packed = PackedTransposed(self.weight, self.bias, shape, self.stride, padding)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute it; shapes as in the class."""
        if self.packed is not None and output_size is None:
            return self.packed(x)
        return channels_last(super().forward(channels_first(x), output_size))


class Downsample(nn.Conv2d):
    """A 2×2 convolution of stride 2: [B, H, W, C] → [B, H/2, W/2, O].

    It is computed as a linear map of 2×2 patches.
    """

    packed: PackedLinear | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2)

    def pack(self, batch: int, height: int, width: int) -> None:
        """Pack the weights for the CPU's kernels, for outputs mostly of this size."""
        self.packed = PackedLinear(self._map(), self.bias, batch * height * width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it; shapes as in the class."""
        B, H, W, C = x.shape
        patches = (
            x.view(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C)
        )
        if self.packed is not None:
            return self.packed(patches)
        return F.linear(patches, self._map(), self.bias)

    def _map(self) -> Tensor:
        """Return the weight [O, 4C] of the linear map."""
        # A view where the weight lies channels-last in memory, as after loading a bundle.
        return self.weight.permute(0, 2, 3, 1).flatten(1)


class Upsample(nn.ConvTranspose2d):
    """A 2×2 transposed convolution of stride 2: [B, H, W, C] → [B, 2H, 2W, O].

    It is computed as a linear map of pixels.
    """

    packed: PackedLinear | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2)

    def pack(self, batch: int, height: int, width: int) -> None:
        """Pack the weights for the CPU's kernels, for inputs mostly of this size."""
        bias = None if self.bias is None else self.bias.repeat(4)
        self.packed = PackedLinear(
            self.weight.permute(2, 3, 1, 0).flatten(0, 2), bias, batch * height * width
        )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute it; shapes as in the class."""
        if self.packed is not None:
            return from_patches(self.packed(x), 2)
        y = from_patches(x @ self.weight.permute(0, 2, 3, 1).flatten(1), 2)
        return y if self.bias is None else y + self.bias


class Pointwise(nn.Conv2d):
    """A 1×1 convolution, computed as a linear map of channels: [..., C] → [..., O]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it; shapes as in the class."""
        return F.linear(x, self.weight.flatten(1), self.bias)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed times t [B] in [0, 1] as [B, dim] in fp32, as both v3 networks do.

    Sines of t·10000 come first, then cosines.
    """
    half = dim // 2
    frequencies = (
        torch.arange(half, device=t.device, dtype=torch.float32)
        .mul(-math.log(10000) / (half - 1))
        .exp()
    )
    angles = t.float()[:, None] * 10000 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, dim % 2))


def to_device(values: Sequence[float] | Sequence[bool], device: torch.device) -> Tensor:
    """Return numbers as a tensor on the device, without waiting for it.

    `torch.tensor(values, device=…)` waits until the device has finished all that was launched
    before; this only queues the copy behind it.
    """
    return torch.tensor(values).to(device, non_blocking=True)
