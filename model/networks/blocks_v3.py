"""The v3 denoiser's C (convolution), T (time) and A (attention) blocks under their published names.

Letters: B rows of the batch, H W grid, L condition tokens, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu import PackedDepthwise, PackedLinear
from model.networks.layers import Conv, channels_first, channels_last, norm

if TYPE_CHECKING:
    from model.kernels.triton.conv_block import FusedConvBlock  # imports Triton


class GlobalResponseNorm(nn.Module):
    """Scales every channel by its energy over the image, relative to the mean channel's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compute it for x [B, H, W, C]."""
        return torch.addcmul(self.beta, x, response(x, self.gamma))


def response(x: Tensor, gamma: Tensor) -> Tensor:
    """Return the scale [B, 1, 1, C] of the channels of x [B, H, W, C], of its type.

    gamma: [1, 1, 1, C]. Energies are fp32, because fp16 cannot hold 256².
    """
    wide = x.float()
    # `vector_norm` over the middle axes is many times slower on the CPU than this, and `square` is
    # `pow`, ten times a product's time. The root of a channel that is zero everywhere has no
    # gradient: hence the 1e-20.
    energy = (wide * wide).sum((1, 2), keepdim=True).add_(1e-20).sqrt_()
    mean = energy.mean(-1, keepdim=True).add_(1e-6)
    return torch.addcdiv(energy.new_ones(()), gamma * energy, mean).to(x.dtype)


class ConvBlock(nn.Module):
    """C: depthwise convolution, then a channel MLP with global response norm.

    The first block of an up level also reads the skip.
    """

    def __init__(self, channels: int, kernel_size: int, skip: bool) -> None:
        super().__init__()
        inputs = 2 * channels if skip else channels
        self.depthwise = Conv(
            inputs, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            GlobalResponseNorm(4 * channels),
            nn.Identity(),  # the published dropout's place
            nn.Linear(4 * channels, channels),
        )
        self.packed: tuple[PackedDepthwise, PackedLinear, Tensor, PackedLinear] | None = None
        self.fused: FusedConvBlock | None = None

    def fuse(self) -> None:
        """Compute the block by Triton's kernels from now on, where they support it."""
        from model.kernels.triton.conv_block import FusedConvBlock

        if FusedConvBlock.supports(self.depthwise):
            response = (
                self.channelwise.get_parameter("2.gamma"),
                self.channelwise.get_parameter("2.beta"),
            )
            expand, contract = (cast(nn.Linear, self.channelwise[i]) for i in (0, 4))
            self.fused = FusedConvBlock(self.depthwise, expand, response, contract)

    def pack(self, batch: int, height: int, width: int) -> None:
        """Pack the weights for the CPU's kernels, for inputs mostly of this size.

        What the response norm adds is the same everywhere, so the last map's bias holds it.
        """
        single, mlp, rows = (
            self._single_depthwise(),
            self.channelwise.get_parameter,
            batch * height * width,
        )
        bias = self.depthwise.bias if len(single) == self.depthwise.groups else None
        weight, offset = mlp("4.weight").detach(), mlp("4.bias").detach()
        added = torch.mv(weight.float(), mlp("2.beta").detach().flatten().float())
        self.packed = (
            PackedDepthwise(single, bias, (batch, height, width, len(single))),
            PackedLinear(mlp("0.weight"), mlp("0.bias"), rows, "gelu"),
            mlp("2.gamma").detach().float(),
            PackedLinear(weight, (offset.float() + added).to(offset.dtype), rows),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Compute it for x [B, H, W, C] and a skip of the same shape."""
        if self.fused is not None:
            return self.fused(x, skip)
        y = (
            self._depthwise(x)
            if skip is None
            else self._depthwise_pairs(torch.cat([x, skip], dim=-1))
        )
        if self.packed is None:
            return x + self.channelwise(norm(y))
        _, expand, gamma, contract = self.packed
        hidden = expand(norm(y))
        return contract.add_to(x, hidden * response(hidden, gamma))

    def _depthwise(self, x: Tensor) -> Tensor:
        return self.depthwise(x) if self.packed is None else self.packed[0](x)

    def _depthwise_pairs(self, x: Tensor) -> Tensor:
        """Convolve 2C channels to C, by two depthwise convolutions that are added.

        Groups of one channel have a fast kernel, groups of two have none.
        """
        if self.packed is None:
            single, padding = self._single_depthwise(), self.depthwise.padding
            y = channels_last(
                F.conv2d(channels_first(x), single, padding=padding, groups=len(single))
            )
        else:
            y = self.packed[0](x)
        pairs = y.unflatten(-1, (-1, 2))
        return pairs[..., 0] + pairs[..., 1] + self.depthwise.bias

    def _single_depthwise(self) -> Tensor:
        """Return the depthwise weight with one input per group: [C, 1, k, k], or [2C, 1, k, k].

        The latter is that of a block with a skip.
        """
        return self.depthwise.weight.flatten(0, 1).unsqueeze(1)


class TimeBlock(nn.Module):
    """T: x · (1 + a) + b with (a, b) linear in the time embedding."""

    def __init__(self, channels: int, c_r: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_r, 2 * channels)

    def scale_and_shift(self, embedding: Tensor) -> Tensor:
        """Map embeddings [B, c_r] to [B, 2C]: (1 + a), then b."""
        a, b = self.mapper(embedding).chunk(2, dim=-1)
        return torch.cat([1 + a, b], dim=-1)


class _ProjectionNames(nn.Module):
    """Parameters of a `torch.nn.MultiheadAttention` under its names.

    `AttentionBlock` computes with them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)


