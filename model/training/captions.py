"""What people might type for a scene: captions in varied wording, each with the class numbers of what it states and leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.training.palette import NAMES
from model.training.scenes import (
    DEFAULT_OBJECTS,
    KINDS,
    OBJECTS,
    RELATIONS,
    SHAPES,
    SIDES,
    Pixels,
    Relation,
    Scene,
    Thing,
    pick,
    render,
    sample,
)

SIZES = ("small", "large")

# Class 0 of every attribute says that the caption is silent about it (or that there is no such thing).
_CLASSES: dict[str, tuple[str, ...]] = {"kind": KINDS, "colour": NAMES, "size": SIZES, "side": SIDES}
ATTRIBUTES: dict[str, int] = {
    "background": 1 + len(NAMES),
    **{f"{name}_{place}": 1 + len(classes) for place in (1, 2) for name, classes in _CLASSES.items()},
    "relation": 1 + len(RELATIONS),
}
# What a caption says of one thing; its side is always known, from its own words or from the relation.
THING_ATTRIBUTES: dict[str, int] = {name: 1 + len(classes) for name, classes in _CLASSES.items()}

_COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
}
_SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "cross": ("cross", "plus sign", "cross"),
    "diamond": ("diamond", "rhombus", "diamond"),
    "crescent": ("crescent", "crescent moon"),
    "circle": ("circle", "circle", "disc"),
    "star": ("star",),
}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "big", "huge")}
_SIDE_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left", "at the left side", "on the left side", "left"),
    "right": ("on the right", "on the right", "at the right side", "on the right side", "right"),
    "top": ("at the top", "at the top", "on top", "in the upper part", "top"),
    "bottom": ("at the bottom", "at the bottom", "in the lower part", "bottom"),
    "centre": ("in the middle", "in the center", "in the centre", "centered"),
}
_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "and": ("and", "and", "next to", "beside", "and"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
# A relation said as two places instead: (the first's, the second's).
_RELATION_SIDES: dict[str, tuple[str, str]] = {
    "and": ("left", "right"),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
_MEDIA = ("a photo of ", "a picture of ", "a drawing of ", "an image of ", "picture of ", "photo of ", "drawing of ", "an illustration of ")
_PLAIN = (
    "a plain {} background",
    "plain {} background",
    "{} background",
    "just {}",
    "plain {}",
    "nothing but {}",
    "an empty {} picture",
)

Attributes = dict[str, int]


class Caption(NamedTuple):
    """stated: for every name in `ATTRIBUTES` the class of what the text states, 0 where it is silent. spans: the characters about each
    thing; things: for each, and every name in `THING_ATTRIBUTES`, the same."""

    text: str
    stated: Attributes
    spans: tuple[range, ...]
    things: tuple[Attributes, ...]


@dataclass(frozen=True)
class _Style:
    """What one caption keeps to throughout. shape_colours: the probability that a shape's colour is named."""

    article: bool
    shape_colours: float


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeio" or words.startswith("um") else "a ") + words


def _colour(name: str, rng: np.random.Generator) -> str:
    return pick(rng, _COLOUR_WORDS.get(name, (name,)))


def _thing(thing: Thing, place: int, style: _Style, rng: np.random.Generator, stated: Attributes) -> str:
    """A thing in words, such as "a small red heart"; a size other than normal is always said."""
    words = []
    if thing.size in SIZES:
        words.append(pick(rng, _SIZE_WORDS[thing.size]))
        stated[f"size_{place}"] = 1 + SIZES.index(thing.size)
    if thing.colour and _chance(rng, style.shape_colours if thing.kind in SHAPES else 0.45):
        words.append(_colour(thing.colour, rng))
        stated[f"colour_{place}"] = 1 + NAMES.index(thing.colour)
    names = OBJECTS[thing.kind].words if thing.kind in OBJECTS else _SHAPE_WORDS.get(thing.kind, (thing.kind,))
    words.append(names[0] if _chance(rng, 0.6) else pick(rng, names))
    stated[f"kind_{place}"] = 1 + KINDS.index(thing.kind)
    return _article(" ".join(words)) if style.article else " ".join(words)


def _side(side: str, place: int, rng: np.random.Generator, stated: Attributes) -> str:
    stated[f"side_{place}"] = 1 + SIDES.index(side)
    return pick(rng, _SIDE_WORDS[side])


def _one(thing: Thing, style: _Style, rng: np.random.Generator, stated: Attributes) -> tuple[str, list[str]]:
    """The subject, and the phrases in it that are about each thing."""
    phrase = _thing(thing, 1, style, rng, stated)
    if thing.side != "centre" or _chance(rng, 0.2):
        phrase = f"{phrase} {_side(thing.side, 1, rng, stated)}"
    return phrase, [phrase]


