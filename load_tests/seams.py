"""Measure the seams of repainted images: is a border visible, is a ring left around what is gone?

    python -m load_tests.seams                                 # a decoder's stand-in, no model
    python -m load_tests.seams --bundle tiny                   # a bundle's VQGAN
    python -m load_tests.seams --sheet docs/seams.webp

An object on five surfaces is removed by four kinds of masks, and the surfaces are outpainted. The
drawn image is the one that an ideal model draws: the surface without the object, its fine texture
another one. The decoder's stand-in blurs it and errs by an offset and by waves of other colours;
a VQGAN does what it does. Nothing is sampled.

Two criteria for every case:

- seam: the difference between neighbours on both sides of the border is at most 1.1 times the one
  between neighbours 2 to 6 pixels inside or outside (or what the content itself has there, because
  an edge may lie on the border), plus one level of 255 for rounding.
- ring: within 8 pixels inside the border, the mean ΔE to the drawing without the decoder's error is
  at most 2. A VQGAN's error is not known apart from its drawing: with `--bundle` the means of 5×5
  pixels are compared with those of the surface.

Kept pixels must be identical. The last line is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
from numpy.typing import NDArray
from rich.table import Table

from load_tests.report import Report
from model.canvas import Mask, Pixels, soften
from model.compositing import FEATHER, composite
from model.training.palette import distance

Floats = NDArray[np.float64]
Generator = np.random.Generator
# Draws a case as a decoder shows it.
Decoder = Callable[["Case"], Pixels]

ZONE = 8
INSIDE = range(2, 7)
STRONGER = 1.1
LEVEL = 1.0
DELTA_E = 2.0
TOKEN = 8
OBJECTS = 2
CROP = 96


# ── surfaces: coarse structure, which a model continues, and fine texture, which it invents ───────


def _flat(side: int, rng: Generator) -> Floats:
    return np.broadcast_to(rng.uniform(20, 235, 3), (side, side, 3))


def _gradient(side: int, rng: Generator) -> Floats:
    one, other = rng.uniform(20, 235, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:side, :side] / side - 0.5
    share = np.clip(0.5 + 0.7 * (x * np.cos(angle) + y * np.sin(angle)), 0, 1)[..., None]
    return one * (1 - share) + other * share


def _photo(side: int, rng: Generator) -> Floats:
    """Return octaves of noise, mostly of brightness, down to waves of 16 pixels."""
    waves = [_octave(side, cells, 12 * 8 / cells**0.9, rng) for cells in (3, 6, 12, side // 16)]
    return np.clip(_flat(side, rng) * 0.5 + 64 + np.sum(waves, axis=0), 0, 255)


def _photo_detail(side: int, rng: Generator) -> Floats:
    return _octave(side, side // 5, 10, rng) + _octave(side, side // 2, 6, rng)


def _checker(side: int, rng: Generator) -> Floats:
    one, other = rng.uniform(20, 235, (2, 3))
    size, offsets = 13, rng.integers(13, size=2)
    y, x = np.mgrid[:side, :side]
    odd = ((y + offsets[0]) // size + (x + offsets[1]) // size) % 2
    return np.where(odd[..., None] == 1, one, other)


def _noise_detail(side: int, rng: Generator) -> Floats:
    return rng.normal(0, 30, (side, side, 3))


def _nothing(side: int, rng: Generator) -> Floats:
    return np.zeros((side, side, 3))


def _octave(side: int, cells: int, deviation: float, rng: Generator) -> Floats:
    """Return smooth noise [side, side, 3] of so many cells a side."""
    coarse = rng.normal(0, deviation, (3, cells + 2, cells + 2)).astype(np.float32)
    size, method = (side, side), PIL.Image.Resampling.BICUBIC
    planes = [np.asarray(PIL.Image.fromarray(plane).resize(size, method)) for plane in coarse]
    colours = np.stack(planes, axis=-1).astype(np.float64)
    return 0.3 * colours + colours[..., :1]


SURFACES = {
    "flat": (_flat, _nothing),
    "gradient": (_gradient, _nothing),
    "photo": (_photo, _photo_detail),
    "checker": (_checker, _nothing),
    "noise": (_flat, _noise_detail),
}


# ── masks ─────────────────────────────────────────────────────────────────────────────────────────


def _ellipse(side: int, rng: Generator) -> Pixels:
    """Return a leaning ellipse [side, side] with an antialiased edge; 255 is inside."""
    fine = 4 * side
    image = PIL.Image.new("L", (fine, fine))
    centre = rng.uniform(0.42, 0.58, 2) * fine
    radii = rng.uniform(0.1, 0.2, 2) * fine
    PIL.ImageDraw.Draw(image).ellipse([*(centre - radii), *(centre + radii)], fill=255)
    turned = image.rotate(rng.uniform(0, 180), center=tuple(centre))
    return np.asarray(turned.resize((side, side), PIL.Image.Resampling.BOX))


def _tight(thing: Pixels) -> Pixels:
    return thing


def _loose(thing: Pixels) -> Pixels:
    rows, columns = (np.flatnonzero(thing.any(axis=axis)) for axis in (1, 0))
    mask = np.zeros_like(thing)
    mask[rows[0] - 10 : rows[-1] + 11, columns[0] - 10 : columns[-1] + 11] = 255
    return mask


def _soft(thing: Pixels) -> Pixels:
    """Return weights that reach 0 about 16 pixels outside, and 255 only outside the object too."""
    wide = np.asarray(PIL.Image.fromarray(thing).filter(PIL.ImageFilter.MaxFilter(21)))
    return np.rint(soften((wide > 0).astype(np.float32), 16) * 255).astype(np.uint8)


def _wide(thing: Pixels) -> Pixels:
    mask = np.full_like(thing, 255)
    mask[: len(thing) // 10] = 0
    mask[:, : len(thing) // 8] = 0
    return mask


def _outpainted(thing: Pixels) -> Pixels:
    mask = np.zeros_like(thing)
    mask[:, len(thing) * 5 // 8 :] = 255
    return mask


MASKS = {"tight": _tight, "loose": _loose, "soft": _soft, "wide": _wide, "outpaint": _outpainted}
PAIRS = [(surface, mask) for surface in SURFACES for mask in MASKS]


# ── cases ─────────────────────────────────────────────────────────────────────────────────────────


class Case(NamedTuple):
    """A removed object. original, clean, drawn: uint8 [H, W, 3]; weight: uint8 [H, W].

    clean: the surface without the object. drawn: that, with other fine texture in the tokens that
    the mask touches, before any decoder.
    """

    surface: str
    mask: str
    original: Pixels
    clean: Pixels
    drawn: Pixels
    weight: Pixels
    seed: tuple[int, ...]


def cases(side: int) -> list[Case]:
    """Return all cases of images of this side in pixels."""
    return [
        case(surface, mask, side, (i, number))
        for i, (surface, mask) in enumerate(PAIRS)
        for number in range(1 if mask == "outpaint" else OBJECTS)
    ]


def case(surface: str, mask: str, side: int, seed: tuple[int, ...]) -> Case:
    """Return a case of these names in `SURFACES` and `MASKS`, another one for every seed."""
    rng = np.random.default_rng(seed)
    coarse, detail = SURFACES[surface]
    background, fine, other = coarse(side, rng), detail(side, rng), detail(side, rng)
    thing, colour = _ellipse(side, rng), rng.uniform(0, 255, 3)
    weight = MASKS[mask](thing)
    share = (thing if mask != "outpaint" else np.zeros_like(thing))[..., None] / 255
    clean = background + fine
    return Case(
        surface,
        mask,
        _pixels(clean * (1 - share) + colour * share),
        _pixels(clean),
        _pixels(np.where(_tokens(weight)[..., None], background + other, clean)),
        weight,
        seed,
    )


def _pixels(values: Floats) -> Pixels:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _tokens(weight: Pixels) -> Mask:
    """Return the pixels [H, W] of all tokens that a mask touches."""
    height, width = weight.shape
    blocks = weight.reshape(height // TOKEN, TOKEN, width // TOKEN, TOKEN).any(axis=(1, 3))
    return blocks.repeat(TOKEN, axis=0).repeat(TOKEN, axis=1)


# ── decoders ──────────────────────────────────────────────────────────────────────────────────────


def blurred(case: Case) -> Pixels:
    """Return the drawn image as a decoder without errors of colour would show it."""
    padded = np.pad(case.drawn.astype(np.float64), [(1, 1), (1, 1), (0, 0)], mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return _pixels((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4)


def stand_in(case: Case) -> Pixels:
    """Return the drawn image blurred, with an offset and waves of other colours."""
    rng = np.random.default_rng((*case.seed, 1))
    side = len(case.drawn)
    y, x = np.mgrid[:side, :side]
    offset = rng.uniform(6, 16, 3) * rng.choice([-1, 1], 3)
    waves = [
        4 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
        for angle, length, phase in zip(
            rng.uniform(0, 2 * np.pi, 3),
            rng.uniform(0.5, 1.5, 3) * side,
            rng.uniform(0, 2 * np.pi, 3),
            strict=True,
        )
    ]
    return _pixels(blurred(case) + offset + np.stack(waves, axis=-1))


def vqgan(bundle: str) -> tuple[Decoder, int]:
    """Return a bundle's VQGAN as a decoder, and the native side in pixels."""
    import torch

    from model.config import find_bundle
    from model.pipeline import Pipeline
    from model.runtime import pick_device, pick_dtype, prepare

    prepare()
    device = pick_device("cpu")
    pipeline = Pipeline.load(find_bundle(bundle), device, pick_dtype("auto", device))

    def decode(case: Case) -> Pixels:
        tokens = pipeline.encode_images(torch.from_numpy(case.drawn)[None])
        return np.asarray(pipeline.decode(tokens)[0].numpy())

    return decode, max(pipeline.config.native_size)


