"""Damage rendered images as a decoder and a sampler do, in batches on any device.

A judge that has only seen clean renders fails on blur, on the blocks of a VQGAN and on ragged
outlines. Every image has strengths of its own, most of them mild.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 4  # pixels a side of what a code stands for, at a quarter of the native size
# The largest quantisation step of the lowest frequency, as a share of the range.
_COARSENESS = 0.10


def _strength(n: int, device: torch.device, largest: float) -> Tensor:
    """Return [N, 1, 1, 1], mostly near zero."""
    return torch.rand(n, 1, 1, 1, device=device).square() * largest


@lru_cache(maxsize=4)
def _cosines(device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II's matrix [frequency, place] of a block's side."""
    place, frequency = torch.arange(_BLOCK) + 0.5, torch.arange(_BLOCK)[:, None]
    matrix = torch.cos(math.pi / _BLOCK * place * frequency) * math.sqrt(2 / _BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device)


def blocky(images: Tensor, coarseness: Tensor) -> Tensor:
    """Quantise the frequencies of blocks, the high ones more, as JPEG and codes do.

    images: [N, 3, H, W] of 0 … 1. coarseness: [N, 1, 1, 1], in shares of the range.
    """
    n, c, height, width = images.shape
    cosines = _cosines(images.device)
    blocks = images.reshape(n, c, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    blocks = blocks.transpose(3, 4)  # [N, 3, rows, columns, 8, 8]
    frequencies = cosines @ blocks @ cosines.T
    order = torch.arange(_BLOCK, device=images.device)
    step = coarseness[..., None, None] * (1 + order[:, None] + order) + 1e-4
    blocks = cosines.T @ (torch.round(frequencies / step) * step) @ cosines
    return blocks.transpose(3, 4).reshape(images.shape)


def blurred(images: Tensor, times: int = 1) -> Tensor:
    """Smooth images [N, 3, H, W] with a box of 3 pixels."""
    for _ in range(times):
        images = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images


def warped(images: Tensor, reach: Tensor) -> Tensor:
    """Move pixels smoothly by up to a few times reach [N, 1, 1, 1], given in pixels."""
    n, _, height, width = images.shape
    device = images.device
    coarse = torch.randn(n, 2, height // _BLOCK, width // _BLOCK, device=device) * reach
    flow = F.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1)
    across, down = ((torch.arange(k, device=device) * 2 + 1) / k - 1 for k in (width, height))
    grid = torch.stack(
        [across + flow[..., 0] * (2 / width), down[:, None] + flow[..., 1] * (2 / height)], dim=-1
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recoloured(images: Tensor) -> Tensor:
    """Change contrast, brightness and tint so little that colours keep their names."""
    n, device = len(images), images.device
    gain = 1 + 0.05 * torch.randn(n, 3, 1, 1, device=device) * torch.rand(n, 1, 1, 1, device=device)
    shift = 0.03 * torch.randn(n, 3, 1, 1, device=device) * torch.rand(n, 1, 1, 1, device=device)
    grey = images.mean(1, keepdim=True)
    saturation = 1 + 0.12 * torch.randn(n, 1, 1, 1, device=device)
    return torch.lerp(grey, images, saturation) * gain + shift


@torch.no_grad()
def damaged(images: Tensor) -> Tensor:
    """Return images float [N, 3, H, W] of 0 … 1 as a weak model might draw them."""
    n, device = len(images), images.device
    images = warped(images, _strength(n, device, 1.6))
    images = torch.lerp(images, blurred(images, 2), _strength(n, device, 1.0))
    images = blocky(_recoloured(images), _strength(n, device, _COARSENESS))
    noise = torch.randn_like(images) * _strength(n, device, 0.045)
    return (images + noise).clamp(0, 1)
