"""Mix conditions: embeddings by weight, and a whole prompt towards another. Pure functions.

Letters: L condition tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Interpolation
from model.networks.layers import to_device
from model.networks.text_encoders import Prompt, bucket


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The inputs of a conditional branch: an encoded prompt, and a CLIP image embedding [1, D]."""

    prompt: Prompt
    image: Tensor


def mean(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of embeddings [1, D], scaled to their mean length.

    The plain mean of different embeddings is shorter than any of them, and no network was trained
    on such. Raises ValueError unless a weight is above 0.
    """
    if not any(weight > 0 for weight in weights):
        raise ValueError("at least one weight must be above 0")
    if len(embeddings) == 1:
        return embeddings[0]
    stacked = torch.cat(list(embeddings)).float()
    share = to_device(weights, stacked.device)[:, None] / sum(weights)
    length = (share * stacked.norm(dim=-1, keepdim=True)).sum(0)
    return (F.normalize((share * stacked).sum(0, keepdim=True), dim=-1) * length).to(
        embeddings[0].dtype
    )


def lerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Interpolate […, D] linearly."""
    return torch.lerp(one.float(), other.float(), share).to(one.dtype)


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Interpolate […, D] along the great circle, with lengths interpolated linearly.

    Opposite directions have no single great circle and are interpolated linearly.
    """
    a, b = one.float(), other.float()
    lengths = torch.lerp(a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True), share)
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    arc = (a * ((1 - share) * angle).sin() + b * (share * angle).sin()) / angle.sin()
    return torch.where(angle.sin() < 1e-3, lerp(one, other, share).float(), arc * lengths).to(
        one.dtype
    )


def interpolate(
    one: Conditioning, other: Conditioning, share: float, mode: Interpolation
) -> Conditioning:
    """Interpolate every part of two conditionings; at 0 and 1 the very same objects are returned.

    Byte sequences of different lengths are stretched to a length between theirs.
    """
    if share in (0.0, 1.0):
        return other if share else one
    mix: Callable[[Tensor, Tensor, float], Tensor] = slerp if mode == "slerp" else lerp
    a, b = (each.prompt.byt5[each.prompt.mask] for each in (one, other))  # [L, D] each
    length = round(len(a) + share * (len(b) - len(a)))
    byt5 = mix(_stretched(a, length), _stretched(b, length), share)
    padded = bucket(length, max(one.prompt.mask.shape[1], other.prompt.mask.shape[1]))
    mask = torch.arange(padded, device=byt5.device) < length
    prompt = Prompt(
        F.pad(byt5, (0, 0, 0, padded - length))[None],
        mask[None],
        mix(one.prompt.clip, other.prompt.clip, share),
        tuple(sorted({*one.prompt.truncated, *other.prompt.truncated})),
    )
    return Conditioning(prompt, mix(one.image, other.image, share))


def _stretched(sequence: Tensor, length: int) -> Tensor:
    """Resample [L, D] evenly to [length, D]; the first and the last element stay."""
    if len(sequence) == length:
        return sequence
    return F.interpolate(sequence.float().T[None], length, mode="linear", align_corners=True)[
        0
    ].T.to(sequence.dtype)
