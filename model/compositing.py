"""Composite painted pixels into an image without a seam: pure functions on arrays.

[H, W, 3] is uint8 RGB, [H, W, 4] uint8 RGB and alpha, [H, W] a bool mask or uint8 weights.
"""

from __future__ import annotations

import math

import numpy as np

from model.canvas import Floats, Mask, Pixels, on_white, pull, resized, shares, soften

# Pixels; half a token of the embedded weights, two of the published v3 ones.
FEATHER = 8
MAX_FEATHER = 64

# The correction of a seam, in levels of 255. Differences between the original and the decoder's
# image that lie further from their neighbourhood's, or from zero, are content.
UNLIKE_OTHERS = 48.0
UNLIKE_ZERO = 144.0
# Both are wider in texture, by so many standard deviations of it.
TEXTURE_DEVIATIONS = np.float32(3.0)
# Errors of the decoder differ by so much from place to place. What texture adds to a difference is
# averaged over more pixels, the more it deviates in comparison.
LOCAL_DEVIATION = 4.0
# A larger correction reaches no further than the feather.
FAR_CORRECTION = 32.0
# Share of a neighbourhood that must not be content, or nothing is known there.
LEAST_TRUST = 0.05
SMOOTHING_SWEEPS = 8
# Pixels from the kept and from the repainted part within which the edge of a mask is antialiased.
EDGE = 3


def composite(
    original: Pixels, painted: Pixels, repaint: Mask | Pixels, feather: int = FEATHER
) -> Pixels:
    """Return `original` bit for bit where nothing is repainted, blended into `painted` elsewhere.

    Args:
        original: [H, W, 3], or [H, W, 4] with alpha; the result has as many channels. Painted
            pixels are opaque.
        painted: [H, W, 3].
        repaint: [H, W], a mask or weights: 0 keeps a pixel, 255 takes the painted one, values
            between are the painted one's share.
        feather: of `seam_correction`, by which `painted` is corrected first. With 0, the weights
            alone decide.

    Where all is painted, nothing of the original shows through. Raises ValueError for shapes that
    do not fit.
    """
    if painted.shape != (*original.shape[:2], 3) or repaint.shape != original.shape[:2]:
        raise ValueError(f"shapes {original.shape}, {painted.shape}, {repaint.shape} do not fit")
    if not repaint.any():
        return original.copy()
    drawn = corrected(on_white(original), painted, repaint > 0, feather)
    return blended(original, drawn, repaint, unmix=feather > 0)


def corrected(original: Pixels, painted: Pixels, repainted: Mask, feather: int) -> Pixels:
    """Return the painted image [H, W, 3] with `seam_correction`; the arguments are that one's."""
    correction = seam_correction(original, painted, repainted, feather)
    return np.rint(np.clip(painted + correction, 0, 255)).astype(np.uint8)


def blended(
    original: Pixels, painted: Pixels, repaint: Mask | Pixels, unmix: bool = True
) -> Pixels:
    """Return two images blended by a mask or weights, as `composite` does.

    unmix: take what is removed out of the pixels of an antialiased edge.
    """
    result = original.copy()
    if not repaint.any():
        return result
    part = _part_around(repaint > 0, EDGE)
    result[part] = _blended(original[part], painted[part], shares(repaint[part]), unmix)
    return result


def _blended(original: Pixels, painted: Pixels, share: Floats, unmix: bool) -> Pixels:
    """Return [H, W, 3 or 4] of two images by the share [H, W] of the painted one."""
    transparent = original.shape[2] == 4
    opacity = shares(original[..., 3:]) if transparent else np.float32(1)
    kept = _unmixed(original, share) if unmix and not transparent else original[..., :3]
    share = share[..., None]
    kept_share = opacity * (1 - share)
    total = kept_share + share
    colours = kept * kept_share + painted * share
    if transparent:
        colours /= np.maximum(total, np.float32(1e-6))
    mixed = np.rint(colours).astype(np.uint8)
    if transparent:
        mixed = np.concatenate([mixed, np.rint(total * 255).astype(np.uint8)], axis=2)
    return np.where(share == 0, original, mixed)


