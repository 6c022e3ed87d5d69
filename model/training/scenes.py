"""Describe scenes: shapes and objects on a plain or painted background that shows them.

A `Scene` is a description; `scene_samplers.sample` draws one as the training mixture has it, and
`scene_layout.layout` decides where its sprites go. `captions.describe` states only what such an
image shows. None of these needs torch or art, so that many processes can sample at once;
`render.render` draws the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, TypeVar
from zlib import crc32

from model.training.kinds import KINDS, SHAPES, Kind, backgrounds_for, object_of
from model.training.palette import NAMES
from model.training.scenery import BACKGROUNDS, SCENES

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


BACKGROUND_NUMBERS: dict[str, int] = {name: number for number, name in enumerate(BACKGROUNDS)}
_BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS}
OBJECT_NAMES: tuple[str, ...] = tuple(_BY_NAME)

# The background meant by a caption that names none: the first in which everything can be seen.
DEFAULTS = ("white", "blue", "green", "black", "yellow")
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


def shared_backgrounds(things: Sequence[Thing], painted: bool) -> Sequence[str]:
    """Return the plain or painted backgrounds for all of the things, in their usual order."""
    table, order = (_painted, SCENES) if painted else (_plain, NAMES)
    common = table(things[0].kind, things[0].colour)
    for thing in things[1:]:
        common = common & table(thing.kind, thing.colour)
    return [name for name in order if name in common]


@cache
def _default(kind: str, colour: str | None) -> tuple[str, ...]:
    return tuple(name for name in DEFAULTS if name in visible_on(kind, colour))


def default_background(scene: Scene) -> str:
    """Return the background meant by a caption of this scene that names none; mostly white."""
    choices = [_default(thing.kind, thing.colour) for thing in scene.things]
    shared = [name for name in DEFAULTS if all(name in choice for choice in choices)]
    return shared[0] if shared else "white"