# ── figures ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figures:
    """A case's figures.

    Attributes:
        seam: mean difference across the border, levels of 255.
        inside: the same between neighbours some pixels from it, on the side where it is larger.
        content: the same across the border without any error of colour.
        ring: mean ΔE to the drawing without it, within `ZONE` pixels inside the border.
        pasted_seam: seam without a correction.
        pasted_ring: ring without a correction.
        identical: whether kept pixels are.
    """

    seam: float
    inside: float
    content: float
    ring: float
    pasted_seam: float
    pasted_ring: float
    identical: bool

    @property
    def passes(self) -> bool:
        """Return whether the case meets the criteria."""
        seam = self.seam <= STRONGER * max(self.inside, self.content) + LEVEL
        return seam and self.ring <= DELTA_E and self.identical


def measured(
    case: Case, decoded: Pixels, drawing: Pixels, local: bool = False, feather: int = FEATHER
) -> Figures:
    """Return a case's figures.

    Args:
        case: the case.
        decoded: uint8 [H, W, 3], its drawn image from the decoder.
        drawing: uint8 [H, W, 3], that without the decoder's error of colour.
        local: compare means of 5×5 pixels for the ring.
        feather: of the composite, in pixels.
    """
    result = composite(case.original, decoded, case.weight, feather)
    pasted = composite(case.original, decoded, case.weight, 0)
    # The perfect result: the mask's blend of clean images.
    ideal = composite(case.clean, drawing, case.weight, 0)
    rings = border_distance(case.weight > 0)
    zone = (rings >= 1) & (rings <= ZONE)
    return Figures(
        seam=_gradient_at(result, rings, 0),
        inside=max(
            float(np.mean([_gradient_at(result, rings, side * step) for step in INSIDE]))
            for side in (-1, 1)
        ),
        content=_gradient_at(ideal, rings, 0),
        ring=_apart(result, ideal, zone, local),
        pasted_seam=_gradient_at(pasted, rings, 0),
        pasted_ring=_apart(pasted, ideal, zone, local),
        identical=bool((result == case.original)[case.weight == 0].all()),
    )


