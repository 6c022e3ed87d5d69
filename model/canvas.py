"""Pad, extend, fill and mask images for the networks: pure functions on arrays.

[H, W, 3] is uint8 RGB, [H, W, 4] uint8 RGB and alpha, [H, W] a bool mask or uint8 weights.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
Array = TypeVar("Array", Pixels, Mask)


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
        unknown[..., None], np.rint(pull(rgb.astype(np.float32), ~unknown)).astype(np.uint8), rgb
    )


def pull(colours: Floats, known: Mask, sweeps: int = 0) -> Floats:
    """Fill every unknown pixel of [H, W, 3] from the image at half its size, recursively.

    sweeps: how often, at every size, unknown pixels become the mean of their four neighbours. A few
    give a membrane: the smoothest surface through the known pixels.
    """
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
    half = pull(sums / np.maximum(count, 1)[..., None], count > 0, sweeps)
    guess = np.moveaxis(resized(np.moveaxis(half, -1, 0), width, height), 0, -1)
    return _relaxed(np.where(known[..., None], colours, guess), known, sweeps)


def resized(planes: Floats, width: int, height: int) -> Floats:
    """Return planes [C, H, W] in another size, interpolated bilinearly."""
    size, method = (width, height), PIL.Image.Resampling.BILINEAR
    return np.stack(
        [
            np.asarray(PIL.Image.fromarray(np.ascontiguousarray(plane)).resize(size, method))
            for plane in planes
        ]
    )


def _relaxed(values: Floats, known: Mask, sweeps: int) -> Floats:
    """Return [H, W, C] with unknown pixels nearer to the mean of their neighbours.

    Beyond the edges the outermost values are repeated.
    """
    if not sweeps:
        return values
    surface = np.pad(values, [(1, 1), (1, 1), (0, 0)], mode="edge")
    inner, unknown = surface[1:-1, 1:-1], ~known[..., None]
    for _ in range(sweeps):
        mean = surface[:-2, 1:-1] + surface[2:, 1:-1]
        mean += surface[1:-1, :-2]
        mean += surface[1:-1, 2:]
        mean *= 0.25
        np.copyto(inner, mean, where=unknown)
        surface[0], surface[-1] = surface[1], surface[-2]
        surface[:, 0], surface[:, -1] = surface[:, 1], surface[:, -2]
    return inner


def soften(weight: Floats, pixels: int) -> Floats:
    """Turn every border inside [H, W] into a ramp of about this many pixels.

    At the image's own edge the weight stays full.
    """
    radius = pixels // 4
    for axis in (0, 1, 0, 1) if radius else ():
        weight = _box_mean(weight, radius, axis)
    return weight


def _box_mean(array: Floats, radius: int, axis: int) -> Floats:
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


def box_weight(box: tuple[float, float, float, float], width: int, height: int) -> Pixels:
    """Return the weight of a region that has all of a box: uint8 [H, W], 255 inside.

    box: as of `box_mask`.
    """
    return region_weight(box_mask(box, width, height), 1.0, 0.0)


def region_weight(where: Mask | Pixels, weight: float, softness: float) -> Pixels:
    """Return a region's weight at every pixel, uint8 [H, W]; 255 is the full weight.

    where: a mask, or weights of which 255 is inside. softness: width of the ramp at the borders, in
    halves of the shorter side.
    """
    ramp = math.floor(softness * min(where.shape) / 2)
    return np.rint(soften(shares(where), ramp) * weight * 255).astype(np.uint8)


def shares(weights: Mask | Pixels) -> Floats:
    """Return a mask, or weights up to 255, as numbers from 0 to 1."""
    full = 1 if weights.dtype == np.bool_ else 255
    return weights.astype(np.float32) / np.float32(full)


def on_white(original: Pixels) -> Pixels:
    """Return [H, W, 3] from [H, W, 4] as a viewer shows it over white; [H, W, 3] unchanged."""
    if original.shape[2] == 3:
        return original
    return blended(original[..., :3], original[..., 3], 255)


def blended(rgb: Pixels, alpha: Pixels, background: int) -> Pixels:
    """Return [H, W, 3] over a grey background, rounded. alpha: uint8 [H, W]."""
    opacity = alpha[..., None].astype(np.uint16)  # 255 × 255 + 127 just fits
    return ((rgb * opacity + background * (255 - opacity) + 127) // 255).astype(np.uint8)
