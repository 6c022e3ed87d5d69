"""Measure a bundle's image operations: `evaluate --operations`.

Every case begins with a true render, not with an image of the weights, so that a figure is the
operation's own. The first judge reads the results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.canvas import Mask, Pixels, box_mask, outpaint_canvas, region_weight
from model.compositing import composite
from model.image_request import ImageRequest
from model.tiles import lanczos
from model.training.benchmark import rendered
from model.training.captions import describe
from model.training.checker import Found, Judge, Reading, read_all
from model.training.kinds import KINDS, SHAPES
from model.training.palette import NAMES, distance, nearest
from model.training.scene_samplers import lone, shape_colours
from model.training.scenes import SQUARE, Scene, Thing, backgrounds, object_named, pick
from model.training.studio import Studio

Figures = dict[str, float]

STRENGTH = 0.6
UPSCALE, UPSCALE_STRENGTH = 2.0, 0.3
FRAMES = 8
_SEED = 20231122
_NEAR = 0.12  # share of the image's side within which a thing has kept its position
_UNLIKE = 14.0  # ΔE from the background from which a pixel is a thing's


@dataclass(frozen=True)
class Stage:
    """The parts of a measurement: rows, a judge, and sprites to render cases from."""

    studio: Studio
    judge: Judge
    sprites: Tensor

    def render(self, scene: Scene, seed: int) -> Pixels:
        """Return the scene's true image [H, W, 3] in the bundle's native size."""
        size = self.studio.pipeline.config.native_size
        return np.asarray(rendered([scene], [seed], self.sprites, size)[0])

    def drawn(self, rows: Sequence[ImageRequest]) -> list[Pixels]:
        """Return the images of rows, uint8 [H, W, 3] each."""
        return self.studio.drawn(rows)

    def read(self, images: Sequence[Pixels]) -> list[Reading]:
        """Return the judge's readings of images [H, W, 3]."""
        return read_all(self.judge, images)


def _generators(stream: int, count: int) -> list[random.Random]:
    """Return one a case, the same whatever the other cases are."""
    return [random.Random(f"{_SEED}/{stream}/{i}") for i in range(count)]


def _share(hits: Sequence[bool]) -> float:
    return round(float(np.mean(hits)), 4)


def _caption(scene: Scene, rng: random.Random) -> str:
    return describe(scene, rng, complete=True).text


def _shape(rng: random.Random) -> Scene:
    """Return a shape of any colour, size and side before a plain background."""
    shape = pick(rng, SHAPES)
    return _lone(rng, Thing(shape, pick(rng, shape_colours(shape))))


def _object(rng: random.Random) -> Scene:
    return _lone(rng, object_named(pick(rng, KINDS).name))


def _lone(rng: random.Random, thing: Thing) -> Scene:
    while True:
        scene = lone(rng, thing, painted=0.0)
        if scene.aspect == SQUARE and scene.background in NAMES:
            return scene


