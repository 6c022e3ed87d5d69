"""Decide where the sprites of a scene go.

Things are large and lie on the lattice of the VQGAN's tokens: a sprite's longer side is one of a
few lengths, and the centre of its box is a multiple of 16 pixels, so that the same few codes draw
the same object wherever it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from model.training.kinds import NUMBERS, ONE_WAY, SHAPES, outline
from model.training.palette import COLOURS
from model.training.scenery import GROUND
from model.training.scenes import (
    BACKGROUND_NUMBERS,
    RELATION_SIDES,
    TOKEN,
    Aspect,
    Random,
    Scene,
    Side,
    Size,
    Thing,
    chance,
)

# Longer sides in pixels; the shorter side of every image is 256 pixels long. Each length of a
# kind is another set of tokens to learn, so the usual ones are few.
LONE_LENGTHS: dict[Size, int] = {"small": 112, "normal": 176, "large": 224}
ROOMY_PAIR_LENGTHS = LONE_LENGTHS  # of two things along 384 pixels
PAIR_LENGTHS: dict[Size, int] = {"small": 80, "normal": 112, "large": 144}
_SEVERAL_LENGTH = PAIR_LENGTHS["normal"]  # of two to four of the same, and of three kinds
_CLOSE_UP_LENGTH = 352
_MARGIN = 4  # pixels between a thing and the image's edge, at least
# Things are moved in steps of a patch of the denoiser: within one, each token is a place of its own
# to learn.
_STEP = 2 * TOKEN
_NOTICED = _STEP  # a thing at a side lies so far from the middle, at least
_GAP = 8  # pixels between the boxes of two things, at least
_CLOSE_UP_STEPS = 1  # how far a close-up's middle may lie from the thing's, in steps
_MIRRORED = 0.5  # of the things off the lattice
_TURNED = 0.5  # of images off the lattice
_LARGEST_TURN = 10.0  # degrees
_TINT_JITTER = 4
_EXACT = (0.5, 0.5, 0.5)  # parameters of a background that vary no colour


class Sprite(NamedTuple):
    """A sprite in an image: its number, its box's centre and longer side in pixels, its colour."""

    number: int
    x: float
    y: float
    length: float
    mirror: bool
    angle: float
    tint: tuple[int, int, int]


class Layout(NamedTuple):
    """One image as a row of `render.Layouts`: background's number, its 8 parameters, sprites."""

    background: int
    params: tuple[float, ...]
    sprites: tuple[Sprite, ...]


@cache
def _box(kind: str, length: int) -> tuple[float, float]:
    """Return the (width, height) of the kind's box in pixels."""
    return outline(kind, length)


