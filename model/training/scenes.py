"""Describe, sample and lay out scenes: shapes and objects on a plain or painted background.

A `Scene` is a description, `sample` draws one as the training mixture has it, and `layout` decides
where its sprites go. `captions.describe` states only what such an image shows. Sampling needs no
torch and no art, so that many processes can do it at once; `render.render` draws the layouts.

Things are large and lie on the lattice of the VQGAN's tokens: a sprite's longer side is one of a
few lengths, and the centre of its box is a multiple of 16 pixels, so that the same few codes draw
the same object wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple, Protocol, TypeVar
from zlib import crc32

from model.training.kinds import (
    KINDS,
    NUMBERS,
    ONE_WAY,
    SHAPES,
    Kind,
    backgrounds_for,
    object_of,
    outline,
)
from model.training.palette import COLOURS, NAMES
from model.training.scenery import BACKGROUNDS, GROUND, SCENES

Size = Literal["small", "normal", "large"]
Side = Literal[
    "centre",
    "left",
    "right",
    "top",
    "bottom",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
]
Relation = Literal["and", "left of", "right of", "above", "below"]
Aspect = tuple[int, int]
T = TypeVar("T")

SIDES: tuple[Side, ...] = (
    "centre",
    "left",
    "right",
    "top",
    "bottom",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
)
RELATIONS: tuple[Relation, ...] = ("and", "left of", "right of", "above", "below")
SQUARE: Aspect = (256, 256)
WIDE: Aspect = (384, 256)
TALL: Aspect = (256, 384)
ASPECTS: tuple[Aspect, ...] = (SQUARE, WIDE, TALL)  # (width, height) in pixels
TOKEN = 16  # pixels a side
MOST = 4  # sprites in an image

# A thing of a relation lies on this side: (the first's, the second's).
RELATION_SIDES: dict[Relation, tuple[Side, Side]] = {
    "and": ("left", "right"),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
THREE_SIDES: tuple[Side, Side, Side] = ("top left", "top right", "bottom")


class Random(Protocol):
    """A source of numbers: `random.Random` (the faster one) or `numpy.random.Generator`."""

    def random(self) -> float:
        """Return a float in [0, 1)."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Some shapes or objects of one kind.

    colour: a shape's colour; the palette colour people call an object by, or None. count: 1 … 4.
    """

    kind: str
    colour: str | None
    size: Size = "normal"
    side: Side = "centre"
    count: int = 1


@dataclass(frozen=True, slots=True)
class Scene:
    """An image's description.

    background: one of BACKGROUNDS. relation: where the first of two things lies to the second
    ("and": the first on the left), else None. aspect: (width, height) in pixels. close_up: the one
    thing is larger than the image, which shows a part of it.
    """

    background: str
    things: tuple[Thing, ...] = ()
    relation: Relation | None = None
    aspect: Aspect = SQUARE
    close_up: bool = False


# ── kinds and what can be seen before what ────────────────────────────────────────────────────────

BACKGROUND_NUMBERS: dict[str, int] = {name: number for number, name in enumerate(BACKGROUNDS)}
_BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS}
_OBJECTS: tuple[str, ...] = tuple(_BY_NAME)

# The background meant by a caption that names none: the first in which everything can be seen.
_DEFAULTS = ("white", "blue", "green", "black", "yellow")
# One in _HELD_OUT pairs is never shown in training, so that images of such pairs can be tested.
_HELD_OUT = 24


def pick(rng: Random, options: Sequence[T]) -> T:
    """Return one of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def chance(rng: Random, probability: float) -> bool:
    """Return True with the probability."""
    return rng.random() < probability


def kind_of(name: str) -> Kind | None:
    """Return the object of that name, None for a shape. Raises KeyError for an unknown name."""
    return object_of(name)


def object_named(name: str) -> Thing:
    """Return one object with its natural colour. Raises KeyError for an unknown name."""
    return Thing(name, _BY_NAME[name].colour)


def held_out(first: str, second: str) -> bool:
    """Return whether training never shows the pair together, whichever comes first.

    A pair is an object and a background, a shape and its colour, or two kinds. White, which is
    meant where nothing is said, is shown with everything.
    """
    if "white" in (first, second):
        return False
    pair = f"{first}|{second}|novel" if first < second else f"{second}|{first}|novel"
    return crc32(pair.encode()) % _HELD_OUT == 0


