"""Compare a judge's reading of an image with the requested scene.

A judge (`judge.py`, `templates.py`) reads images into `Reading`s and knows nothing of prompts;
`check` decides for any judge alike which words of the scene a reading fulfils.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model.training.kinds import SHAPES
from model.training.scenes import Relation, Scene, Side, Thing

_MOST = 6  # found things that are considered for a scene's things
# Share of the shorter side by which a thing at a side lies off the middle, at least: scenes are
# laid out with twice as much.
_OFF_CENTRE = 0.07


@dataclass(frozen=True, slots=True)
class Found:
    """A thing in an image.

    colour: a shape's palette colour, None for objects. centre: (x, y) of its box in shares of width
    and height. extent: (width, height) of its box in shares of the image's shorter side.
    score: the judge's confidence, 0 … 1.
    """

    kind: str
    colour: str | None
    centre: tuple[float, float]
    extent: tuple[float, float]
    score: float


@dataclass(frozen=True, slots=True)
class Reading:
    """An image in words. things: the most certain first. shape: (height, width) in pixels."""

    background: str
    things: tuple[Found, ...]
    shape: tuple[int, int]


class Judge(Protocol):
    """Read images."""

    def read(self, images: Tensor) -> list[Reading]:
        """Return what images uint8 [N, H, W, 3] of one size show."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which words of a scene an image fulfils.

    background: it is the scene's. count: as many things as in the scene. kinds, colours: true only
    if they hold for all of the scene's things; things beyond them are disregarded. attribution:
    both, each colour on its own thing. positions: the relation of two things holds, or a single
    thing is on its side; true where the scene says neither.
    """

    background: bool
    count: bool
    kinds: bool
    colours: bool
    attribution: bool
    positions: bool

    @property
    def all(self) -> bool:
        """Return whether the image shows the whole scene and nothing else."""
        return self.background and self.count and self.attribution and self.positions


NOTHING = Verdict(False, False, False, False, False, False)


def wanted(scene: Scene) -> list[Thing]:
    """Return the scene's things one by one: three apples are three."""
    return [thing for thing in scene.things for _ in range(thing.count)]


def check(reading: Reading, scene: Scene) -> Verdict:
    """Compare a reading with a scene.

    The found things are taken for the scene's in the order that fulfils most words, so that two
    things which have swapped places fail by their positions only. With too few things, all but
    the background fails.
    """
    things = wanted(scene)
    background = reading.background == scene.background
    count = len(reading.things) == len(things)
    if len(reading.things) < len(things):
        return Verdict(background, count, False, False, False, False)
    orders = permutations(reading.things[:_MOST], len(things))
    best = max((_hits(order, scene, things, reading.shape) for order in orders), key=_merit)
    return Verdict(background, count, *best)


def _merit(hits: tuple[bool, bool, bool, bool]) -> int:
    kinds, colours, attribution, positions = hits
    return 8 * attribution + 4 * kinds + 2 * colours + positions


def _hits(
    order: Sequence[Found], scene: Scene, things: Sequence[Thing], shape: tuple[int, int]
) -> tuple[bool, bool, bool, bool]:
    """Return (kinds, colours, attribution, positions) with order[i] taken for things[i]."""
    pairs = list(zip(order, things, strict=True))
    kinds = all(found.kind == thing.kind for found, thing in pairs)
    colours = all(_has_colour(found, thing) for found, thing in pairs)
    if scene.relation:
        positions = kinds and _relates(order[0], order[1], scene.relation, shape)
    else:
        alone = len(things) == 1 and not scene.close_up
        positions = not alone or side_of(order[0], shape) == things[0].side
    return kinds, colours, kinds and colours, positions


def _has_colour(found: Found, thing: Thing) -> bool:
    """Return whether a shape has its colour; an object's is part of its kind."""
    return thing.kind not in SHAPES or found.colour == thing.colour


def side_of(found: Found, shape: tuple[int, int]) -> Side:
    """Return the side or corner on which a thing stands in an image of (height, width)."""
    across, down = (
        (found.centre[axis] - 0.5) * shape[1 - axis] / min(shape) / _OFF_CENTRE for axis in (0, 1)
    )
    horizontal = "left" if across < -1 else "right" if across > 1 else ""
    vertical = "top" if down < -1 else "bottom" if down > 1 else ""
    side = " ".join(word for word in (vertical, horizontal) if word) or "centre"
    return cast("Side", side)


def _relates(first: Found, second: Found, relation: Relation, shape: tuple[int, int]) -> bool:
    """Return whether the step from first to second goes the right way, and further than across."""
    x, y = ((second.centre[axis] - first.centre[axis]) * shape[1 - axis] for axis in (0, 1))
    along, across = (y, x) if relation in ("above", "below") else (x, y)
    return abs(across) < (-along if relation in ("right of", "below") else along)


def read_all(judge: Judge, images: Sequence[npt.NDArray[np.uint8]]) -> list[Reading]:
    """Read images [H, W, 3] of any sizes, those of one size together."""
    import torch

    readings: dict[int, Reading] = {}
    for group in _by_size(images):
        batch = torch.from_numpy(np.stack([images[i] for i in group]))
        readings.update(zip(group, judge.read(batch), strict=True))
    return [readings[i] for i in range(len(images))]


def _by_size(images: Sequence[npt.NDArray[np.uint8]]) -> Iterator[list[int]]:
    shapes = [image.shape for image in images]
    for shape in dict.fromkeys(shapes):
        yield [i for i, other in enumerate(shapes) if other == shape]
