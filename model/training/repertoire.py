"""How well a bundle's operations do what they are for, judged by reading pixels: `python -m model.training.evaluate --operations`.

Every case begins with a scene that is drawn exactly, not with what the weights make of it, so that a figure is the operation's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from model.canvas import Mask, Pixels, box_mask, composite, outpaint_canvas, region_weight
from model.training.captions import describe
from model.training.checker import Found, background_rgb, objects_found
from model.training.palette import NAMES, distance, nearest
from model.training.scenes import SHAPES, Scene, Thing, backgrounds, pick, render, sample_object, sample_shape
from model.training.studio import Studio

Figures = dict[str, float]

STRENGTH = 0.6
FRAMES = 8
_SEED = 20231122
_NEAR = 0.12  # share of the picture's side within which a thing has kept its position


def _generators(stream: int, count: int) -> list[np.random.Generator]:
    """One a case, the same whatever the other cases are."""
    return [np.random.default_rng([_SEED, stream, i]) for i in range(count)]


def _share(hits: Sequence[bool]) -> float:
    return round(float(np.mean(hits)), 4)


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    return describe(scene, rng, complete=True)[0]


def _another(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a shape of another kind and colour in the thing's place."""
    old = scene.things[0]
    while True:
        new = replace(old, kind=pick(rng, SHAPES), colour=pick(rng, NAMES))
        if new.kind != old.kind and new.colour != old.colour and scene.background in backgrounds(new.kind, new.colour):
            return replace(scene, things=(new,))


def _largest(picture: Pixels) -> Found | None:
    return next(iter(objects_found(picture)), None)


def _is(found: Found | None, thing: Thing) -> bool:
    return found is not None and found.kind == thing.kind


def inpaint(studio: Studio, count: int) -> Figures:
    """ "Replace this shape by a …": the mask is a square around it, the prompt describes the picture that is wanted."""
    rows, cases = [], []
    for i, rng in enumerate(_generators(1, count)):
        scene = sample_shape(rng)
        picture, wanted = _rendered(studio, scene, rng), _another(scene, rng)
        mask = around(picture)
        rows.append(studio.inpainting(_caption(wanted, rng), i, picture, mask))
        cases.append((picture, mask, wanted.things[0]))
    results = [composite(picture, drawn, ~mask) for drawn, (picture, mask, _) in zip(studio.drawn(rows), cases, strict=True)]
    found = [_largest(result) for result in results]
    pairs = list(zip(results, cases, found, strict=True))
    return {
        "object_in_mask": _share([_is(f, thing) and _inside(f, mask) for _, (_, mask, thing), f in pairs]),
        "colour": _share([f is not None and f.colour == thing.colour for _, (_, _, thing), f in pairs]),
        "outside_identical": _share([bool((result[~mask] == picture[~mask]).all()) for result, (picture, mask, _), _ in pairs]),
    }


def around(picture: Pixels, margin: float = 0.08) -> Mask:
    """A square around everything unlike the background, larger by `margin` of the picture's side on every side."""
    unlike = distance(picture, background_rgb(picture)) > 14
    (top, *_, bottom), (left, *_, right) = (np.flatnonzero(unlike.any(axis=axis)) for axis in (1, 0))
    half = max(bottom - top, right - left) / 2 + margin * min(picture.shape[:2])
    y, x = (top + bottom) / 2, (left + right) / 2
    mask = np.zeros(picture.shape[:2], dtype=np.bool_)
    mask[max(0, round(y - half)) : round(y + half) + 1, max(0, round(x - half)) : round(x + half) + 1] = True
    return mask


def _inside(found: Found | None, mask: Mask) -> bool:
    """Whether a thing's centre lies where the mask is."""
    return found is not None and bool(mask[round(found.centre[1] * (len(mask) - 1)), round(found.centre[0] * (mask.shape[1] - 1))])


def outpaint(studio: Studio, count: int) -> Figures:
    """A picture continued on one to four sides, without a prompt."""
    step, colours, seams = studio.pipeline.config.size_step, list[bool](), list[bool]()
    for i, rng in enumerate(_generators(2, count)):
        scene = sample_shape(rng) if i % 3 else sample_object(rng)
        picture = _rendered(studio, scene, rng)
        sides = rng.permutation(["left", "right", "up", "down"])[: 1 + i % 4]
        margins = {str(side): step for side in sides}
        canvas, kept = outpaint_canvas(picture, **margins)
        result = composite(canvas, studio.drawn([studio.outpainting("", i, picture, **margins)])[0], kept)
        colours.append(nearest(np.median(result[~kept], axis=0)) == scene.background)
        seams.append(seam(result, kept) <= 14)
    return {"background_colour": _share(colours), "seam_invisible": _share(seams)}


def seam(picture: Pixels, kept: Mask) -> float:
    """The median ΔE across the border of what is kept, from the last kept pixel to the first that is not."""
    steps = []
    for axis in (0, 1):
        ahead, behind = np.take(picture, range(1, picture.shape[axis]), axis), np.take(picture, range(picture.shape[axis] - 1), axis)
        border = np.diff(kept.astype(np.int8), axis=axis) != 0
        steps.append(distance(ahead[border], behind[border]))
    return float(np.median(np.concatenate(steps)))