@cache
def visible_on(kind: str, colour: str | None) -> tuple[str, ...]:
    """Return the backgrounds in front of which the thing is easy to see."""
    return backgrounds_for(kind, colour if kind in SHAPES else None)


@cache
def backgrounds(kind: str, colour: str | None) -> tuple[str, ...]:
    """Return the backgrounds that training shows the thing in front of."""
    seen = visible_on(kind, colour)
    if kind in SHAPES:
        return seen
    return tuple(name for name in seen if not held_out(kind, name)) or seen


@cache
def _plain(kind: str, colour: str | None) -> frozenset[str]:
    return frozenset(backgrounds(kind, colour)) & frozenset(NAMES)


@cache
def _painted(kind: str, colour: str | None) -> frozenset[str]:
    return frozenset(backgrounds(kind, colour)) & frozenset(SCENES)


def _shared(things: Sequence[Thing], painted: bool) -> Sequence[str]:
    """Return the plain or painted backgrounds for all of the things, in their usual order."""
    table, order = (_painted, SCENES) if painted else (_plain, NAMES)
    common = table(things[0].kind, things[0].colour)
    for thing in things[1:]:
        common = common & table(thing.kind, thing.colour)
    return [name for name in order if name in common]


@cache
def _default(kind: str, colour: str | None) -> tuple[str, ...]:
    return tuple(name for name in _DEFAULTS if name in visible_on(kind, colour))


def default_background(scene: Scene) -> str:
    """Return the background meant by a caption of this scene that names none; mostly white."""
    choices = [_default(thing.kind, thing.colour) for thing in scene.things]
    shared = [name for name in _DEFAULTS if all(name in choice for choice in choices)]
    return shared[0] if shared else "white"


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────

# Shares of the training mixture.
_SHARES: dict[str, float] = {
    "object": 0.60,  # one of _CLOSE_UPS of them a close-up
    "shape": 0.08,
    "pair": 0.12,
    "count": 0.09,
    "attribution": 0.07,
    "three": 0.02,
    "empty": 0.02,
}
_CLOSE_UPS = 0.07  # of images of one object
_ODD_ASPECTS = 0.08  # 3:2 or 2:3
_SCENES_FOR_ONE = 0.22  # of images of one object: before a painted scene
_SCENES_FOR_MORE = 0.08  # of all other images
_DEFAULT_SHARE = 0.12  # of plain backgrounds: the default, beside its turn among all
_CENTRED = 0.5
_LONE_SIZES: tuple[Size, ...] = ("small",) * 5 + ("normal",) * 9 + ("large",) * 6
_NORMAL_PAIRS: tuple[tuple[Size, Size], ...] = (("normal", "normal"),) * 20
_PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
    *_NORMAL_PAIRS,
    ("normal", "small"),
    ("small", "normal"),
    ("small", "large"),
    ("large", "small"),
)


def _aspect(rng: Random) -> Aspect:
    draw = rng.random()
    if draw >= _ODD_ASPECTS:
        return SQUARE
    return WIDE if draw < _ODD_ASPECTS / 2 else TALL


def _background(rng: Random, things: Sequence[Thing], painted: float) -> str | None:
    """Return a background that shows all things, None if there is none."""
    scenes = _shared(things, painted=True) if chance(rng, painted) else ()
    if scenes:
        return pick(rng, scenes)
    plain = _shared(things, painted=False)
    if not plain:
        return None
    usual = next((name for name in _DEFAULTS if name in plain), None)
    return usual if usual and chance(rng, _DEFAULT_SHARE) else pick(rng, plain)


def shape_colours(shape: str) -> tuple[str, ...]:
    """Return the colours that training shows the shape in."""
    return _SHAPE_COLOURS[shape]


_SHAPE_COLOURS: dict[str, tuple[str, ...]] = {
    shape: tuple(name for name in NAMES if not held_out(shape, name)) for shape in SHAPES
}


def _some_shape(rng: Random) -> Thing:
    shape = pick(rng, SHAPES)
    return Thing(shape, pick(rng, _SHAPE_COLOURS[shape]))


def _some_object(rng: Random) -> Thing:
    return object_named(pick(rng, _OBJECTS))


def _some_thing(rng: Random, shapes: float) -> Thing:
    return _some_shape(rng) if chance(rng, shapes) else _some_object(rng)


