"""Find close-ups for the second judge: things larger than the image, without an outline in it.

    CloseUps(atlas()).find(image)  # the kind that explains a whole image best

Every object is laid over the image in a few sizes and places beyond its edges, the few best ones
then in more; the pixels that no template covers may have any one colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.kinds import SHAPES

_COARSE, _FINE = 12, 32  # pixels a side in which all templates and the last few are compared
_LENGTHS = (1.19, 1.37, 1.56)  # longer sides, in sides of the image
_SHIFTS = (-0.17, 0.0, 0.17)  # of the thing's middle off the image's
_LAST = 16  # templates that are moved and scaled
_STEPS = ((0.06, 0.07), (0.03, 0.035))  # by how much: (shift, share of the length), round by round
_NOTHING = 0.05  # opacity below which a pixel is the background's
_CHUNK = 2048


class Place(NamedTuple):
    """Locate T templates. flip: 1, or -1 for mirrored. shift: (x, y) of the middle, [T, 2]."""

    sprite: Tensor
    flip: Tensor
    length: Tensor
    shift: Tensor

    def rows(self, index: Tensor | slice) -> Place:
        """Return the templates of some rows."""
        return Place(*(part[index] for part in self))


class Pixels(NamedTuple):
    """T templates' pixels: ink [T, 3 P], opacity [T, P], and the sum of ink² / opacity [T]."""

    ink: Tensor
    opacity: Tensor
    energy: Tensor


class CloseUp(NamedTuple):
    """The best template. left: share of the image's variance that it leaves over.

    behind: RGB of 0 … 1 of what it does not cover. bare: that area's share of the image. uneven:
    how far that area's pixels are from its colour, of 0 … 1.
    """

    kind: int
    left: float
    centre: tuple[float, float]
    length: float
    behind: tuple[float, float, float]
    bare: float
    uneven: float


class CloseUps:
    """Compare square images with objects that are larger than the image."""

    def __init__(self, atlas: Tensor) -> None:
        self.sprites = _reduced(atlas, 2 * _FINE)
        self._small = _reduced(atlas, 2 * _COARSE)

    @cached_property
    def _all(self) -> tuple[Place, Pixels]:
        """Return all templates, made at the first image."""
        device = self.sprites.device
        options = list(product((1.0, -1.0), _LENGTHS, _SHIFTS, _SHIFTS))
        table = torch.tensor(options, device=device)
        count = len(self.sprites) - len(SHAPES)
        sprites = torch.arange(count, device=device) + len(SHAPES)
        table = table.repeat(count, 1)
        sprites = sprites.repeat_interleave(len(options))
        place = Place(sprites, table[:, 0], table[:, 1], table[:, 2:])
        parts = [
            _pixels(self._small, place.rows(slice(i, i + _CHUNK)), _COARSE)
            for i in range(0, len(sprites), _CHUNK)
        ]
        return place, Pixels(*(torch.cat(some) for some in zip(*parts, strict=True)))

    def find(self, image: Tensor) -> CloseUp:
        """Return the best template of a square image [3, H, W] of 0 … 1."""
        place, pixels = self._all
        left = _left_over(_shrunk(image, _COARSE), pixels)
        place = place.rows(left.topk(_LAST, largest=False).indices)
        fine = _shrunk(image, _FINE)
        for reach, share in _STEPS:
            tried = _moved(place, reach, share)
            left = _left_over(fine, _pixels(self.sprites, tried, _FINE)).view(len(place.sprite), -1)
            best = left.argmin(1)
            row = torch.arange(len(best), device=best.device) * left.shape[1] + best
            place = tried.rows(row)
        left = _left_over(fine, _pixels(self.sprites, place, _FINE))
        best = left.argmin()
        return self._described(place.rows(best[None]), fine, float(left[best]))

    def _described(self, place: Place, fine: Tensor, left: float) -> CloseUp:
        covered = _pixels(self.sprites, place, _FINE).opacity.view(1, _FINE, _FINE)
        near = F.max_pool2d(covered, 3, 1, 1)  # an outline is seldom hit exactly
        bare = (near.flatten() < _NOTHING).float()
        colour = (fine * bare).sum(1) / bare.sum().clamp_min(1e-6)
        red, green, blue = colour.tolist()
        apart = (fine - colour[:, None]).square().sum(0)
        uneven = float(((apart * bare).sum() / bare.sum().clamp_min(1e-6)).sqrt())
        variance = float((fine - fine.mean(1, keepdim=True)).square().sum())
        x, y = (0.5 + place.shift[0]).tolist()
        return CloseUp(
            int(place.sprite[0]),
            left / max(variance, 1e-6),
            (x, y),
            float(place.length[0]),
            (red, green, blue),
            float(bare.mean()),
            uneven,
        )


def _reduced(atlas: Tensor, side: int) -> Tensor:
    """Return sprites uint8 [S, 4, H, W] as float of 0 … 1, with about `side` pixels a side."""
    step = max(1, atlas.shape[-1] // side)
    return torch.cat([F.avg_pool2d(some.float() / 255, step) for some in atlas.split(64)])


def _pixels(sprites: Tensor, place: Place, side: int) -> Pixels:
    """Return templates as they look in an image, of 0 … 1."""
    unit = 1 / place.length
    zero = torch.zeros_like(unit)
    x, y = (-2 * place.shift[:, axis] * unit for axis in (0, 1))
    across = torch.stack([place.flip * unit, zero, place.flip * x], dim=-1)
    matrix = torch.stack([across, torch.stack([zero, unit, y], dim=-1)], dim=1)
    size = [len(unit), 4, 2 * side, 2 * side]
    grid = F.affine_grid(matrix, size, align_corners=False)
    sampled = F.grid_sample(sprites[place.sprite], grid, align_corners=False)
    planes = F.avg_pool2d(sampled, 2).flatten(2)
    ink, opacity = planes[:, :3], planes[:, 3].contiguous()
    energy = (ink.square().sum(1) / opacity.clamp_min(1e-3)).sum(1)
    return Pixels(ink.flatten(1), opacity, energy)


def _shrunk(image: Tensor, side: int) -> Tensor:
    """Return [3, P]."""
    scaled = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)
    return scaled[0].flatten(1)


def _left_over(image: Tensor, pixels: Pixels) -> Tensor:
    """Return what templates leave over of an image [3, P]: [T].

    Inside, the difference from the template; outside, the variance around one colour.
    """
    square = image.square().sum(0)
    inside = pixels.energy - 2 * pixels.ink @ image.flatten()
    area = pixels.opacity.shape[1] - pixels.opacity.sum(1)
    rest = image.sum(1) - pixels.opacity @ image.T  # sums over what is not covered [T, 3]
    return inside + square.sum() - rest.square().sum(1) / area.clamp_min(1e-3)


def _moved(place: Place, reach: float, share: float) -> Place:
    """Return every template in 27 variants, one after the other: moved and scaled a little."""
    steps = list(_variants(reach, share))
    table = torch.tensor(steps, device=place.length.device).repeat(len(place.sprite), 1)
    sprite, flip, length, shift = (part.repeat_interleave(len(steps), 0) for part in place)
    return Place(sprite, flip, length * table[:, 2], shift + table[:, :2])


def _variants(reach: float, share: float) -> Iterator[tuple[float, float, float]]:
    for x, y, scale in product((-1, 0, 1), repeat=3):
        yield x * reach, y * reach, 1 + scale * share