def _unmixed(original: Pixels, share: Floats) -> Pixels | Floats:
    """Return [H, W, 3] without what is removed in the pixels of an antialiased edge.

    share: [H, W] of 0 … 1, 1 where all is repainted. The edge of an exact mask shares its pixels
    with the removed object, and a blend by the weights would leave a rim of its colour. Such a
    pixel without the nearby repainted colour is closer to the kept colours beside it; others are
    unchanged.
    """
    kept, gone = share == 0, share == 1
    y, x = (~kept & ~gone & _grown(kept, EDGE) & _grown(gone, EDGE)).nonzero()
    if not len(y):
        return original
    margins = [(EDGE, EDGE), (EDGE, EDGE)]
    padded = np.pad(original, [*margins, (0, 0)])
    parts = np.stack([np.pad(kept, margins), np.pad(gone, margins)])[..., None]
    sums = np.zeros((2, len(y), 3), dtype=np.float32)
    counts = np.zeros((2, len(y), 1), dtype=np.float32)
    for dy, dx in np.ndindex(2 * EDGE + 1, 2 * EDGE + 1):
        distance = max(1, (dy - EDGE) ** 2 + (dx - EDGE) ** 2)
        part = parts[:, y + dy, x + dx] / np.float32(distance**2)
        sums += part * padded[y + dy, x + dx]
        counts += part
    beside, removed = sums / counts
    seen, mixed = original[y, x].astype(np.float32), share[y, x, None]
    alone = np.clip((seen - mixed * removed) / (1 - mixed), 0, 255)
    closer = np.abs(alone - beside).sum(axis=1) < np.abs(seen - beside).sum(axis=1)
    result = original.astype(np.float32)
    result[y, x] = np.where(closer[:, None], alone, seen)
    return result


def _grown(mask: Mask, pixels: int) -> Mask:
    """Return [H, W], true within so many pixels (chessboard distance) of a true one."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def seam_correction(original: Pixels, painted: Pixels, repainted: Mask, feather: int) -> Floats:
    """Return [H, W, 3] to be added to `painted` in levels of 255, so that no seam shows.

    Args:
        original: [H, W, 3].
        painted: [H, W, 3], the decoder's image, which covers the kept part too.
        repainted: bool [H, W].
        feather: pixels, 0 for no correction. Differences along the seam are averaged over about
            one and a half feathers, over up to three in texture (24 and 48 pixels at most).

    In the kept part the decoder errs by a known difference. Its low frequencies are continued into
    the repainted part as a membrane, the smoothest surface through those at the border: an offset
    of the decoder disappears everywhere, and no texture is stretched. Differences of content do not
    count, such as those beside a kept object of whose outline other pixels were drawn. The part of
    a correction above `FAR_CORRECTION` fades out over the feather.
    """
    correction = np.zeros(painted.shape, dtype=np.float32)
    if not feather or not repainted.any() or repainted.all():
        return correction
    cell = 2 ** min(3, max(0, round(math.log2(feather / 2))))
    part = _part_around(repainted, 8 * cell)
    kept, seen = ~repainted[part], _planes(original[part])
    difference = seen - _planes(painted[part])
    variance = _variance(seen, kept, cell)
    trust = _trust(difference, kept, TEXTURE_DEVIATIONS * np.sqrt(variance), cell)
    sums, weights = _window(_cells(difference * trust, cell)), _window(_cells(trust, cell))
    count = _cells(kept.astype(np.float32), cell)
    known = (count > 0) & (weights > LEAST_TRUST * _window(count))
    if known.any():
        local, wide = _ratio(sums, weights), _ratio(_widely(sums), _widely(weights))
        share = LOCAL_DEVIATION**2 / (LOCAL_DEVIATION**2 + variance / 2)
        values = np.where(known, share * local + (1 - share) * wide, np.float32(0))
        surface = np.moveaxis(pull(np.moveaxis(values, 0, -1), known, SMOOTHING_SWEEPS), -1, 0)
        height, width = kept.shape
        field = resized(surface, surface.shape[2] * cell, surface.shape[1] * cell)
        field = _limited(field[:, :height, :width], repainted[part], feather)
        correction[part] = np.moveaxis(field, 0, -1)
    return correction


def _part_around(where: Mask, margin: int) -> tuple[slice, slice]:
    """Return the rows and columns of [H, W] that hold all true pixels, and so many beside them."""
    rows, columns = (np.flatnonzero(where.any(axis=axis)) for axis in (1, 0))
    return (
        slice(max(0, int(rows[0]) - margin), int(rows[-1]) + 1 + margin),
        slice(max(0, int(columns[0]) - margin), int(columns[-1]) + 1 + margin),
    )


def _planes(rgb: Pixels) -> Floats:
    """Return [3, H, W] from [H, W, 3]."""
    return np.ascontiguousarray(np.moveaxis(rgb, -1, 0), dtype=np.float32)


def _variance(seen: Floats, kept: Mask, cell: int) -> Floats:
    """Return the variance of the kept pixels around each cell of [3, H, W], mean of the channels.

    One number for each cell.
    """
    known = kept.astype(np.float32)
    count = np.maximum(_window(_cells(known, cell)), 1)
    mean = _window(_cells(seen * known, cell)) / count
    square = _window(_cells(np.einsum("chw,chw->hw", seen, seen) * known, cell)) / count
    return np.maximum(square - (mean * mean).sum(axis=0), 0) / 3


def _trust(difference: Floats, kept: Mask, tolerance: Floats, cell: int) -> Floats:
    """Return how far each pixel's difference is the decoder's error, [H, W] of 0 … 1.

    A repainted pixel has 0. difference: [3, H, W]. tolerance: levels that texture explains, one
    number for each cell.
    """
    texture = _spread(tolerance, cell, kept.shape)
    plausible = kept * _closeness(difference, UNLIKE_ZERO + texture)
    trust = plausible
    for _ in range(2):
        sums, weights = _window(_cells(difference * trust, cell)), _window(_cells(trust, cell))
        usual = _spread(_ratio(_widely(sums), _widely(weights)), cell, kept.shape)
        trust = plausible * _closeness(difference - usual, UNLIKE_OTHERS + texture)
    return trust


def _ratio(sums: Floats, weights: Floats) -> Floats:
    """Return weighted means, 0 where nothing has a weight."""
    divisors: Floats = np.maximum(weights, np.float32(1e-3))
    return sums / divisors


def _closeness(difference: Floats, width: Floats) -> Floats:
    """Return Tukey's weights: 1 at no difference [3, H, W], falling to 0 at `width` [H, W]."""
    ratio = np.abs(difference).max(axis=0) / width
    return np.maximum(1 - ratio * ratio, 0) ** 2