def lone(rng: Random, thing: Thing, painted: float = _SCENES_FOR_MORE) -> Scene:
    """Return a scene of the one thing, with any size, side and background."""
    aspect = _aspect(rng)
    background = _background(rng, (thing,), painted) or "white"
    size = pick(rng, _LONE_SIZES)
    sides = sides_for(thing.kind, size, aspect, background)
    side = "centre" if chance(rng, _CENTRED) or not sides else pick(rng, sides)
    return Scene(background, (replace(thing, size=size, side=side),), None, aspect)


def sample_shape(rng: Random) -> Scene:
    """Return a scene of one shape."""
    return lone(rng, _some_shape(rng))


def sample_object(rng: Random) -> Scene:
    """Return a scene of one object."""
    return lone(rng, _some_object(rng), _SCENES_FOR_ONE)


def sample_close_up(rng: Random) -> Scene:
    """Return a scene of one object that is larger than the image."""
    thing = _some_object(rng)
    background = _background(rng, (thing,), _SCENES_FOR_MORE) or "white"
    return Scene(background, (thing,), None, _aspect(rng), close_up=True)


def _pair(rng: Random, first: Thing, second: Thing, painted: float) -> Scene | None:
    if first == second or first.kind == second.kind or held_out(first.kind, second.kind):
        return None
    background = _background(rng, (first, second), painted)
    if background is None:
        return None
    sizes = pick(rng, _PAIR_SIZES)
    things = (replace(first, size=sizes[0]), replace(second, size=sizes[1]))
    return Scene(background, things, pick(rng, RELATIONS), _aspect(rng))


def _until(rng: Random, attempt: Callable[[Random], Scene | None]) -> Scene:
    while True:
        if scene := attempt(rng):
            return scene


def sample_pair(rng: Random) -> Scene:
    """Return a scene of two things of different kinds, three in four of them objects."""

    def attempt(rng: Random) -> Scene | None:
        return _pair(rng, _some_thing(rng, 0.25), _some_thing(rng, 0.25), _SCENES_FOR_MORE)

    return _until(rng, attempt)


def sample_attribution(rng: Random) -> Scene:
    """Return a scene of two shapes of different kinds and colours."""

    def attempt(rng: Random) -> Scene | None:
        first, second = _some_shape(rng), _some_shape(rng)
        return None if first.colour == second.colour else _pair(rng, first, second, 0.0)

    return _until(rng, attempt)


def sample_count(rng: Random) -> Scene:
    """Return a scene of two to four of the same, one in four of them shapes."""
    thing = replace(_some_thing(rng, 0.25), count=2 + int(rng.random() * 3))
    background = _background(rng, (thing,), _SCENES_FOR_MORE) or "white"
    return Scene(background, (thing,), None, _aspect(rng))


def sample_three(rng: Random) -> Scene:
    """Return a scene of three things of different kinds."""

    def attempt(rng: Random) -> Scene | None:
        things = (_some_thing(rng, 0.3), _some_thing(rng, 0.3), _some_thing(rng, 0.3))
        names = [thing.kind for thing in things]
        if len(set(names)) < 3 or any(held_out(names[i], names[i - 1]) for i in range(3)):
            return None
        background = _background(rng, things, _SCENES_FOR_MORE)
        return Scene(background, things, None, _aspect(rng)) if background else None

    return _until(rng, attempt)


def sample_empty(rng: Random) -> Scene:
    """Return a scene without things, as often painted as plain."""
    return Scene(pick(rng, SCENES if chance(rng, 0.5) else NAMES), (), None, _aspect(rng))


def _object_or_close_up(rng: Random) -> Scene:
    return sample_close_up(rng) if chance(rng, _CLOSE_UPS) else sample_object(rng)


SAMPLERS: dict[str, Callable[[Random], Scene]] = {
    "object": _object_or_close_up,
    "shape": sample_shape,
    "pair": sample_pair,
    "count": sample_count,
    "attribution": sample_attribution,
    "three": sample_three,
    "empty": sample_empty,
}


def sample(rng: Random) -> Scene:
    """Return a scene as the training mixture has it."""
    draw = rng.random()
    for name, share in _SHARES.items():
        draw -= share
        if draw < 0:
            return SAMPLERS[name](rng)
    return sample_object(rng)


# ── layout ────────────────────────────────────────────────────────────────────────────────────────

