"""Sample scenes as the training mixture has them. Needs no torch and no art."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Mixture:
    """The shares of what training shows.

    Of all images: object (one of `close_ups` of them a close-up), shape, pair, count, attribution,
    three; the rest are empty. odd_aspects: 3:2 or 2:3. scenes_for_one: of images of one object,
    before a painted scene. scenes_for_more: of all other images. default_background: of plain
    backgrounds, the default one beside its turn among all. centred: of single things, in the
    middle. sizes: of single things, each as likely. aligned: of images whose things lie on the
    lattice.
    """

    object: float = 0.60
    shape: float = 0.08
    pair: float = 0.12
    count: float = 0.09
    attribution: float = 0.07
    three: float = 0.02
    close_ups: float = 0.07
    odd_aspects: float = 0.08
    scenes_for_one: float = 0.22
    scenes_for_more: float = 0.08
    default_background: float = 0.12
    centred: float = 0.5
    sizes: tuple[Size, ...] = ("small",) * 5 + ("normal",) * 9 + ("large",) * 6
    aligned: float = 0.92


FULL = Mixture()
# To begin with: what people ask for most, and what lies on the lattice. Each size, place and
# background of an object is another set of tokens to learn.
FIRST = Mixture(
    object=0.66,
    shape=0.05,
    pair=0.12,
    count=0.075,
    attribution=0.05,
    three=0.015,
    close_ups=0.04,
    odd_aspects=0.04,
    scenes_for_one=0.25,
    scenes_for_more=0.04,
    default_background=0.15,
    centred=0.75,
    sizes=("small",) * 3 + ("normal",) * 14 + ("large",) * 3,
    aligned=0.985,
)
# To go on with, once single things in the middle are right: more of what is still hard.
SEVERAL = replace(
    FIRST,
    object=0.54,
    pair=0.17,
    count=0.1,
    three=0.03,
    close_ups=0.08,
    odd_aspects=0.08,
    scenes_for_more=0.05,
    centred=0.65,
    sizes=("small",) * 3 + ("normal",) * 13 + ("large",) * 4,
)
MIXTURES = {"full": FULL, "first": FIRST, "several": SEVERAL}
_NORMAL_PAIRS: tuple[tuple[Size, Size], ...] = (("normal", "normal"),) * 20
PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
    *_NORMAL_PAIRS,
    ("normal", "small"),
    ("small", "normal"),
    ("small", "large"),
    ("large", "small"),
)


def _aspect(rng: Random, mix: Mixture) -> Aspect:
    draw = rng.random()
    if draw >= mix.odd_aspects:
        return SQUARE
    return WIDE if draw < mix.odd_aspects / 2 else TALL


def _background(rng: Random, things: Sequence[Thing], painted: float, mix: Mixture) -> str | None:
    """Return a background that shows all things, None if there is none."""
    scenes = shared_backgrounds(things, painted=True) if chance(rng, painted) else ()
    if scenes:
        return pick(rng, scenes)
    plain = shared_backgrounds(things, painted=False)
    if not plain:
        return None
    usual = next((name for name in DEFAULTS if name in plain), None)
    return usual if usual and chance(rng, mix.default_background) else pick(rng, plain)


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


def lone(
    rng: Random, thing: Thing, painted: float = FULL.scenes_for_more, mix: Mixture = FULL
) -> Scene:
    """Return a scene of the one thing, with any size, side and background.

    painted: the probability of a painted scene behind it.
    """
    aspect = _aspect(rng, mix)
    background = _background(rng, (thing,), painted, mix) or "white"
    size = pick(rng, mix.sizes)
    sides = sides_for(thing.kind, size, aspect, background)
    side = "centre" if chance(rng, mix.centred) or not sides else pick(rng, sides)
    return Scene(background, (replace(thing, size=size, side=side),), None, aspect)


def sample_shape(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of one shape."""
    return lone(rng, _some_shape(rng), mix.scenes_for_more, mix)


def sample_object(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of one object."""
    return lone(rng, _some_object(rng), mix.scenes_for_one, mix)


def sample_close_up(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of one object that is larger than the image."""
    thing = _some_object(rng)
    background = _background(rng, (thing,), mix.scenes_for_more, mix) or "white"
    return Scene(background, (thing,), None, _aspect(rng, mix), close_up=True)


def _pair(rng: Random, first: Thing, second: Thing, painted: float, mix: Mixture) -> Scene | None:
    if first == second or first.kind == second.kind or held_out(first.kind, second.kind):
        return None
    background = _background(rng, (first, second), painted, mix)
    if background is None:
        return None
    sizes = pick(rng, PAIR_SIZES)
    things = (replace(first, size=sizes[0]), replace(second, size=sizes[1]))
    return Scene(background, things, pick(rng, RELATIONS), _aspect(rng, mix))


def _until(rng: Random, attempt: Callable[[Random], Scene | None]) -> Scene:
    while True:
        if scene := attempt(rng):
            return scene


def sample_pair(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of two things of different kinds, three in four of them objects."""

    def attempt(rng: Random) -> Scene | None:
        return _pair(rng, _some_thing(rng, 0.25), _some_thing(rng, 0.25), mix.scenes_for_more, mix)

    return _until(rng, attempt)


def sample_attribution(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of two shapes of different kinds and colours."""

    def attempt(rng: Random) -> Scene | None:
        first, second = _some_shape(rng), _some_shape(rng)
        return None if first.colour == second.colour else _pair(rng, first, second, 0.0, mix)

    return _until(rng, attempt)


def sample_count(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of two to four of the same, one in four of them shapes."""
    thing = replace(_some_thing(rng, 0.25), count=2 + int(rng.random() * 3))
    background = _background(rng, (thing,), mix.scenes_for_more, mix) or "white"
    return Scene(background, (thing,), None, _aspect(rng, mix))


def sample_three(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene of three things of different kinds."""

    def attempt(rng: Random) -> Scene | None:
        things = (_some_thing(rng, 0.3), _some_thing(rng, 0.3), _some_thing(rng, 0.3))
        names = [thing.kind for thing in things]
        if len(set(names)) < 3 or any(held_out(names[i], names[i - 1]) for i in range(3)):
            return None
        background = _background(rng, things, mix.scenes_for_more, mix)
        return Scene(background, things, None, _aspect(rng, mix)) if background else None

    return _until(rng, attempt)


def sample_empty(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene without things, as often painted as plain."""
    return Scene(pick(rng, SCENES if chance(rng, 0.5) else NAMES), (), None, _aspect(rng, mix))


def _object_or_close_up(rng: Random, mix: Mixture = FULL) -> Scene:
    return sample_close_up(rng, mix) if chance(rng, mix.close_ups) else sample_object(rng, mix)


_SAMPLERS: dict[str, Callable[[Random, Mixture], Scene]] = {
    "object": _object_or_close_up,
    "shape": sample_shape,
    "pair": sample_pair,
    "count": sample_count,
    "attribution": sample_attribution,
    "three": sample_three,
}


def sample(rng: Random, mix: Mixture = FULL) -> Scene:
    """Return a scene as a mixture has it."""
    draw = rng.random()
    for name, sampler in _SAMPLERS.items():
        draw -= getattr(mix, name)
        if draw < 0:
            return sampler(rng, mix)
    return sample_empty(rng, mix)