def border_distance(repainted: Mask) -> NDArray[np.int64]:
    """Return chessboard distances [H, W] to the border: 1, 2, … inside and 0, -1, … outside."""
    rings = np.where(repainted, ZONE + 1, -ZONE)
    for inside, sign in ((repainted, 1), (~repainted, -1)):
        reached = ~inside
        for ring in range(1, ZONE + 1):
            around = np.pad(reached, 1, mode="edge")
            rows = around[:-2] | around[1:-1] | around[2:]
            grown = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
            rings[grown & ~reached] = ring if sign == 1 else 1 - ring
            reached = grown
    return rings


def _gradient_at(image: Pixels, rings: NDArray[np.int64], ring: int) -> float:
    """Return the mean difference between neighbours in ring `ring` and the next one inwards."""
    levels, values = image.astype(np.float64), []
    for axis in (0, 1):
        low, high = (np.take(rings, range(i, rings.shape[axis] - 1 + i), axis) for i in (0, 1))
        pairs = (np.minimum(low, high) == ring) & (np.maximum(low, high) == ring + 1)
        values.append(np.abs(np.diff(levels, axis=axis)).mean(axis=-1)[pairs])
    found = np.concatenate(values)
    return float(found.mean()) if len(found) else 0.0


def _apart(image: Pixels, other: Pixels, zone: Mask, local: bool) -> float:
    """Return the mean ΔE in the zone."""
    one, two = (_local(each, zone) if local else each.astype(np.float64) for each in (image, other))
    return float(distance(one[zone], two[zone]).mean())


