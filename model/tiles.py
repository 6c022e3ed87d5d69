"""Large images in overlapping tiles: where each tile lies, and how drawn tiles are blended.

    tiling = Tiling.of(canvas=(512, 512), largest=(256, 256), token=4)
    canvas = lanczos(rgb, (512, 512))
    parts = [tiling.part(canvas, i) for i in range(len(tiling))]
    whole = tiling.blend(drawn)

The networks draw best at the size that they were trained with, so a larger image is drawn in tiles
of that size. No torch here: the API process reads it too. [H, W, 3] is uint8 RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from model.canvas import Array, Pixels, extend

# Tiles overlap by at least a quarter of their side, to within a token, and are blended over an
# eighth of it: two drawings of one place differ in detail, and their mean is less sharp than they.
OVERLAP, BLEND = 4, 8


@dataclass(frozen=True, slots=True)
class Tiling:
    """A canvas and the tiles that cover it, row by row.

    canvas, tile: (width, height) in pixels, multiples of `token`; the tile is no larger. token:
    side of a token in pixels.
    """

    canvas: tuple[int, int]
    tile: tuple[int, int]
    token: int

    @classmethod
    def of(cls, canvas: tuple[int, int], largest: tuple[int, int], token: int) -> Tiling:
        """Return the tiling of a canvas with tiles of `largest`, no larger than the canvas."""
        return cls(canvas, (min(canvas[0], largest[0]), min(canvas[1], largest[1])), token)

    def __len__(self) -> int:
        return len(self._starts(0)) * len(self._starts(1))

    def corner(self, index: int) -> tuple[int, int]:
        """Return (x, y) of a tile's upper left pixel."""
        row, column = divmod(index, len(self._starts(0)))
        return self._starts(0)[column], self._starts(1)[row]

    def part(self, array: Array, index: int) -> Array:
        """Return a tile's part of a canvas [H, W, …]."""
        x, y = self.corner(index)
        return array[y : y + self.tile[1], x : x + self.tile[0]]

    def blend(self, tiles: Sequence[Pixels]) -> Pixels:
        """Return the canvas [H, W, 3] from all of its drawn tiles, in order."""
        whole = np.zeros((self.canvas[1], self.canvas[0], 3), dtype=np.float32)
        places = product(self._weights(1), self._weights(0))
        for ((y, down), (x, across)), tile in zip(places, tiles, strict=True):
            weight = down[:, None] * across
            whole[y : y + len(down), x : x + len(across)] += weight[..., None] * tile
        return np.rint(whole).astype(np.uint8)

    def _starts(self, axis: int) -> tuple[int, ...]:
        return _starts(self.canvas[axis], self.tile[axis], self.token)

    def _weights(self, axis: int) -> list[tuple[int, NDArray[np.float32]]]:
        """Return each tile's first pixel along an axis, and its weight at each of its pixels.

        The weights of a pixel add up to one. They change from one tile to the next around the
        middle of the overlap, the farthest from both tiles' borders.
        """
        length, tile, first = self.canvas[axis], self.tile[axis], self._starts(axis)
        neighbours = list(pairwise(first))
        overlap = min((one + tile - other for one, other in neighbours), default=0)
        band = max(1, min(tile // BLEND, overlap))
        pixels = np.arange(length, dtype=np.float32) + 0.5
        seams = [(one + tile + other) / 2 for one, other in neighbours]
        rising = [np.clip((pixels - seam) / band + 0.5, 0, 1) for seam in seams]
        shares = pairwise([np.ones_like(pixels), *rising, np.zeros_like(pixels)])
        return [
            (start, (before - after)[start : start + tile])
            for start, (before, after) in zip(first, shares, strict=True)
        ]


class Mosaic:
    """The tiles of one image, each as far as it is drawn."""

    def __init__(self, tiling: Tiling) -> None:
        self._tiling = tiling
        self._tiles: dict[int, tuple[int, Pixels]] = {}
        self._reached = -1

    def put(self, index: int, stage: int, pixels: Pixels) -> int | None:
        """Keep a tile [H, W, 3]; return the stage that all tiles have reached if it is a new one.

        stage: how far the tile is drawn, from 0 on.
        """
        self._tiles[index] = stage, pixels
        if len(self._tiles) < len(self._tiling):
            return None
        reached = min(stage for stage, _ in self._tiles.values())
        if reached <= self._reached:
            return None
        self._reached = reached
        return reached

    def blend(self) -> Pixels:
        """Return the image [H, W, 3] of all tiles, each as it was put last."""
        return self._tiling.blend([self._tiles[i][1] for i in range(len(self._tiling))])


def lanczos(array: Pixels, size: tuple[int, int], canvas: tuple[int, int] | None = None) -> Pixels:
    """Scale [H, W] or [H, W, 3] to `size` by Lanczos' filter.

    size: (width, height). canvas: (width, height) that the result is mirrored to at the right and
    lower edge, if any.
    """
    if array.shape[1::-1] != size:
        image = PIL.Image.fromarray(np.ascontiguousarray(array))
        array = np.asarray(image.resize(size, PIL.Image.Resampling.LANCZOS))
    if canvas is None:
        return array
    return extend(array, right=canvas[0] - size[0], down=canvas[1] - size[1])


@lru_cache(maxsize=256)
def _starts(length: int, tile: int, token: int) -> tuple[int, ...]:
    """Return the first pixel of every tile along an axis: evenly spaced, multiples of `token`."""
    if length <= tile:
        return (0,)
    overlap = tile // OVERLAP
    count = math.ceil((length - overlap) / (tile - overlap))
    stride = (length - tile) / (count - 1) / token
    return tuple(round(i * stride) * token for i in range(count))
