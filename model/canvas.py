"""Pad, extend, fill and composite images for the networks: pure functions on arrays.

[H, W, 3] is uint8 RGB, [H, W] a bool mask.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Array = TypeVar("Array", Pixels, Mask)

# Pixels; one token of the embedded weights, two of the published ones.
FEATHER = 8

AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def pad_to_multiple(array: Array, step: int, least: int = 0) -> Array:
    """Pad [H, W, …] to multiples of `step` pixels, and to at least `least`.

    The new pixels, at the right and lower edge, mirror the image.
    """
    height, width = array.shape[:2]
    return extend(
        array, right=max(-width % step, least - width), down=max(-height % step, least - height)
    )


def crop(array: Array, width: int, height: int) -> Array:
    """Return the upper left part of this size, which undoes `pad_to_multiple`.

    Raises ValueError if the array is smaller.
    """
    if array.shape[0] < height or array.shape[1] < width:
        raise ValueError(f"cannot crop {array.shape[1]}x{array.shape[0]} to {width}x{height}")
    return array[:height, :width]


def extend(array: Array, *, left: int = 0, right: int = 0, up: int = 0, down: int = 0) -> Array:
    """Return [up + H + down, left + W + right, …] from [H, W, …].

    The new pixels mirror the image, so that an encoder sees no edge there.
    """
    margins = [(up, down), (left, right)] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, margins, mode="reflect")


def outpaint_canvas(
    rgb: Pixels, *, left: int = 0, right: int = 0, up: int = 0, down: int = 0
) -> tuple[Pixels, Mask]:
    """Return the image on a canvas that is larger by these margins, and the keep mask.

    The mask is bool, true where the image lies.
    """
    kept = np.zeros((up + rgb.shape[0] + down, left + rgb.shape[1] + right), dtype=np.bool_)
    kept[up : up + rgb.shape[0], left : left + rgb.shape[1]] = True
    return extend(rgb, left=left, right=right, up=up, down=down), kept


def fill(rgb: Pixels, unknown: Mask) -> Pixels:
    """Return the image with unknown pixels filled from those around them, more blurred inwards.

    An image without any known pixel is returned unchanged.

    An encoder's tokens know their neighbourhood: what is about to be repainted would shine through
    in those that are kept.
    """
    if not unknown.any() or unknown.all():
        return rgb
    return np.where(
        unknown[..., None], np.rint(_pull(rgb.astype(np.float32), ~unknown)).astype(np.uint8), rgb
    )


def _pull(colours: NDArray[np.float32], known: Mask) -> NDArray[np.float32]:
    """Fill every unknown pixel of [H, W, 3] from the image at half its size, recursively."""
    if known.all():
        return colours
    height, width = known.shape
    margins = [(0, height % 2), (0, width % 2)]
    count = (
        np.pad(known, margins)
        .astype(np.float32)
        .reshape(-(-height // 2), 2, -(-width // 2), 2)
        .sum((1, 3))
    )
    weighted = np.pad(np.where(known[..., None], colours, 0), [*margins, (0, 0)])
    sums = weighted.reshape(*weighted[::2].shape[:1], 2, -1, 2, 3).sum((1, 3))
    half = _pull(sums / np.maximum(count, 1)[..., None], count > 0)
    planes = [
        PIL.Image.fromarray(plane).resize((width, height), PIL.Image.Resampling.BILINEAR)
        for plane in np.moveaxis(half, -1, 0)
    ]
    return np.where(
        known[..., None], colours, np.stack([np.asarray(plane) for plane in planes], axis=-1)
    )


def soften(weight: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    """Turn every border inside [H, W] into a ramp of about this many pixels.

    At the image's own edge the weight stays full.
    """
    radius = pixels // 4
    for axis in (0, 1, 0, 1) if radius else ():
        weight = _box_mean(weight, radius, axis)
    return weight


def _box_mean(array: NDArray[np.float32], radius: int, axis: int) -> NDArray[np.float32]:
    """Return the means of 2 · radius + 1 neighbours along an axis of [H, W].

    Beyond the edges the outermost values are repeated.
    """
    margins = [(0, 0), (0, 0)]
    margins[axis] = (radius + 1, radius)
    sums = np.pad(array, margins, mode="edge").cumsum(axis=axis, dtype=np.float64)
    size, length = 2 * radius + 1, array.shape[axis]
    ends, starts = (np.take(sums, range(first, first + length), axis=axis) for first in (size, 0))
    return ((ends - starts) / size).astype(np.float32)


def box_mask(box: tuple[float, float, float, float], width: int, height: int) -> Mask:
    """Return a mask [H, W], true inside the box; never empty.

    box: (x0, y0, x1, y1), shares of the image's width and height.
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    x0, y0 = (
        min(round(share * side), side - 1) for share, side in ((box[0], width), (box[1], height))
    )
    x1, y1 = max(round(box[2] * width), x0 + 1), max(round(box[3] * height), y0 + 1)
    mask[y0:y1, x0:x1] = True
    return mask


def region_weight(where: Mask, weight: float, softness: float) -> Pixels:
    """Return a region's weight at every pixel, uint8 [H, W]; 255 is the full weight.

    softness: width of the ramp at the borders, in halves of the shorter side.
    """
    ramp = math.floor(softness * min(where.shape) / 2)
    return np.rint(soften(where.astype(np.float32), ramp) * weight * 255).astype(np.uint8)


def composite(original: Pixels, painted: Pixels, keep: Mask, feather: int = FEATHER) -> Pixels:
    """Return `original` bit for bit where `keep`, and `painted` elsewhere, with a softened seam.

    feather: width of the seam in pixels, all of them pixels that are not kept.

    Ring by ring inwards the colours of the kept pixels next to it fade into what was painted: the
    d-th ring (chessboard distance d from the nearest kept pixel) takes d / (feather + 1) of it.
    What the original had where it is repainted never shows through. Raises ValueError for shapes
    that do not fit.
    """
    if original.shape != painted.shape or keep.shape != original.shape[:2]:
        raise ValueError(f"shapes {original.shape}, {painted.shape} and {keep.shape} do not fit")
    result, reached = (
        np.pad(np.where(keep[..., None], original, painted), [(1, 1), (1, 1), (0, 0)]),
        np.pad(keep, 1),
    )
    colours = np.where(reached[..., None], result, 0).astype(np.float32)
    for distance in range(1, feather + 1):
        y, x = (1 + axis for axis in (_beside(reached) & ~reached[1:-1, 1:-1]).nonzero())
        if not len(y):
            break
        near = [(y + dy, x + dx) for dy, dx in AROUND]
        colours[y, x] = (
            np.sum([colours[at] for at in near], axis=0)
            / np.sum([reached[at] for at in near], axis=0)[:, None]
        )
        share = distance / (feather + 1)
        result[y, x] = np.rint(share * result[y, x] + (1 - share) * colours[y, x]).astype(np.uint8)
        reached[y, x] = True
    return result[1:-1, 1:-1]


def _beside(reached: Mask) -> Mask:
    """Return [H, W] from [H + 2, W + 2]: whether any pixel of the 3×3 around is true."""
    rows = reached[:-2] | reached[1:-1] | reached[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
