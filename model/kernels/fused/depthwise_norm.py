"""A depthwise 3 × 3 convolution and the layer norm of its result in one kernel, channels last, and the plain twin.

A program has all channels of a few pixels, so the norm's sums stay with it. Where there is a skip, every output channel reads two input
channels of the skip laid behind x: they are read from where they are instead of being laid together.

Letters: B rows, H W grid, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_PIXELS = 4


def plain_depthwise_norm(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The twin: x and skip [B, H, W, C], weight [C, 1 or 2, 3, 3] as a convolution has it, bias [C] → [B, H, W, C]."""
    y = x if skip is None else torch.cat([x, skip], dim=-1)
    y = F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(bias)).permute(0, 2, 3, 1)
    return F.layer_norm(y, y.shape[-1:], eps=1e-6)


def taps_of(weight: Tensor) -> Tensor:
    """A convolution's weight [C, n, 3, 3] as the kernel reads it, [9, n, C]: neighbours in memory are neighbours in channels."""
    return weight.detach().permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def depthwise_norm(x: Tensor, skip: Tensor | None, taps: Tensor, bias: Tensor) -> Tensor:
    """As the twin. x and skip are contiguous, C is even where there is a skip."""
    B, H, W, C = x.shape
    out = torch.empty_like(x)
    grid = (triton.cdiv(B * H * W, _PIXELS),)
    shape = (B * H * W, H, W, C)
    paired, block = skip is not None, triton.next_power_of_2(C)
    _depthwise_norm[grid](x, x if skip is None else skip, taps, bias, out, *shape, PAIRED=paired, PIXELS=_PIXELS, BLOCK=block, num_warps=8)
    return out


@triton.jit
def _depthwise_norm(x, skip, taps, bias, out, pixels, H, W, C, PAIRED: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    n, c = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, BLOCK)
    inside = (c < C)[None, :]
    h, w = (n // W) % H, n % W
    total = tl.zeros([PIXELS, BLOCK], tl.float32) + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        there = (n < pixels) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
        mask = there[:, None] & inside
        place = (n + down * W + right).to(tl.int64)[:, None] * C
        if PAIRED:
            of_x = (c < C // 2)[None, :]
            for half in tl.static_range(2):
                channel = (2 * c + half)[None, :]
                value = tl.load(x + place + channel, mask=mask & of_x, other=0.0).to(tl.float32)
                value += tl.load(skip + place + channel - C, mask=mask & (c >= C // 2)[None, :], other=0.0).to(tl.float32)
                total += value * tl.load(taps + (2 * tap + half) * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        else:
            value = tl.load(x + place + c[None, :], mask=mask, other=0.0).to(tl.float32)
            total += value * tl.load(taps + tap * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(total, axis=1)[:, None] / C  # beyond the last channel all is zero
    apart = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(apart * apart, axis=1)[:, None] / C
    result = (apart / tl.sqrt(variance + 1e-6)).to(out.dtype.element_ty)
    tl.store(out + n.to(tl.int64)[:, None] * C + c[None, :], result, mask=(n < pixels)[:, None] & inside)
