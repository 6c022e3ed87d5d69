"""Renoise drawn tokens, pin kept ones, and prepare the next step's input in one kernel.

`model.sampling.renoise_and_pin` is the twin: three launches, or four where a row keeps something.
Letters: B rows, H W token grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def renoise_and_pin(
    drawn: Tensor,
    source: Tensor,
    uniform: Tensor,
    probability: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute as the twin."""
    B, tokens = len(drawn), drawn[0].numel()
    drawn, source, uniform, probability = (
        part.contiguous() for part in (drawn, source, uniform, probability)
    )
    clean, following = torch.empty_like(drawn), torch.empty_like(drawn)
    keep, pinned = (
        (drawn, drawn)
        if kept is None
        else (kept[0].contiguous().view(torch.uint8), kept[1].contiguous())
    )
    parts = drawn, source, uniform, probability, keep, pinned, clean, following
    _renoise_and_pin[triton.cdiv(tokens, _BLOCK), B](
        *parts, tokens, KEPT=kept is not None, BLOCK=_BLOCK
    )
    return clean, following


@triton.jit(do_not_specialize=["tokens"])
def _renoise_and_pin(
    drawn, source, uniform, probability, keep, pinned, clean, following, tokens,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside, place = i < tokens, row.to(tl.int64) * tokens + i
    own = tl.load(drawn + place, mask=inside, other=0)
    renoised = tl.load(uniform + place, mask=inside, other=1.0) <= tl.load(probability + row)
    fresh = tl.where(renoised, tl.load(source + place, mask=inside, other=0), own)
    if KEPT:
        stays, value = (
            tl.load(keep + place, mask=inside, other=0) != 0,
            tl.load(pinned + place, mask=inside, other=0),
        )
        own, fresh = tl.where(stays, value, own), tl.where(stays, value, fresh)
    tl.store(clean + place, own, mask=inside)
    tl.store(following + place, fresh, mask=inside)
