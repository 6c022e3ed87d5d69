"""A depthwise 3 × 3 convolution and its layer norm in one kernel, channels last, and the twin.

A program has all channels of a few pixels, so the norm's sums stay with it. Where there is a skip,
every output channel reads two input channels of the skip laid behind x: they are read from where
they are instead of being laid together.

Letters: B rows, H W grid, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Of so many values a program reads the neighbours: sixteen a thread.
_VALUES = 4096


def plain_depthwise_norm(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the twin for x and skip [B, H, W, C], weight [C, 1 or 2, 3, 3] and bias [C].

    Returns [B, H, W, C].
    """
    y = x if skip is None else torch.cat([x, skip], dim=-1)
    y = F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(bias)).permute(
        0, 2, 3, 1
    )
    return F.layer_norm(y, y.shape[-1:], eps=1e-6)


def taps_of(weight: Tensor) -> Tensor:
    """Rearrange a convolution's weight [C, n, 3, 3] as the kernel reads it, [9, C · n].

    Neighbours in memory are neighbours in channels.
    """
    return weight.detach().permute(2, 3, 0, 1).flatten(2).flatten(0, 1).contiguous()


def depthwise_norm(x: Tensor, skip: Tensor | None, taps: Tensor, bias: Tensor) -> Tensor:
    """Compute as the twin, for contiguous x and skip."""
    B, H, W, C = x.shape
    out = torch.empty_like(x)
    inputs, block = 1 if skip is None else 2, triton.next_power_of_2(C)
    pixels = max(1, _VALUES // (inputs * block))
    grid, shape = (triton.cdiv(B * H * W, pixels),), (B * H * W, H, W, C)
    _depthwise_norm[grid](
        x,
        x if skip is None else skip,
        taps,
        bias,
        out,
        *shape,
        INPUTS=inputs,
        PIXELS=pixels,
        BLOCK=block,
        num_warps=8,
    )
    return out


# The grid's sizes are as they are asked for: a kernel for those that sixteen divides would be
# compiled apart, while a request waits.
@triton.jit(do_not_specialize=["pixels", "H", "W"])
def _depthwise_norm(
    x,
    skip,
    taps,
    bias,
    out,
    pixels,
    H,
    W,
    C,
    INPUTS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, c, j = (
        tl.program_id(0) * PIXELS + tl.arange(0, PIXELS),
        tl.arange(0, BLOCK),
        tl.arange(0, INPUTS * BLOCK),
    )
    inside = (c < C)[None, :]
    h, w = (n // W) % H, n % W
    total = (
        tl.zeros([PIXELS, BLOCK], tl.float32)
        + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    )
    for down in range(
        -1, 2
    ):  # not unrolled: nine taps' loads begun at once are more than the registers hold
        for right in tl.static_range(-1, 2):
            there = (
                (n < pixels) & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
            )[:, None]
            place = (n + down * W + right).to(tl.int64)[:, None] * C + j[None, :]
            value = tl.load(x + place, mask=there & (j < C)[None, :], other=0.0).to(tl.float32)
            if INPUTS == 2:
                value += tl.load(
                    skip + place - C, mask=there & ((j >= C) & (j < 2 * C))[None, :], other=0.0
                ).to(tl.float32)
            tap = 3 * (down + 1) + right + 1
            value *= tl.load(taps + tap * INPUTS * C + j, mask=j < INPUTS * C, other=0.0).to(
                tl.float32
            )[None, :]
            total += tl.sum(tl.reshape(value, [PIXELS, BLOCK, INPUTS]), axis=2)
    mean = tl.sum(total, axis=1)[:, None] / C  # beyond the last channel all is zero
    apart = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(apart * apart, axis=1)[:, None] / C
    result = (apart / tl.sqrt(variance + 1e-6)).to(out.dtype.element_ty)
    tl.store(
        out + n.to(tl.int64)[:, None] * C + c[None, :], result, mask=(n < pixels)[:, None] & inside
    )