class _AttentionNames(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = _ProjectionNames(channels)


class AttentionBlock(nn.Module):
    """A: every pixel attends to all pixels and to the condition.

    One fused projection reads the normed pixels.
    """

    def __init__(self, channels: int, c_cond: int, nhead: int, self_attn: bool) -> None:
        super().__init__()
        self.nhead, self.self_attn = nhead, self_attn
        self.attention = _AttentionNames(channels)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, channels))
        self.packed: tuple[PackedLinear, PackedLinear] | None = None

    def pack(self, batch: int, height: int, width: int) -> None:
        """Pack the weights for the CPU's kernels, for inputs mostly of this size."""
        attn, rows = self.attention.attn, batch * height * width
        self.packed = (
            PackedLinear(attn.in_proj_weight, attn.in_proj_bias, rows),
            PackedLinear(attn.out_proj.weight, attn.out_proj.bias, rows),
        )

    def condition_kv(self, sequence: Tensor, weights: Tensor | None) -> Tensor:
        """Map a condition sequence [B, L, c_cond] to keys and values [B, L, 2C].

        weights [B, L] scale the values: the same as scaling the attention after its softmax, and a
        fused kernel can stay.
        """
        attn = self.attention.attn
        C = attn.out_proj.in_features
        kv = F.linear(self.kv_mapper(sequence), attn.in_proj_weight[C:], attn.in_proj_bias[C:])
        if weights is None:
            return kv
        return torch.cat([kv[..., :C], kv[..., C:] * weights[..., None].to(kv.dtype)], dim=-1)

    def folded_kv(self) -> tuple[Tensor, Tensor]:
        """Return both maps of `condition_kv` as one: weight [2C, c_cond], bias [2C]."""
        attn, dtype = self.attention.attn, self.attention.attn.in_proj_weight.dtype
        mapper, mapper_bias = (p.float() for p in self.kv_mapper.parameters())
        weight, bias = (
            p[attn.out_proj.in_features :].float() for p in (attn.in_proj_weight, attn.in_proj_bias)
        )
        return (weight @ mapper).to(dtype), torch.addmv(bias, weight, mapper_bias).to(dtype)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
        """Compute it for x [B, H, W, C].

        kv: [B, L, 2C]. bias: [B, 1, 1, keys], added to the scores; the pixels' own keys come first
        if they are attended to.
        """
        attn = self.attention.attn
        B, H, W, C = x.shape
        pixels = norm(x).view(B, H * W, C)
        qkv = (
            F.linear(pixels, attn.in_proj_weight, attn.in_proj_bias)
            if self.packed is None
            else self.packed[0](pixels)
        )
        q, own = qkv.split((C, 2 * C), dim=-1)
        if self.self_attn:
            kv = torch.cat([own, kv], dim=1)
        q, k, v = (
            part.view(B, -1, self.nhead, C // self.nhead).transpose(1, 2)
            for part in (q, *kv.split(C, dim=-1))
        )
        y = (
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            .transpose(1, 2)
            .reshape(B, H, W, C)
        )
        return x + attn.out_proj(y) if self.packed is None else self.packed[1].add_to(x, y)