def _local(image: Pixels, zone: Mask) -> Floats:
    """Return means [H, W, 3] of those of 5×5 pixels that lie in the zone."""
    weighted = np.dstack([image * zone[..., None], zone]).astype(np.float64)
    padded = np.pad(weighted, [(2, 2), (2, 2), (0, 0)])
    height, width = zone.shape
    sums = sum(
        (padded[dy : dy + height, dx : dx + width] for dy in range(5) for dx in range(5)),
        np.zeros_like(weighted),
    )
    return np.asarray(sums[..., :3] / np.maximum(sums[..., 3:], 1))


# ── output ────────────────────────────────────────────────────────────────────────────────────────


def sheet(made: Sequence[tuple[Case, Pixels]], feather: int) -> PIL.Image.Image:
    """Return all cases as crops around their border: original, pasted, result; a row a surface."""
    rows = [[pair for pair in made if pair[0].surface == surface] for surface in SURFACES]
    gap, title = 6, 12
    tile = (3 * (CROP + 2) + gap, CROP + gap)
    size = tile[0] * max(map(len, rows)) + gap, title + tile[1] * len(rows) + gap
    image = PIL.Image.new("RGB", size, "white")
    write = PIL.ImageDraw.Draw(image)
    for column, (case, _) in enumerate(rows[0]):
        text = f"{case.mask}: original, pasted, feather {feather}"
        write.text((gap + column * tile[0], 1), text, fill="black")
    for y, row in enumerate(rows):
        for x, (case, decoded) in enumerate(row):
            part = _crop_around(case.weight)
            shown = [
                case.original,
                composite(case.original, decoded, case.weight, 0),
                composite(case.original, decoded, case.weight, feather),
            ]
            for number, each in enumerate(shown):
                at = (gap + x * tile[0] + number * (CROP + 2), title + y * tile[1])
                image.paste(PIL.Image.fromarray(each[part]), at)
    return image


def _crop_around(weight: Pixels) -> tuple[slice, slice]:
    """Return the rows and columns of a crop around the border pixel nearest to the centre."""
    places = np.argwhere(border_distance(weight > 0) == 1)
    centre = np.array(weight.shape) / 2
    y, x = places[np.abs(places - centre).sum(axis=1).argmin()]
    top, left = (
        int(np.clip(at - CROP // 2, 0, length - CROP))
        for at, length in zip((y, x), weight.shape, strict=True)
    )
    return slice(top, top + CROP), slice(left, left + CROP)


def _table(rows: Sequence[tuple[Case, Figures]]) -> Table:
    table = Table(title="Seams, by surface and mask", title_justify="left")
    for column in ("surface", "mask", "n"):
        table.add_column(column)
    for column in ("seam", "inside", "content", "pasted", "ring ΔE", "pasted ΔE", "passed"):
        table.add_column(column, justify="right")
    for surface in SURFACES:
        for mask in MASKS:
            found = [each for case, each in rows if (case.surface, case.mask) == (surface, mask)]
            names = ("seam", "inside", "content", "pasted_seam", "ring", "pasted_ring")
            means = [f"{np.mean([getattr(each, name) for each in found]):.1f}" for name in names]
            passed = f"{sum(each.passes for each in found)}/{len(found)}"
            table.add_row(surface, mask, str(len(found)), *means, passed)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write. Raises the errors of loading the bundle."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.seams",
        description="Seams of repainted images; the last line is JSON.",
    )
    parser.add_argument("--bundle", help="a bundle whose VQGAN decodes, instead of a stand-in")
    parser.add_argument("--side", type=int, help="pixels; default: 256, or the bundle's")
    parser.add_argument("--feather", type=int, default=FEATHER, help="pixels, 8 by default")
    parser.add_argument("--sheet", type=Path, help="write crops of all cases to this file")
    options = parser.parse_args(sent)
    report = Report("seams", command=shlex.join(["python", "-m", "load_tests.seams", *sent]))
    decode, native = vqgan(options.bundle) if options.bundle else (stand_in, 256)
    made = [(case, decode(case)) for case in cases(options.side or native)]
    figures = []
    for case, decoded in made:
        drawing = case.drawn if options.bundle else blurred(case)
        found = measured(case, decoded, drawing, bool(options.bundle), options.feather)
        figures.append((case, found))
    if options.sheet:
        sheet(made, options.feather).save(options.sheet, quality=70, method=6)
    report.add(_table(figures))
    failed = [
        {"surface": case.surface, "mask": case.mask, **vars(found)}
        for case, found in figures
        if not found.passes
    ]
    report.emit(
        {
            "decoder": options.bundle or "stand-in",
            "feather": options.feather,
            "cases": len(figures),
            "passed": len(figures) - len(failed),
            "failed": failed,
        }
    )


if __name__ == "__main__":
    main()