def variations(studio: Studio, count: int) -> Figures:
    """Two variations of every picture, by other seeds."""
    rows, scenes = [], []
    for i, rng in enumerate(_generators(3, count)):
        scene = sample_shape(rng) if i % 3 else sample_object(rng)
        like = studio.seen(_rendered(studio, scene, rng))
        rows += [studio.row("", 2 * i, like=like), studio.row("", 2 * i + 1, like=like)]
        scenes.append((scene, like))
    drawn = studio.drawn(rows)
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    originals = F.normalize(torch.cat([like for _, like in scenes]).float(), dim=-1)
    seen = F.normalize(torch.cat([studio.seen(one) for one, _ in pairs]).float(), dim=-1)
    return {
        "object": _share([_is(_largest(one), scene.things[0]) for (scene, _), (one, _) in zip(scenes, pairs, strict=True)]),
        "clip_finds_original": _share(((seen @ originals.T).argmax(1).cpu() == torch.arange(count)).tolist()),
        "differ": _share([float(distance(one, other).mean()) > 1 for one, other in pairs]),
    }


def edit(studio: Studio, count: int) -> Figures:
    """A shape given another colour at strength 0.6."""
    rows, cases = [], []
    for i, rng in enumerate(_generators(4, count)):
        scene = sample_shape(rng)
        (old,) = scene.things
        colours = [name for name in NAMES if name != old.colour and scene.background in backgrounds(old.kind, name)]
        wanted = replace(scene, things=(replace(old, colour=pick(rng, colours)),))
        picture = _rendered(studio, scene, rng)
        rows.append(studio.edit(_caption(wanted, rng), i, picture, STRENGTH))
        cases.append((wanted.things[0], _largest(picture)))
    found = [_largest(picture) for picture in studio.drawn(rows)]
    pairs = list(zip(cases, found, strict=True))
    return {
        "colour_changed": _share([f is not None and f.colour == thing.colour for (thing, _), f in pairs]),
        "position_kept": _share([_beside(before, f) for (_, before), f in pairs]),
        "shape_kept": _share([_is(f, thing) for (thing, _), f in pairs]),
    }


def _beside(before: Found | None, after: Found | None) -> bool:
    if before is None or after is None:
        return False
    return max(abs(a - b) for a, b in zip(before.centre, after.centre, strict=True)) < _NEAR


def interpolate(studio: Studio, count: int) -> Figures:
    """Eight frames between two prompts; pictures are compared by the mean ΔE of their pixels."""
    ends, nearer = list[bool](), list[bool]()
    for i, rng in enumerate(_generators(5, count)):
        prompts = _caption(sample_shape(rng), rng), _caption(sample_shape(rng), rng)
        *frames, first, last = studio.drawn([*studio.frames(prompts, i, FRAMES), *(studio.row(prompt, i) for prompt in prompts)])
        ends.append(_apart(frames[0], first) < 1 and _apart(frames[-1], last) < 1)
        apart = {gap: np.mean([_apart(frames[j], frames[j + gap]) for j in range(FRAMES - gap)]) for gap in (1, FRAMES // 2)}
        nearer.append(bool(apart[1] < apart[FRAMES // 2]))
    return {"ends_match": _share(ends), "neighbours_nearer": _share(nearer)}


def _apart(one: Pixels, other: Pixels) -> float:
    return float(distance(one, other).mean())


def regions(studio: Studio, count: int) -> Figures:
    """Two shapes, each asked for on its own half of one background, which is wide enough that they do not touch."""
    config = studio.pipeline.config
    width, height = config.native_size[0] + config.size_step, config.native_size[1]
    halves = [region_weight(box_mask(box, width, height), 1.0, 0.0) for box in ((0, 0, 0.5, 1), (0.5, 0, 1, 1))]
    rows, cases = [], []
    for i, rng in enumerate(_generators(6, count)):
        scene = sample_shape(rng)
        left, right = scene.things[0], _another(scene, rng).things[0]
        things = [replace(left, side="left", size="normal"), replace(right, side="right", size="normal")]
        prompts = [_caption(replace(scene, things=(thing,)), rng) for thing in things]
        base = _caption(Scene(scene.background), rng)
        rows.append(studio.row(base, i, (width, height), regions=list(zip(prompts, halves, strict=True))))
        cases.append(things)
    sides = [_by_side(picture) for picture in studio.drawn(rows)]
    both = [[_is(found, thing) for found, thing in zip(f, things, strict=True)] for f, things in zip(sides, cases, strict=True)]
    coloured = [[f is not None and f.colour == t.colour for f, t in zip(fs, ts, strict=True)] for fs, ts in zip(sides, cases, strict=True)]
    return {
        "object_on_its_side": _share([hit for hits in both for hit in hits]),
        "colour_on_its_side": _share([hit for hits in coloured for hit in hits]),
        "both": _share([all(hits) for hits in both]),
    }


def _by_side(picture: Pixels) -> list[Found | None]:
    """The largest thing on the left, and on the right."""
    found = objects_found(picture)
    return [next((f for f in found if (f.centre[0] > 0.5) == right), None) for right in (False, True)]


def _rendered(studio: Studio, scene: Scene, rng: np.random.Generator) -> Pixels:
    return render(scene, rng, *studio.pipeline.config.native_size)


OPERATIONS: dict[str, Callable[[Studio, int], Figures]] = {
    "inpaint": inpaint,
    "outpaint": outpaint,
    "variations": variations,
    "edit": edit,
    "interpolate": interpolate,
    "regions": regions,
}
