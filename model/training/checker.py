"""Judges a picture of a scene by its pixels alone: no network, so that no network marks its own work.

The background is the border's colour, things are connected regions unlike it, and a thing's kind is the template that leaves the least
of its pixels unexplained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from model.training.palette import distance, nearest
from model.training.scenes import (
    DEFAULT_OBJECTS,
    KINDS,
    LONE_EXTENT,
    PAIR_EXTENT,
    SHAPES,
    Floats,
    Pixels,
    Relation,
    Scene,
    Side,
    Size,
    Thing,
    sprite,
)

_UNLIKE = 14.0  # ΔE from the background at which a smoothed pixel belongs to a thing
_SPECK = 0.004  # share of the picture below which a region is no thing
_CELL = 32  # pixels a side in which regions and templates are compared
# Blur makes a region's box larger than the thing in it, the more so the smaller the thing: (scale, Gaussian sigma in cell pixels).
_VARIANTS = tuple((scale, sigma) for scale in (1.0, 0.94, 0.88, 0.82) for sigma in (0.5, 1.5))
_GLYPH_TOLERANCE = 24.0  # ΔE between an object's mean colour and its glyph's
_UNEXPLAINED = 0.45  # share of a region's energy a template may leave over and still count as its kind


@dataclass(frozen=True)
class Found:
    """A thing in a picture.

    colour: palette name of its strongest colour. mean: its average RGB. centre: (x, y) in shares of width and height. extent: (width,
    height) in shares of the shorter side. unexplained: share of its contrast that the best template leaves over, 0 is perfect.
    """

    kind: str
    colour: str
    mean: tuple[float, float, float]
    centre: tuple[float, float]
    extent: tuple[float, float]
    unexplained: float


@dataclass(frozen=True)
class Verdict:
    """What of a scene a picture shows. Colours, shapes, positions and sizes are true only if they hold for all the scene's things."""

    background: bool
    count: bool
    colours: bool
    shapes: bool
    positions: bool
    sizes: bool

    @property
    def all(self) -> bool:
        """Whether the picture shows the whole scene."""
        return self.background and self.count and self.colours and self.shapes and self.positions and self.sizes


# ── finding ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def background_rgb(image: Pixels) -> npt.NDArray[np.float64]:
    """Median colour `[3]` of the border of a picture `[H,W,3]`."""
    edge = max(1, min(image.shape[:2]) // 32)
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[edge:-edge, edge:-edge] = True
    return np.asarray(np.median(image[~inner], axis=0))


def _unit(image: Pixels) -> int:
    """The width in pixels of an edge's blur."""
    return max(1, round(min(image.shape[:2]) / 64))


def _regions(image: Pixels, background: npt.NDArray[np.float64]) -> Iterator[npt.NDArray[np.bool_]]:
    """Masks `[H,W]` of the things, largest first. Parts hardly apart are one thing: glyphs have thin gaps in the background's colour."""
    sigma = 0.7 * _unit(image)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))
    unlike = distance(smooth, background) > _UNLIKE
    labels, count = ndimage.label(ndimage.binary_dilation(unlike, iterations=_unit(image)))
    areas = np.bincount(labels[unlike], minlength=count + 1)
    for label in np.argsort(-areas[1:]) + 1:
        if areas[label] >= _SPECK * unlike.size:
            yield unlike & (labels == label)