def _shift(room: int, length: float) -> int:
    """Return how far a thing may be moved off the middle, in whole steps, given in pixels."""
    return max(0, int((room - length) / 2 - _MARGIN) // _STEP * _STEP)


_DIRECTIONS: dict[Side, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}


@cache
def _room(kind: str, length: int, aspect: Aspect) -> tuple[int, int]:
    box = _box(kind, length)
    return _shift(aspect[0], box[0]), _shift(aspect[1], box[1])


@cache
def _sides(kind: str, size: Size, aspect: Aspect, ground: bool) -> tuple[Side, ...]:
    room = _room(kind, LONE_LENGTHS[size], aspect)
    free = [space >= _NOTICED for space in room]
    sides = [
        side
        for side, (x, y) in _DIRECTIONS.items()
        if side != "centre" and (free[0] or not x) and (free[1] or not y) and not (ground and y < 0)
    ]
    # Plain sides twice as often as corners.
    return (*sides, *(side for side in sides if " " not in side))


def sides_for(kind: str, size: Size, aspect: Aspect, background: str) -> tuple[Side, ...]:
    """Return the sides where a single thing can lie and be noticed to; nothing flies over a ground.

    Sides come twice where they are twice as likely as a corner.
    """
    return _sides(kind, size, aspect, GROUND.get(background, False))


def _tint(rng: Random, thing: Thing, exact: bool) -> tuple[int, int, int]:
    if thing.kind not in SHAPES or thing.colour is None:
        return 255, 255, 255
    if exact:
        return COLOURS[thing.colour]
    red, green, blue = (
        min(255, max(0, round(value + (2 * rng.random() - 1) * _TINT_JITTER)))
        for value in COLOURS[thing.colour]
    )
    return red, green, blue


Spot = tuple[int, float, float]  # length, centre


def _lone_spot(thing: Thing, aspect: Aspect) -> Spot:
    length = LONE_LENGTHS[thing.size]
    middle = (aspect[0] // 2, aspect[1] // 2)
    if thing.side == "centre":
        return length, *middle
    room = _room(thing.kind, length, aspect)
    x, y = (
        middle[axis] + direction * room[axis]
        for axis, direction in enumerate(_DIRECTIONS[thing.side])
    )
    return length, x, y


def _close_up_spot(rng: Random, aspect: Aspect) -> Spot:
    length = _CLOSE_UP_LENGTH
    place = []
    for room in aspect:
        steps = int(rng.random() * (2 * _CLOSE_UP_STEPS + 1)) - _CLOSE_UP_STEPS
        place.append(room // 2 + steps * _STEP)
    return length, place[0], place[1]


def _to_lattice(x: float) -> int:
    return TOKEN * round(x / TOKEN)


def _pair_spots(scene: Scene) -> list[Spot]:
    """Return the spots of two things: each in the middle of its half, or as room is needed."""
    axis = 1 if scene.relation in ("above", "below") else 0
    room = scene.aspect[axis]
    lengths = ROOMY_PAIR_LENGTHS if room > scene.aspect[1 - axis] else PAIR_LENGTHS
    sides = RELATION_SIDES[scene.relation or "and"]
    first = 0 if sides[0] in ("left", "top") else 1
    boxes = [_box(thing.kind, lengths[thing.size]) for thing in scene.things]
    extents = [box[axis] for box in boxes]
    if max(extents) <= room / 2 - _GAP:
        along = [0.0, 0.0]
        along[first], along[1 - first] = _quarters(scene.aspect)[axis]
    else:
        along = _shared_out(extents, first, room)
    across = scene.aspect[1 - axis] // 2
    spots: list[Spot] = []
    for thing, place in zip(scene.things, along, strict=True):
        x, y = (place, across) if axis == 0 else (across, place)
        spots.append((lengths[thing.size], x, y))
    return spots


def _shared_out(extents: Sequence[float], first: int, room: int) -> list[float]:
    """Return the middles of two things of different extents along one axis, on the lattice.

    first: the number of the thing that lies nearer to the beginning.
    """
    # The spare room is shared out as margin, gap and margin; the gap is the largest.
    spare = room - sum(extents)
    ahead, behind = extents[first], extents[1 - first]
    along = [0.0, 0.0]
    along[first] = _to_lattice(spare * 0.28 + ahead / 2)
    along[1 - first] = _to_lattice(room - spare * 0.28 - behind / 2)
    if along[1 - first] - along[first] < (ahead + behind) / 2 + _GAP:
        along[1 - first] += TOKEN if along[1 - first] + TOKEN + behind / 2 <= room else 0
    if along[1 - first] - along[first] < (ahead + behind) / 2 + _GAP:
        along[first] -= TOKEN if along[first] - TOKEN - ahead / 2 >= 0 else 0
    return along


@cache
def _quarters(aspect: Aspect) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the middles of the halves, on the lattice: (left, right), (top, bottom)."""
    width, height = aspect
    return (width // 4, width - width // 4), (height // 4, height - height // 4)


def _count_spots(rng: Random, thing: Thing, aspect: Aspect) -> list[Spot]:
    """Return the spots of two, three or four of the same: side by side, a triangle, two by two."""
    (left, right), (top, bottom) = _quarters(aspect)
    middle = (aspect[0] // 2, aspect[1] // 2)
    length = _SEVERAL_LENGTH
    if thing.count == 2:
        width, height = _box(thing.kind, length)
        if width > 2 * height:  # long things lie better one above the other
            return [(length, middle[0], top), (length, middle[0], bottom)]
        return [(length, left, middle[1]), (length, right, middle[1])]
    if thing.count == 4:
        return [(length, x, y) for y in (top, bottom) for x in (left, right)]
    one, two = (top, bottom) if chance(rng, 0.7) else (bottom, top)
    return [(length, middle[0], one), (length, left, two), (length, right, two)]


def _spots(rng: Random, scene: Scene) -> list[tuple[Thing, Spot]]:
    """Return every sprite's thing and where it goes, on the lattice."""
    if not scene.things:
        return []
    if scene.close_up:
        return [(scene.things[0], _close_up_spot(rng, scene.aspect))]
    if scene.relation:
        return list(zip(scene.things, _pair_spots(scene), strict=True))
    if len(scene.things) == 3:
        (left, right), (top, bottom) = _quarters(scene.aspect)
        places = ((left, top), (right, top), (scene.aspect[0] // 2, bottom))
        return [(t, (_SEVERAL_LENGTH, *at)) for t, at in zip(scene.things, places, strict=True)]
    thing = scene.things[0]
    if thing.count > 1:
        return [(thing, spot) for spot in _count_spots(rng, thing, scene.aspect)]
    return [(thing, _lone_spot(thing, scene.aspect))]


def _loosened(rng: Random, scene: Scene, thing: Thing, spot: Spot) -> tuple[float, float, float]:
    """Return (length, x, y) a little off the lattice, within the image and short of others."""
    length = spot[0] * (0.9 + 0.1 * rng.random())
    width, height = _box(thing.kind, spot[0])
    reach = min(TOKEN / 2, 0.05 * spot[0])
    place = []
    for at, extent, room in zip(spot[1:], (width, height), scene.aspect, strict=True):
        x = at + (2 * rng.random() - 1) * reach
        half = min(extent, room) / 2
        place.append(x if scene.close_up else min(room - half, max(half, x)))
    return length, place[0], place[1]


def layout(scene: Scene, rng: Random, *, aligned: bool = True) -> Layout:
    """Return where the scene's sprites go.

    aligned: on the lattice of tokens, upright, with the usual lengths and the exact colours;
    otherwise anywhere near, somewhat smaller, in varied colours, mirrored half of the time and
    turned a little half of the time.
    """
    sprites = []
    spots = _spots(rng, scene)
    turned = not aligned and chance(rng, _TURNED)
    mirrored = {thing.kind: not aligned and chance(rng, _MIRRORED) for thing in scene.things}
    for thing, spot in spots:
        length, x, y = spot if aligned else _loosened(rng, scene, thing, spot)
        angle = 0.0
        if turned:
            largest = _LARGEST_TURN if len(spots) == 1 else _LARGEST_TURN / 2
            angle = (2 * rng.random() - 1) * largest
            length *= 0.95
        tint = _tint(rng, thing, aligned)
        mirror = mirrored[thing.kind] and thing.kind not in SHAPES and thing.kind not in ONE_WAY
        sprites.append(Sprite(NUMBERS[thing.kind], x, y, length, mirror, angle, tint))
    params = tuple(rng.random() for _ in range(8))
    if aligned:
        params = (*_EXACT, *params[3:])
    return Layout(BACKGROUND_NUMBERS[scene.background], params, tuple(sprites))
