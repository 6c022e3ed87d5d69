"""GELU and global response norm over an image in three passes instead of a dozen, and the twin.

The first pass writes the GELU and sums its squares as it goes; the second makes each channel's
scale; the third applies it. It could be applied while the next linear map reads its operand, but
then that product, where nearly all of a step's time goes, would have to be a kernel of our own
instead of the vendor's. To leave a pass over the activations for that would have to be measured
first.

Letters: B images, P pixels, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Into so many parts the pixels of an image are divided, whose sums are added in one order: no
# atomics, the same bits in every run.
_PARTS = 8
_BLOCK = 1024


def plain_gelu_response(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Compute the twin: x [B, P, C], gamma and beta [C] → [B, P, C]."""
    x = F.gelu(x)
    wide = x.float()
    energy = (wide * wide).sum(1, keepdim=True).add(1e-20).sqrt()
    scale = 1 + gamma * energy / (energy.mean(-1, keepdim=True) + 1e-6)
    return torch.addcmul(beta, x, scale.to(x.dtype))


def gelu_response(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Compute as the twin, for a contiguous x."""
    B, P, C = x.shape
    y = torch.empty_like(x)
    energy = x.new_empty(B, _PARTS, C, dtype=torch.float32)
    scale = x.new_empty(B, C, dtype=torch.float32)
    _gelu_energy[triton.cdiv(C, 64), _PARTS, B](
        x, y, energy, P, C, PARTS=_PARTS, BLOCK_P=32, BLOCK_C=64
    )
    _scales[B,](energy, gamma, scale, C, PARTS=_PARTS, BLOCK=triton.next_power_of_2(C), num_warps=8)
    _apply[triton.cdiv(P * C, _BLOCK), B](y, scale, beta, P * C, C, BLOCK=_BLOCK)
    return y


@triton.jit(do_not_specialize=["pixels"])
def _gelu_energy(
    x,
    y,
    energy,
    pixels,
    channels,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Replace y [B, P, C] by the GELU of x, and compute its energy.

    energy: [B, PARTS, C], the sum of squares over each part of the pixels.
    """
    c, part, row = (
        tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C),
        tl.program_id(1),
        tl.program_id(2).to(tl.int64),
    )
    share = tl.cdiv(pixels, PARTS)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, share, BLOCK_P):
        own = start + tl.arange(0, BLOCK_P)
        p = part * share + own
        inside = ((own < share) & (p < pixels))[:, None] & (c < channels)[None, :]
        place = (row * pixels + p)[:, None] * channels + c[None, :]
        wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        narrow = (0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))).to(x.dtype.element_ty)
        tl.store(y + place, narrow, mask=inside)
        rounded = narrow.to(tl.float32)
        total += tl.sum(rounded * rounded, axis=0)
    tl.store(energy + (row * PARTS + part) * channels + c, total, mask=c < channels)


@triton.jit
def _scales(energy, gamma, scale, channels, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute scale [B, C] from energy [B, PARTS, C] and gamma [C]; one program per image."""
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < channels
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(energy + (row * PARTS + part) * channels + c, mask=inside, other=0.0)
    root = tl.where(inside, tl.sqrt(total + 1e-20), 0.0)
    mean = tl.sum(root, axis=0) / channels
    factor = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + row * channels + c, 1.0 + factor * root / (mean + 1e-6), mask=inside)


@triton.jit
def _apply(x, scale, beta, size, channels, BLOCK: tl.constexpr):
    """Replace x [B, size] by x · scale + beta, by channel."""
    i, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside, c = i < size, i % channels
    place = x + row * size + i
    # Rounded as the twin rounds it.
    factor = (
        tl.load(scale + row * channels + c, mask=inside, other=0.0)
        .to(x.dtype.element_ty)
        .to(tl.float32)
    )
    shift = tl.load(beta + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        place,
        (tl.load(place, mask=inside, other=0.0).to(tl.float32) * factor + shift).to(
            x.dtype.element_ty
        ),
        mask=inside,
    )