# Longer sides in pixels; the shorter side of every image is 256 pixels long. Each length of a
# kind is another set of tokens to learn, so the usual ones are few.
LONE_LENGTHS: dict[Size, int] = {"small": 112, "normal": 176, "large": 224}
ROOMY_PAIR_LENGTHS = LONE_LENGTHS  # of two things along 384 pixels
PAIR_LENGTHS: dict[Size, int] = {"small": 80, "normal": 112, "large": 144}
_SEVERAL_LENGTH = PAIR_LENGTHS["normal"]  # of two to four of the same, and of three kinds
_CLOSE_UP_LENGTH = 352
_MARGIN = 4  # pixels between a thing and the image's edge, at least
_NOTICED = 2 * TOKEN  # a thing at a side lies so far from the middle, at least
_INWARD = 0.25  # how often a thing at a side lies one step nearer to the middle, if there is room
_GAP = 8  # pixels between the boxes of two things, at least
_CLOSE_UP_STEPS = 3  # how far a close-up's middle may lie from the thing's, in tokens
_MIRRORED = 0.1  # of the things on the lattice, where few codes matter
_MIRRORED_ANYWHERE = 0.5  # of the others
_TURNED = 0.5  # of images off the lattice
_LARGEST_TURN = 10.0  # degrees
_TINT_JITTER = 4


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
    """Return how far a thing may be moved off the middle, in whole tokens, given in pixels."""
    return max(0, int((room - length) / 2 - _MARGIN) // TOKEN * TOKEN)


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


def _tint(rng: Random, thing: Thing) -> tuple[int, int, int]:
    if thing.kind not in SHAPES or thing.colour is None:
        return 255, 255, 255
    red, green, blue = (
        min(255, max(0, round(value + (2 * rng.random() - 1) * _TINT_JITTER)))
        for value in COLOURS[thing.colour]
    )
    return red, green, blue


Spot = tuple[int, float, float]  # length, centre


def _lone_spot(rng: Random, thing: Thing, aspect: Aspect) -> Spot:
    length = LONE_LENGTHS[thing.size]
    middle = (aspect[0] // 2, aspect[1] // 2)
    if thing.side == "centre":
        return length, *middle
    place = []
    inward = chance(rng, _INWARD)
    room = _room(thing.kind, length, aspect)
    for axis, direction in enumerate(_DIRECTIONS[thing.side]):
        shift = room[axis] - TOKEN if inward and room[axis] >= _NOTICED + TOKEN else room[axis]
        place.append(middle[axis] + direction * shift)
    return length, place[0], place[1]


def _close_up_spot(rng: Random, aspect: Aspect) -> Spot:
    length = _CLOSE_UP_LENGTH
    place = []
    for room in aspect:
        steps = int(rng.random() * (2 * _CLOSE_UP_STEPS + 1)) - _CLOSE_UP_STEPS
        place.append(room // 2 + steps * TOKEN)
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
    across = scene.aspect[1 - axis] // 2
    spots: list[Spot] = []
    for thing, place in zip(scene.things, along, strict=True):
        x, y = (place, across) if axis == 0 else (across, place)
        spots.append((lengths[thing.size], x, y))
    return spots


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
    return [(thing, _lone_spot(rng, thing, scene.aspect))]


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

    aligned: on the lattice of tokens, upright and with the usual lengths; otherwise anywhere near,
    somewhat smaller, mirrored half of the time and turned a little half of the time.
    """
    sprites = []
    spots = _spots(rng, scene)
    turned = not aligned and chance(rng, _TURNED)
    share = _MIRRORED if aligned else _MIRRORED_ANYWHERE
    mirrored = {thing.kind: chance(rng, share) for thing in scene.things}
    for thing, spot in spots:
        length, x, y = spot if aligned else _loosened(rng, scene, thing, spot)
        angle = 0.0
        if turned:
            largest = _LARGEST_TURN if len(spots) == 1 else _LARGEST_TURN / 2
            angle = (2 * rng.random() - 1) * largest
            length *= 0.95
        tint = _tint(rng, thing)
        mirror = mirrored[thing.kind] and thing.kind not in SHAPES and thing.kind not in ONE_WAY
        sprites.append(Sprite(NUMBERS[thing.kind], x, y, length, mirror, angle, tint))
    params = tuple(rng.random() for _ in range(8))
    return Layout(BACKGROUND_NUMBERS[scene.background], params, tuple(sprites))