def _two(things: Sequence[Thing], relation: Relation, style: _Style, rng: np.random.Generator, stated: Attributes) -> tuple[str, list[str]]:
    """The subject, and the phrases in it that are about each thing."""
    first, second = (_thing(thing, place, style, rng, stated) for place, thing in enumerate(things, start=1))
    stated["relation"] = 1 + RELATIONS.index(relation)
    if _chance(rng, 0.15):
        sides = [_side(side, place, rng, stated) for place, side in enumerate(_RELATION_SIDES[relation], start=1)]
        first, second = f"{first} {sides[0]}", f"{second} {sides[1]}"
        return f"{first} and {second}", [first, second]
    return f"{first} {pick(rng, _RELATION_WORDS[relation])} {second}", [first, second]


def _spans(text: str, phrases: Sequence[str]) -> tuple[range, ...]:
    """Where the phrases lie, one after the other."""
    spans: list[range] = []
    for phrase in phrases:
        start = text.index(phrase, spans[-1].stop if spans else 0)
        spans.append(range(start, start + len(phrase)))
    return tuple(spans)


def _by_thing(scene: Scene, stated: Attributes) -> tuple[Attributes, ...]:
    sides = _RELATION_SIDES[scene.relation] if scene.relation else [thing.side for thing in scene.things]
    return tuple(
        {name: stated[f"{name}_{place}"] for name in THING_ATTRIBUTES} | {"side": 1 + SIDES.index(side)}
        for place, side in enumerate(sides, start=1)
    )


def _placed(subject: str, background: str, rng: np.random.Generator) -> str:
    """The subject with its background named, in one of the ways people do."""
    whole = f"{background} background"
    if _chance(rng, 0.75):
        whole = _article(whole)
    match int(rng.random() * 10):
        case 0 | 1 | 2 | 3:
            return f"{subject} on {whole}"
        case 4:
            return f"{subject} on {background}"
        case 5:
            return f"{subject}, {background} background"
        case 6:
            return f"{subject} with {whole}"
        case 7:
            return f"{subject}, the background is {background}"
        case 8:
            return f"{background} background, {subject}"
        case _:
            return f"{subject} in front of {whole}"


def _finish(caption: str, rng: np.random.Generator) -> str:
    if _chance(rng, 0.2):
        caption = caption[0].upper() + caption[1:]
    return caption + "." if _chance(rng, 0.12) else caption


def describe(scene: Scene, rng: np.random.Generator, *, complete: bool = False) -> Caption:
    """What somebody might type for the scene.

    complete: name the background and the colours of shapes for certain, as a prompt must whose picture is to be judged. Sizes other
    than normal and sides other than the centre are always named, so that a caption without them means a normal, centred thing.
    """
    stated = dict.fromkeys(ATTRIBUTES, 0)
    if not scene.things or complete or _chance(rng, 0.85):
        stated["background"] = 1 + NAMES.index(scene.background)
    if not scene.things:
        return Caption(_finish(pick(rng, _PLAIN).format(_colour(scene.background, rng)), rng), stated, (), ())
    style = _Style(article=_chance(rng, 0.7), shape_colours=1.0 if complete else 0.97)
    if scene.relation:
        subject, phrases = _two(scene.things, scene.relation, style, rng, stated)
    else:
        subject, phrases = _one(scene.things[0], style, rng, stated)
    text = (pick(rng, _MEDIA) if _chance(rng, 0.15) else "") + subject
    if stated["background"]:
        text = _placed(text, _colour(scene.background, rng), rng)
    return Caption(_finish(text, rng), stated, _spans(text, phrases), _by_thing(scene, stated))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption alone."""
    return describe(scene, rng).text


def batch(
    rng: np.random.Generator,
    n: int,
    width: int = 64,
    height: int = 64,
    objects: int = DEFAULT_OBJECTS,
    *,
    lattice: int = 1,
    aligned: float = 0.0,
) -> tuple[Pixels, list[str], dict[str, npt.NDArray[np.int64]]]:
    """n training examples: pictures `[n,height,width,3]`, captions, and per attribute the classes stated `[n]`.

    aligned: the share of pictures that lie on a lattice of so many pixels (scenes.render).
    """
    scenes: Sequence[Scene] = [sample(rng, objects) for _ in range(n)]
    lattices = np.where(rng.random(n) < aligned, lattice, 1).tolist()
    images = np.stack([render(scene, rng, width, height, pixels) for scene, pixels in zip(scenes, lattices, strict=True)])
    described = [describe(scene, rng) for scene in scenes]
    attributes = {name: np.array([c.stated[name] for c in described]) for name in ATTRIBUTES}
    return images, [c.text for c in described], attributes
