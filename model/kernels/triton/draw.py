"""Last projection and draw in one kernel: features → codes, without ever writing the logits.

Guidance has been mixed before: the projection is linear. The multinomial draw inverts the cumulated
distribution by one uniform number a token, the same that the plain twin takes, in two passes over
the codes: one for the total, one for where the uniform lies. Both compute the product; that is less
than writing and reading what it gives.

Letters: N tokens, D features, K codes.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.sampling import inverse_cdf

Fused = Literal["multinomial", "argmax"]
SAMPLERS: tuple[Fused, ...] = ("multinomial", "argmax")


def plain_draw(
    sampler: Fused, features: Tensor, weight: Tensor, inverse: Tensor, uniform: Tensor
) -> Tensor:
    """Compute the twin: features [N, D], weight [K, D] → codes [N].

    inverse: inverse temperature, [N]. uniform: [N].
    """
    if sampler == "argmax":
        return F.linear(features, weight).argmax(-1)
    return inverse_cdf(F.linear((features * inverse[:, None]).to(features.dtype), weight), uniform)


def supported(sampler: str, weight: Tensor) -> bool:
    """Return whether the kernel knows the sampler and the projection's size."""
    D = weight.shape[1]
    return sampler in SAMPLERS and D >= 16 and D & (D - 1) == 0


def draw(
    sampler: Fused, features: Tensor, weight: Tensor, inverse: Tensor, uniform: Tensor
) -> Tensor:
    """Compute as the twin, for D a power of two from 16.

    A draw within rounding of two codes' boundary may differ.
    """
    (N, D), wide = features.shape, features.dtype == torch.float32
    codes = torch.empty(N, dtype=torch.int64, device=features.device)
    tokens = 16 if wide else 64
    # Two stages of 64 codes, 32 KiB each for 256 features: for twice the codes or for three stages
    # shared memory is too small.
    shape = {
        "D": D,
        "TOKENS": tokens,
        "BLOCK": 64,
        "PRECISION": "ieee" if wide else "tf32",
        "num_stages": 2,
    }
    features, grid = features.contiguous(), (triton.cdiv(N, tokens),)
    if sampler == "argmax":
        _argmax[grid](features, weight, codes, N, len(weight), *weight.stride(), **shape)
    else:
        _multinomial[grid](
            features,
            weight,
            inverse.contiguous(),
            uniform.contiguous(),
            codes,
            N,
            len(weight),
            *weight.stride(),
            **shape,
        )
    return codes


def draw_grid(
    sampler: str, features: Tensor, weight: Tensor, uniform: Tensor, inverse: Tensor
) -> Tensor | None:
    """Draw codes [B, H, W] from features [B, H, W, D]; None where no kernel can.

    uniform: [B, H, W]. inverse: inverse temperature, [B].
    """
    if not supported(sampler, weight):
        return None
    inverse = inverse[:, None, None].expand_as(uniform)
    codes = draw(
        cast(Fused, sampler), features.flatten(0, 2), weight, inverse.flatten(), uniform.flatten()
    )
    return codes.view_as(uniform)


@triton.jit
def _logits(
    own,
    weight,
    start,
    codes,
    by_code,
    by_feature,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute logits [TOKENS, BLOCK] of the codes from `start`, from features [TOKENS, D].

    Rounded as the twin's are; −∞ beyond the last code.
    """
    k, d = start + tl.arange(0, BLOCK), tl.arange(0, D)
    part = tl.load(
        weight + k[None, :] * by_code + d[:, None] * by_feature,
        mask=(k < codes)[None, :],
        other=0.0,
    )
    product = tl.dot(own, part, input_precision=PRECISION).to(own.dtype).to(tl.float32)
    return tl.where((k < codes)[None, :], product, -float("inf"))


@triton.jit(do_not_specialize=["tokens"])
def _multinomial(
    features, weight, inverse, uniform, out, tokens, codes, by_code, by_feature,
    D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, D)
    inside = n < tokens
    own = tl.load(
        features + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0
    )
    own = (own.to(tl.float32) * tl.load(inverse + n, mask=inside, other=1.0)[:, None]).to(
        features.dtype.element_ty
    )
    largest = tl.full([TOKENS], -float("inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for start in range(0, codes, BLOCK):
        logits = _logits(own, weight, start, codes, by_code, by_feature, D, BLOCK, PRECISION)
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), axis=1)
        largest = larger
    sought = tl.load(uniform + n, mask=inside, other=0.0) * total
    passed = tl.zeros([TOKENS], tl.float32)
    found = tl.zeros([TOKENS], tl.int32)
    for start in range(0, codes, BLOCK):
        mass = tl.exp(
            _logits(own, weight, start, codes, by_code, by_feature, D, BLOCK, PRECISION)
            - largest[:, None]
        )
        below = (passed[:, None] + tl.cumsum(mass, axis=1)) <= sought[:, None]
        found += tl.sum(below.to(tl.int32), axis=1)
        passed += tl.sum(mass, axis=1)
    tl.store(out + n, tl.minimum(found, codes - 1).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _argmax(
    features, weight, out, tokens, codes, by_code, by_feature,
    D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, D)
    inside = n < tokens
    own = tl.load(
        features + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0
    )
    largest = tl.full([TOKENS], -float("inf"), tl.float32)
    found = tl.zeros([TOKENS], tl.int32)
    for start in range(0, codes, BLOCK):
        logits = _logits(own, weight, start, codes, by_code, by_feature, D, BLOCK, PRECISION)
        better = tl.max(logits, axis=1) > largest  # of equal ones the first stays
        found = tl.where(better, start + tl.argmax(logits, axis=1).to(tl.int32), found)
        largest = tl.maximum(largest, tl.max(logits, axis=1))
    tl.store(out + n, found.to(tl.int64), mask=inside)