@lru_cache(maxsize=4)
def _templates(objects: int) -> tuple[Floats, Floats]:
    """Every kind's variants, T in all, as cells of P pixels → (opacity `[T,P]`, RGB times opacity `[T,3,P]`)."""
    kinds = KINDS[: len(SHAPES) + objects]
    planes = np.zeros((len(kinds) * len(_VARIANTS), 4, _CELL, _CELL), dtype=np.float32)
    for plane, (kind, (scale, sigma)) in zip(planes, product(kinds, _VARIANTS), strict=True):
        rgb, alpha = sprite(kind, round(_CELL * scale))
        top, left = ((_CELL - length) // 2 for length in alpha.shape)
        plane[:, top : top + alpha.shape[0], left : left + alpha.shape[1]] = [alpha, *(rgb * alpha)]
        plane[:] = ndimage.gaussian_filter(plane, (0, sigma, sigma), mode="constant")
    flat = planes.reshape(len(planes), 4, -1)
    return np.ascontiguousarray(flat[:, 0]), np.ascontiguousarray(flat[:, 1:])


def _best_template(contrast: Floats, background: npt.NDArray[np.float64], objects: int) -> tuple[str, float, float]:
    """(kind, scale, share of the contrast `[3,P]` left over) of the template that explains a region best; a shape may have any colour."""
    opacity, inks = _templates(objects)
    energy = np.square(contrast).sum()
    n = len(SHAPES) * len(_VARIANTS)
    # The best colour for a shape is the least-squares one, which leaves |d|² − |T·d|²/|T|².
    shapes = energy - np.square(opacity[:n] @ contrast.T).sum(axis=1) / np.square(opacity[:n]).sum(axis=1)
    glyphs = inks[n:] - opacity[n:, None] * background[:, None]
    left = np.concatenate([shapes, np.square(contrast - glyphs).sum(axis=(1, 2))]) / energy
    best = int(np.argmin(left))
    return KINDS[best // len(_VARIANTS)], _VARIANTS[best % len(_VARIANTS)][0], float(left[best])


def _cell(contrast: npt.NDArray[np.float64], box: tuple[int, int, int, int]) -> Floats:
    """The square around a box (left, top, right, bottom) of `[H,W,3]`, scaled to a cell → `[3,P]`; zero outside the picture."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    pad = side  # a square never reaches further out than its side
    planes = np.pad(contrast, ((pad, pad), (pad, pad), (0, 0))).astype(np.float32).transpose(2, 0, 1)
    window = (x + pad, y + pad, x + pad + side, y + pad + side)
    scaled = [Image.fromarray(plane).resize((_CELL, _CELL), Image.Resampling.BILINEAR, box=window) for plane in planes]
    return np.stack([np.asarray(plane).ravel() for plane in scaled])


def _strongest(pixels: npt.NDArray[np.float64], background: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Median of the pixels `[N,3]` least like the background: edges are mixtures, and small things are mostly edge."""
    contrast = distance(pixels, background)
    return np.asarray(np.median(pixels[contrast >= 0.8 * np.quantile(contrast, 0.9)], axis=0))


def _identify(image: Pixels, mask: npt.NDArray[np.bool_], background: npt.NDArray[np.float64], objects: int) -> Found:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    contrast = (image - background) * ndimage.binary_dilation(mask, iterations=_unit(image))[..., None]
    kind, scale, unexplained = _best_template(_cell(contrast, (left, top, right, bottom)), background, objects)
    core = ndimage.binary_erosion(mask, iterations=_unit(image))
    pixels = image[core if core.any() else mask].astype(np.float64)
    red, green, blue = pixels.mean(axis=0).tolist()
    height, width = mask.shape
    unit = min(height, width) / scale
    return Found(
        kind=kind,
        colour=nearest(_strongest(pixels, background)),
        mean=(red, green, blue),
        centre=((left + right) / 2 / width, (top + bottom) / 2 / height),
        extent=((right - left) / unit, (bottom - top) / unit),
        unexplained=unexplained,
    )


def objects_found(image: Pixels, objects: int = DEFAULT_OBJECTS) -> list[Found]:
    """The things in a picture `[H,W,3]`, largest first, among all shapes and the first `objects` objects."""
    background = background_rgb(image)
    return [_identify(image, mask, background, objects) for mask in _regions(image, background)]


# ── judging ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_kind(found: Found, thing: Thing) -> bool:
    return found.kind == thing.kind and found.unexplained < _UNEXPLAINED


@lru_cache(maxsize=len(KINDS))
def _glyph_mean(kind: str) -> tuple[float, ...]:
    rgb, alpha = sprite(kind, _CELL)
    return tuple(((rgb * alpha).sum(axis=(1, 2)) / alpha.sum()).tolist())


def _has_colour(found: Found, thing: Thing) -> bool:
    if thing.kind in SHAPES:
        return found.colour == thing.colour
    return bool(distance(found.mean, _glyph_mean(thing.kind)) < _GLYPH_TOLERANCE)


def _size(found: Found, extents: dict[Size, tuple[float, float]]) -> Size:
    return min(extents, key=lambda size: abs(max(found.extent) - sum(extents[size]) / 2))


def _offset(centre: float, extent: float, room: float) -> float:
    """-1 at the left or top edge (less the usual margin), 0 in the middle, 1 at the right or bottom; extent and room in one unit."""
    slack = max((room - extent) / 2 - 0.06, 0.04)
    return (centre - 0.5) * room / slack


def _side(found: Found, shape: tuple[int, ...]) -> Side | None:
    """None is a corner, which no caption speaks of."""
    x, y = (_offset(found.centre[a], found.extent[a], shape[1 - a] / min(shape[:2])) for a in (0, 1))
    if abs(x) < 0.5:
        return "top" if y < -0.5 else "bottom" if y > 0.5 else "centre"
    if abs(y) > 0.5:
        return None
    return "left" if x < 0 else "right"


def _relates(first: Found, second: Found, relation: Relation, shape: tuple[int, ...]) -> bool:
    """Whether the step from first to second goes the right way, and more that way than across."""
    x, y = ((second.centre[a] - first.centre[a]) * shape[1 - a] for a in (0, 1))
    along, across = (y, x) if relation in ("above", "below") else (x, y)
    return abs(across) < (-along if relation in ("right of", "below") else along)


def _matches(found: Sequence[Found], scene: Scene, shape: tuple[int, ...]) -> tuple[bool, bool, bool, bool]:
    """(colours, shapes, positions, sizes) with found[i] taken for scene.things[i]."""
    pairs = list(zip(found, scene.things, strict=True))
    extents = LONE_EXTENT if len(pairs) == 1 else PAIR_EXTENT
    return (
        all(_has_colour(f, thing) for f, thing in pairs),
        all(_is_kind(f, thing) for f, thing in pairs),
        _relates(found[0], found[1], scene.relation, shape) if scene.relation else all(_side(f, shape) == t.side for f, t in pairs),
        all(_size(f, extents) == thing.size for f, thing in pairs),
    )


def judge(image: Pixels, scene: Scene, objects: int = DEFAULT_OBJECTS) -> Verdict:
    """Whether a picture `[H,W,3]` shows the scene. Things may be told apart by kind, colour and size, so two that have swapped places
    fail by their positions only. With more things than the scene has, the largest are judged; with fewer, all but the background fails.
    """
    background = nearest(background_rgb(image)) == scene.background
    things = objects_found(image, objects)
    count, n = len(things) == len(scene.things), len(scene.things)
    if len(things) < n:
        return Verdict(background, count, False, False, False, False)
    candidates = [_matches(order, scene, image.shape) for order in permutations(things[:n])]
    # As many hits as possible; between equals the order that holds in more than the positions, then as it stands.
    best = max(candidates, key=lambda hits: (hits[0] + hits[1] + hits[3], hits[2]))
    return Verdict(background, count, *best)
