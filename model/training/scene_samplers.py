"""Sample scenes as the training mixture has them. Needs no torch and no art."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from model.training.kinds import SHAPES
from model.training.palette import NAMES
from model.training.scene_layout import sides_for
from model.training.scenery import SCENES
from model.training.scenes import (
    DEFAULTS,
    OBJECT_NAMES,
    RELATIONS,
    SQUARE,
    TALL,
    WIDE,
    Aspect,
    Random,
    Scene,
    Size,
    Thing,
    chance,
    held_out,
    object_named,
    pick,
    shared_backgrounds,
)

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
PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
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
    scenes = shared_backgrounds(things, painted=True) if chance(rng, painted) else ()
    if scenes:
        return pick(rng, scenes)
    plain = shared_backgrounds(things, painted=False)
    if not plain:
        return None
    usual = next((name for name in DEFAULTS if name in plain), None)
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
    return object_named(pick(rng, OBJECT_NAMES))


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
    sizes = pick(rng, PAIR_SIZES)
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
