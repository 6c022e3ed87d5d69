"""Pictures laid out for the networks and put together again: padding, larger canvases, seams. Pure functions on arrays.

[H, W, 3] is uint8 RGB, [H, W] a bool mask.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Array = TypeVar("Array", Pixels, Mask)

# Pixels; one token of the embedded weights, two of the published ones.
FEATHER = 8


def pad_to_multiple(array: Array, step: int) -> Array:
    """[H, W, …] → the next multiples of `step` pixels, mirrored at the right and the lower edge."""
    height, width = array.shape[:2]
    return extend(array, right=-width % step, down=-height % step)


def crop(array: Array, width: int, height: int) -> Array:
    """The upper left part: undoes `pad_to_multiple`. Raises ValueError if the array is smaller."""
    if array.shape[0] < height or array.shape[1] < width:
        raise ValueError(f"cannot crop {array.shape[1]}x{array.shape[0]} to {width}x{height}")
    return array[:height, :width]


def extend(array: Array, *, left: int = 0, right: int = 0, up: int = 0, down: int = 0) -> Array:
    """[H, W, …] → [up + H + down, left + W + right, …], the new pixels mirrored, so that an encoder sees no edge there."""
    margins = [(up, down), (left, right)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, margins, mode="reflect")


def outpaint_canvas(rgb: Pixels, *, left: int = 0, right: int = 0, up: int = 0, down: int = 0) -> tuple[Pixels, Mask]:
    """The picture on a canvas larger by so many pixels, and the keep-mask: true where the picture lies."""
    kept = np.zeros((up + rgb.shape[0] + down, left + rgb.shape[1] + right), dtype=np.bool_)
    kept[up : up + rgb.shape[0], left : left + rgb.shape[1]] = True
    return extend(rgb, left=left, right=right, up=up, down=down), kept


def composite(original: Pixels, painted: Pixels, keep: Mask, feather: int = FEATHER) -> Pixels:
    """`original` bit for bit where `keep`, `painted` elsewhere, the seam softened over `feather` pixels that are not kept.

    Ring by ring inwards the colours of the kept pixels next to it fade into what was painted: the d-th ring (chessboard distance d from
    the nearest kept pixel) takes d / (feather + 1) of it. What the original had where it is repainted never shows through.
    Raises ValueError for shapes that do not fit.
    """
    if original.shape != painted.shape or keep.shape != original.shape[:2]:
        raise ValueError(f"shapes {original.shape}, {painted.shape} and {keep.shape} do not fit")
    result = np.where(keep[..., None], original, painted)
    colours, reached = np.where(keep[..., None], original, 0).astype(np.float32), keep
    for distance in range(1, feather + 1):
        around = _box_sum(reached.astype(np.float32))
        ring = (around > 0) & ~reached
        if not ring.any():
            break
        colours[ring] = _box_sum(colours)[ring] / around[ring, None]
        share = distance / (feather + 1)
        result[ring] = np.rint(share * painted[ring] + (1 - share) * colours[ring]).astype(np.uint8)
        reached = reached | ring
    return result


def _box_sum(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """[H, W, …] → the sums over 3×3 neighbourhoods, zeros beyond the edges."""
    padded = np.pad(array, [(1, 1), (1, 1)] + [(0, 0)] * (array.ndim - 2))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