def _cells(planes: Floats, cell: int) -> Floats:
    """Return the sums of squares of `cell` pixels of [..., H, W]; the last ones may be smaller."""
    for axis in (-2, -1) if cell > 1 else ():
        planes = np.add.reduceat(planes, np.arange(0, planes.shape[axis], cell), axis)
    return planes


def _spread(cells: Floats, cell: int, shape: tuple[int, ...]) -> Floats:
    """Return [..., H, W] of this shape, each pixel with the value of its cell."""
    spread = cells.repeat(cell, axis=-2).repeat(cell, axis=-1)
    return spread[..., : shape[0], : shape[1]]


def _window(cells: Floats, radius: int = 1) -> Floats:
    """Return the sums of the square of 2 · radius + 1 cells around each of [..., H, W]."""
    for axis in (-2, -1):
        margins = [(0, 0)] * cells.ndim
        margins[axis] = (radius, radius)
        padded, length = np.moveaxis(np.pad(cells, margins), axis, 0), cells.shape[axis]
        total = padded[:length].copy()
        for start in range(1, 2 * radius + 1):
            total += padded[start : start + length]
        cells = np.moveaxis(total, 0, axis)
    return cells


def _widely(cells: Floats) -> Floats:
    """Return sums around each of [..., H, W] in which near cells count most."""
    return _window(_window(_window(cells, 2), 2), 2)


def _limited(field: Floats, repainted: Mask, feather: int) -> Floats:
    """Return a correction [3, H, W] of which the part above `FAR_CORRECTION` fades out."""
    peak = np.abs(field).max(axis=0)
    if peak.max() <= FAR_CORRECTION:
        return field
    # 1 at the border, 0 from a feather inside it.
    near = np.clip(2 - 2 * soften(repainted.astype(np.float32), 2 * feather), 0, 1)
    near *= near * (3 - 2 * near)  # flat at both ends
    share = FAR_CORRECTION / np.maximum(peak, np.float32(FAR_CORRECTION))
    return field * (share + (1 - share) * near)