def _another(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with a shape of another kind and colour in the thing's place."""
    old = scene.things[0]
    while True:
        shape = pick(rng, SHAPES)
        new = replace(old, kind=shape, colour=pick(rng, shape_colours(shape)))
        apart = new.kind != old.kind and new.colour != old.colour
        if apart and scene.background in backgrounds(new.kind, new.colour):
            return replace(scene, things=(new,))


def _first(reading: Reading) -> Found | None:
    return next(iter(reading.things), None)


def _is(found: Found | None, thing: Thing) -> bool:
    return found is not None and found.kind == thing.kind


def _coloured(found: Found | None, thing: Thing) -> bool:
    return found is not None and found.colour == thing.colour


def background_rgb(image: Pixels) -> npt.NDArray[np.float64]:
    """Return the median colour [3] of the border of an image [H, W, 3]."""
    edge = max(1, min(image.shape[:2]) // 32)
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[edge:-edge, edge:-edge] = True
    return np.asarray(np.median(image[~inner], axis=0))


def inpaint(stage: Stage, count: int) -> Figures:
    """Replace a shape by another: the mask is a square around it, the prompt the wanted image."""
    rows, cases = [], []
    for i, rng in enumerate(_generators(1, count)):
        scene = _shape(rng)
        image, wanted = stage.render(scene, i), _another(scene, rng)
        mask = around(image)
        rows.append(stage.studio.inpainting(_caption(wanted, rng), i, image, mask))
        cases.append((image, mask, wanted.things[0]))
    pairs = list(zip(stage.drawn(rows), cases, strict=True))
    results = [composite(image, drawn, mask) for drawn, (image, mask, _) in pairs]
    found = [_first(reading) for reading in stage.read(results)]
    judged = list(zip(results, cases, found, strict=True))
    same = [(result[~mask] == image[~mask]).all() for result, (image, mask, _), _ in judged]
    return {
        "object_in_mask": _share(
            [_is(f, thing) and _inside(f, mask) for _, (_, mask, thing), f in judged]
        ),
        "colour": _share([_coloured(f, thing) for _, (_, _, thing), f in judged]),
        "outside_identical": _share([bool(alike) for alike in same]),
    }


def around(image: Pixels, margin: float = 0.08) -> Mask:
    """Return a square around everything unlike the plain background.

    margin: by how much it is larger on every side, in shares of the image's.
    """
    unlike = distance(image, background_rgb(image)) > _UNLIKE
    rows, columns = (np.flatnonzero(unlike.any(axis=axis)) for axis in (1, 0))
    extents = [places[-1] - places[0] for places in (rows, columns)]
    half = max(extents) / 2 + margin * min(image.shape[:2])
    y, x = ((places[0] + places[-1]) / 2 for places in (rows, columns))
    mask = np.zeros(image.shape[:2], dtype=np.bool_)
    spans = [slice(max(0, round(at - half)), round(at + half) + 1) for at in (y, x)]
    mask[spans[0], spans[1]] = True
    return mask


def _inside(found: Found | None, mask: Mask) -> bool:
    """Return whether a thing's centre lies where the mask is."""
    if found is None:
        return False
    x, y = (min(1.0, max(0.0, share)) for share in found.centre)
    return bool(mask[round(y * (mask.shape[0] - 1)), round(x * (mask.shape[1] - 1))])


def outpaint(stage: Stage, count: int) -> Figures:
    """Continue an image on one to four sides, without a prompt."""
    step = stage.studio.pipeline.config.size_step
    colours, seams = list[bool](), list[bool]()
    for i, rng in enumerate(_generators(2, count)):
        scene = _shape(rng) if i % 3 else _object(rng)
        image = stage.render(scene, i)
        sides = rng.sample(["left", "right", "up", "down"], 1 + i % 4)
        margins = dict.fromkeys(sides, step)
        canvas, kept = outpaint_canvas(image, **margins)
        (drawn,) = stage.drawn([stage.studio.outpainting("", i, image, **margins)])
        result = composite(canvas, drawn, ~kept)
        colours.append(nearest(np.median(result[~kept], axis=0)) == scene.background)
        seams.append(seam(result, kept) <= _UNLIKE)
    return {"background_colour": _share(colours), "seam_invisible": _share(seams)}


def seam(image: Pixels, kept: Mask) -> float:
    """Return the median ΔE across the border of what is kept, from one pixel to the next."""
    steps = []
    for axis in (0, 1):
        length = image.shape[axis]
        ahead, behind = (np.take(image, range(i, length - 1 + i), axis) for i in (1, 0))
        border = np.diff(kept.astype(np.int8), axis=axis) != 0
        steps.append(distance(ahead[border], behind[border]))
    return float(np.median(np.concatenate(steps)))


def variations(stage: Stage, count: int) -> Figures:
    """Draw two variations of every object's image, by other seeds."""
    studio = stage.studio
    rows = []
    kinds = []
    originals = []
    for i, rng in enumerate(_generators(3, count)):
        scene = _object(rng)
        image = stage.render(scene, i)
        rows += [studio.text("", 2 * i + j, like=image) for j in (0, 1)]
        kinds.append(scene.things[0])
        originals.append(studio.seen(image))
    drawn = stage.drawn(rows)
    found = [_first(reading) for reading in stage.read(drawn)]
    kept = [_is(found[2 * i + j], thing) for i, thing in enumerate(kinds) for j in (0, 1)]
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    truth = F.normalize(torch.cat(originals).float(), dim=-1)
    seen = F.normalize(torch.cat([studio.seen(one) for one, _ in pairs]).float(), dim=-1)
    closest = (seen @ truth.T).argmax(1).cpu()
    return {
        "object": _share(kept),
        "clip_finds_original": _share((closest == torch.arange(count)).tolist()),
        "differ": _share([_apart(one, other) > 1 for one, other in pairs]),
    }


def edit(stage: Stage, count: int) -> Figures:
    """Give a shape another colour at strength 0.6."""
    rows = []
    wanted = []
    before = []
    for i, rng in enumerate(_generators(4, count)):
        scene = _shape(rng)
        (old,) = scene.things
        colours = [
            name
            for name in shape_colours(old.kind)
            if name != old.colour and scene.background in backgrounds(old.kind, name)
        ]
        new = replace(scene, things=(replace(old, colour=pick(rng, colours)),))
        image = stage.render(scene, i)
        rows.append(stage.studio.edit(_caption(new, rng), i, image, STRENGTH))
        wanted.append(new.things[0])
        before.append(image)
    found = [_first(reading) for reading in stage.read(stage.drawn(rows))]
    earlier = [_first(reading) for reading in stage.read(before)]
    pairs = list(zip(wanted, found, strict=True))
    return {
        "colour_changed": _share([_coloured(f, thing) for thing, f in pairs]),
        "position_kept": _share([_beside(a, b) for a, b in zip(earlier, found, strict=True)]),
        "shape_kept": _share([_is(f, thing) for thing, f in pairs]),
    }


def upscale(stage: Stage, count: int) -> Figures:
    """Draw objects' images twice as large, without a prompt and with one.

    The originals are true renders of twice the native size, scaled down. Of the kinds that are read
    in those, `kind_kept` is the share that is read in the results, all at the native size. Gradient
    energies, of results, renders and originals enlarged by Lanczos' filter, compare sharpness.
    """
    native = stage.studio.pipeline.config.native_size
    size = round(UPSCALE * native[0]), round(UPSCALE * native[1])
    hits: dict[str, list[bool]] = {name: [] for name in ("kind", "sharper", "nearer")}
    prompted: dict[str, list[bool]] = {name: [] for name in hits}
    for i, rng in enumerate(_generators(7, count)):
        scene = _object(rng)
        truth = np.asarray(rendered([scene], [i], stage.sprites, size)[0])
        small = lanczos(truth, native)
        energies = gradient_energy(truth), gradient_energy(lanczos(small, size))
        for prompt, own in (("", hits), (_caption(scene, rng), prompted)):
            result = stage.studio.upscaled(prompt, i, small, UPSCALE, UPSCALE_STRENGTH)
            before, after = map(_first, stage.read([small, lanczos(result, native)]))
            if _is(before, scene.things[0]):
                own["kind"].append(_is(after, scene.things[0]))
            energy = gradient_energy(result)
            own["sharper"].append(energy > energies[1])
            own["nearer"].append(abs(energy - energies[0]) < abs(energies[1] - energies[0]))
    return {
        f"{name}{suffix}": _share(own[figure] or [False])
        for suffix, own in (("", hits), ("_prompted", prompted))
        for name, figure in (
            ("kind_kept", "kind"),
            ("sharper_than_lanczos", "sharper"),
            ("sharpness_nearer_truth", "nearer"),
        )
    }


def gradient_energy(image: Pixels) -> float:
    """Return the mean squared difference of neighbouring pixels of an image [H, W, 3]."""
    values = image.astype(np.float64)
    return float(sum(np.square(np.diff(values, axis=axis)).mean() for axis in (0, 1)))


def _beside(before: Found | None, after: Found | None) -> bool:
    if before is None or after is None:
        return False
    return max(abs(a - b) for a, b in zip(before.centre, after.centre, strict=True)) < _NEAR


def interpolate(stage: Stage, count: int) -> Figures:
    """Draw eight frames between two prompts; the mean ΔE of pixels compares images."""
    studio = stage.studio
    ends, nearer = list[bool](), list[bool]()
    for i, rng in enumerate(_generators(5, count)):
        prompts = _caption(_shape(rng), rng), _caption(_shape(rng), rng)
        rows = [*studio.frames(prompts, i, FRAMES), *(studio.text(prompt, i) for prompt in prompts)]
        *frames, first, last = stage.drawn(rows)
        ends.append(_apart(frames[0], first) < 1 and _apart(frames[-1], last) < 1)
        one, half = (_mean_apart(frames, gap) for gap in (1, FRAMES // 2))
        nearer.append(one < half)
    return {"ends_match": _share(ends), "neighbours_nearer": _share(nearer)}


def _apart(one: Pixels, other: Pixels) -> float:
    return float(distance(one, other).mean())


def _mean_apart(frames: Sequence[Pixels], gap: int) -> float:
    pairs = zip(frames, frames[gap:], strict=False)
    return float(np.mean([_apart(one, other) for one, other in pairs]))


def regions(stage: Stage, count: int) -> Figures:
    """Draw two shapes, each asked for on its own half of one wide background."""
    config = stage.studio.pipeline.config
    width, height = config.native_size[0] + config.size_step, config.native_size[1]
    boxes = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    halves = [region_weight(box_mask(box, width, height), 1.0, 0.0) for box in boxes]
    rows, cases = [], []
    for i, rng in enumerate(_generators(6, count)):
        scene = _shape(rng)
        left, right = scene.things[0], _another(scene, rng).things[0]
        things = [
            replace(left, side="left", size="small"),
            replace(right, side="right", size="small"),
        ]
        texts = [_caption(replace(scene, things=(thing,)), rng) for thing in things]
        base = _caption(Scene(scene.background), rng)
        made = list(zip(texts, halves, strict=True))
        rows.append(stage.studio.text(base, i, (width, height), regions=made))
        cases.append(things)
    sides = [by_side(reading) for reading in stage.read(stage.drawn(rows))]
    pairs = [list(zip(f, t, strict=True)) for f, t in zip(sides, cases, strict=True)]
    kinds = [[_is(found, thing) for found, thing in some] for some in pairs]
    colours = [[_coloured(found, thing) for found, thing in some] for some in pairs]
    return {
        "object_on_its_side": _share([hit for hits in kinds for hit in hits]),
        "colour_on_its_side": _share([hit for hits in colours for hit in hits]),
        "both": _share([all(hits) for hits in kinds]),
    }


def by_side(reading: Reading) -> list[Found | None]:
    """Return the most certain thing on the left, and on the right."""
    return [
        next((f for f in reading.things if (f.centre[0] > 0.5) == right), None)
        for right in (False, True)
    ]


OPERATIONS: dict[str, Callable[[Stage, int], Figures]] = {
    "inpaint": inpaint,
    "outpaint": outpaint,
    "variations": variations,
    "edit": edit,
    "upscale": upscale,
    "interpolate": interpolate,
    "regions": regions,
}
