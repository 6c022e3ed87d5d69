"""A block of the prior in three kernels, for few rows, whose time is that of reading the weights.

`model.kernels.cpu.plain_block` is the twin.

At sixteen rows and fewer a product is over before its weights are there, so what counts is that all
of the device's processors read at once, and that little is launched in between. The first kernel
divides the outputs among programs, which leave their share of the layer norm's sums; the second
divides outputs and inputs, norms and bends (GELU) only its own inputs while its weights are on
their way, and leaves partial sums; the third adds them in one order, norms and adds them to the
row. No atomics: the same bits in every run, whatever other rows there are. Norming in the second's
and first's place would be a launch less, but every program would do all of a row again: at the
published sizes that is more arithmetic than the launch takes time.

Letters: B rows, D channels of the residual stream, I inner channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.cpu import BlockWeights

# What a tensor core multiplies at the least. With more rows the vendor's products read the weights
# as well, and are better at the rest.
ROWS = 16
# Outputs of a program of the first kernel; outputs and inputs of one of the second. The published
# sizes make 160 and 200 programs of them, enough for an H100's or H200's 132 processors, each with
# 64 to 80 KiB of weights.
_EXPANDED, _CONTRACTED, _SLICE = 32, 128, 256
_BLOCK = 256


def prior_block(h: Tensor, extra: Tensor, w: BlockWeights) -> Tensor:
    """Compute as the twin, for at most `ROWS` rows: h [B, D], extra [B, I] → [B, D]."""
    (B, D), inner = h.shape, extra.shape[1]
    h, extra = h.contiguous(), extra.contiguous()
    tiles, slices = triton.cdiv(inner, _EXPANDED), triton.cdiv(inner, _SLICE)
    y = torch.empty(B, inner, dtype=torch.float32, device=h.device)
    moments = torch.empty(tiles, 2, ROWS, dtype=torch.float32, device=h.device)
    parts = torch.empty(slices, B, D, dtype=torch.float32, device=h.device)
    out, shared = (
        torch.empty_like(h),
        {"ROWS": ROWS, "PRECISION": "ieee" if h.dtype == torch.float32 else "tf32"},
    )
    _expand[tiles,](
        h,
        w.first,
        extra,
        y,
        moments,
        B,
        D,
        inner,
        *w.first.stride(),
        TILE=_EXPANDED,
        BLOCK=_BLOCK,
        **shared,
        num_stages=4,
    )
    _contract[triton.cdiv(D, _CONTRACTED), slices](
        y, moments, w.scale, w.shift, w.last, parts, B, D, inner, *w.last.stride(),
        EXPANDED=_EXPANDED, TILES=triton.next_power_of_2(tiles), TILE=_CONTRACTED, SLICE=_SLICE,
        **shared, num_warps=16,
    )  # fmt: skip
    _join[B,](
        h,
        parts,
        w.last_scale,
        w.last_shift,
        out,
        B,
        D,
        SLICES=slices,
        BLOCK=triton.next_power_of_2(D),
        num_warps=16,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _expand(
    h, weight, extra, y, moments, rows, channels, inner, by_input, by_output,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute y [B, I] = h · weight + extra, and its moments.

    moments: [tiles, 2, ROWS], each row's mean and squared deviations in a tile.
    """
    tile = tl.program_id(0)
    m, n = tl.arange(0, ROWS), tile * TILE + tl.arange(0, TILE)
    there, inside = (m < rows)[:, None], (n < inner)[None, :]
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(0, channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        own = tl.load(
            h + m[:, None] * channels + k[None, :], mask=there & (k < channels)[None, :], other=0.0
        )
        part = tl.load(
            weight + k[:, None] * by_input + n[None, :] * by_output,
            mask=(k < channels)[:, None] & inside,
            other=0.0,
        )
        total = tl.dot(own, part, total, input_precision=PRECISION)
    place = m[:, None] * inner + n[None, :]
    total += tl.load(extra + place, mask=there & inside, other=0.0).to(tl.float32)
    tl.store(y + place, total, mask=there & inside)
    mean = tl.sum(tl.where(inside, total, 0.0), axis=1) / tl.minimum(TILE, inner - tile * TILE)
    apart = tl.where(inside, total - mean[:, None], 0.0)
    tl.store(moments + 2 * tile * ROWS + m, mean)
    tl.store(moments + (2 * tile + 1) * ROWS + m, tl.sum(apart * apart, axis=1))


@triton.jit(do_not_specialize=["rows"])
def _contract(
    y, moments, scale, shift, weight, parts, rows, channels, inner, by_output, by_input,
    ROWS: tl.constexpr, EXPANDED: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute parts [slices, B, D]: products of GELU(layer norm(y)) with the weight.

    Each part is over one slice of the inputs.
    """
    slice_ = tl.program_id(1)
    m, n, k = (
        tl.arange(0, ROWS),
        tl.program_id(0) * TILE + tl.arange(0, TILE),
        slice_ * SLICE + tl.arange(0, SLICE),
    )
    there, known = (m < rows)[:, None], k < inner
    # First of all: what follows is done while they are on their way.
    part = tl.load(
        weight + k[:, None] * by_input + n[None, :] * by_output,
        mask=known[:, None] & (n < channels)[None, :],
        other=0.0,
    )
    tile = tl.arange(0, TILES)[None, :]
    count = tl.maximum(tl.minimum(EXPANDED, inner - tile * EXPANDED), 0).to(tl.float32)
    means = tl.load(moments + 2 * tile * ROWS + m[:, None], mask=count > 0, other=0.0)
    squares = tl.load(moments + (2 * tile + 1) * ROWS + m[:, None], mask=count > 0, other=0.0)
    mean = tl.sum(count * means, axis=1)[:, None] / inner
    variance = tl.sum(squares + count * (means - mean) * (means - mean), axis=1)[:, None] / inner
    wide = tl.load(y + m[:, None] * inner + k[None, :], mask=there & known[None, :], other=0.0)
    factor = tl.load(scale + k, mask=known, other=0.0).to(tl.float32)[None, :]
    normed = (wide - mean) / tl.sqrt(variance + 1e-5) * factor + tl.load(
        shift + k, mask=known, other=0.0
    ).to(tl.float32)[None, :]
    bent = 0.5 * normed * (1.0 + tl.erf(normed * 0.7071067811865476))
    product = tl.dot(tl.where(there, bent, 0.0).to(part.dtype), part, input_precision=PRECISION)
    tl.store(
        parts + (slice_ * rows + m[:, None]) * channels + n[None, :],
        product,
        mask=there & (n < channels)[None, :],
    )


@triton.jit(do_not_specialize=["rows"])
def _join(h, parts, scale, shift, out, rows, channels, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out = h + layer norm(the sum of the parts); one program per row."""
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < channels
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SLICES):
        total += tl.load(parts + (part * rows + row) * channels + c, mask=inside, other=0.0)
    apart = tl.where(inside, total - tl.sum(total, axis=0) / channels, 0.0)
    variance = tl.sum(apart * apart, axis=0) / channels
    factor = tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
    normed = apart / tl.sqrt(variance + 1e-5) * factor + tl.load(
        shift + c, mask=inside, other=0.0
    ).to(tl.float32)
    own = tl.load(h + row * channels + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * channels + c, (own + normed).to(out.dtype.element_ty), mask=inside)
