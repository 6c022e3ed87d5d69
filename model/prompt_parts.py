"""Part an image by the things that a caption names, each with a caption of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from model.prompt_groups import CLOSE_UP, Unit, agreeing, lead_of, with_unit
from model.vocabulary import ARTICLES, Vocabulary

Box = tuple[float, float, float, float]

# Where a part of an image lies, and how captions say that.
_SIDES: dict[str, tuple[str, Box]] = {
    "left": ("on the left", (0, 0, 0.5, 1)),
    "right": ("on the right", (0.5, 0, 1, 1)),
    "top": ("at the top", (0, 0, 1, 0.5)),
    "bottom": ("at the bottom", (0, 0.5, 1, 1)),
    "top left": ("at the top left", (0, 0, 0.5, 0.5)),
    "top right": ("at the top right", (0.5, 0, 1, 0.5)),
    "bottom left": ("at the bottom left", (0, 0.5, 0.5, 1)),
    "bottom right": ("at the bottom right", (0.5, 0.5, 1, 1)),
}
_NUMBERS_UP_TO_FOUR = {"pair": 2, "couple": 2, "1": 1, "2": 2, "3": 3, "4": 4}
_NUMBERS_UP_TO_FOUR |= {"one": 1, "two": 2, "three": 3, "four": 4}
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_PLACES_OF: dict[int, tuple[str, ...]] = {
    2: ("left", "right"),
    3: ("top left", "top right", "bottom"),
    4: ("top left", "top right", "bottom left", "bottom right"),
}
# Below the last of three is where the others are.
_BELOW = {3: ("bottom left", "bottom right", "top")}


class Part(NamedTuple):
    """A part of an image, and the prompt for it. box: (x0, y0, x1, y1), fractions of the image."""

    prompt: str
    box: Box


def parts_of(vocabulary: Vocabulary, units: Sequence[Unit]) -> tuple[Part, ...]:
    """Return the parts of an image that show one thing each; none if one prompt says it better.

    Small weights draw one thing far better than two, and hardly ever three. Each is called small,
    because a thing of the usual size does not fit into a part.
    """
    counted = _counted(vocabulary, units)
    number = sum(count for _, count in counted)
    words = {word for unit in units for word in unit.beside_name}
    if number not in _PLACES_OF or not words.isdisjoint(CLOSE_UP):
        return ()
    if len(counted) == 1 and (number == max(_PLACES_OF) or _side_in(units)):
        return ()
    things = [(i, unit) for i, (unit, count) in enumerate(counted) for _ in range(count)]
    sides = _sides_of(units) if number == len(counted) else _PLACES_OF[number]
    background = _usual_background(vocabulary, units)
    parts = []
    for (i, thing), side in zip(things, sides, strict=True):
        phrase, box = _SIDES[side]
        text = f"{_small(vocabulary, thing)} {phrase}"
        scenes = _scenes_of(i, units)
        for scene in scenes:
            text = with_unit(text, replace(scene, gap=True), lead_of(scene, thing, has_thing=True))
        parts.append(Part(text if scenes else f"{text} {background}".rstrip(), box))
    return tuple(parts)


def background_of(vocabulary: Vocabulary, units: Sequence[Unit]) -> str:
    """Return the background that a caption of things is meant to have; none if it names one.

    Images of small weights are clearer if their captions say it.
    """
    is_shown = any(unit.role == "thing" for unit in units) and not any(map(_is_scene, units))
    return _usual_background(vocabulary, units) if is_shown else ""


def _usual_background(vocabulary: Vocabulary, units: Sequence[Unit]) -> str:
    """Return words for a background on which the things of a caption are easy to see."""
    return vocabulary.background(
        [
            (unit.named.thing, [*filter(vocabulary.is_colour, unit.beside_name)])
            for unit in units
            if unit.named
        ]
    )


def _is_scene(unit: Unit) -> bool:
    """Return whether a unit says what is behind the things, or from how near they are seen."""
    return unit.role == "place" or (unit.role == "property" and not unit.numbers)


def _scenes_of(number: int, units: Sequence[Unit]) -> list[Unit]:
    """Return the scenes and backgrounds of thing `number`: all of them, or those said behind it.

    "A cat in the snow and a dog at the beach" has one for each.
    """
    before_all: list[Unit] = []
    behind: list[list[Unit]] = []
    for unit in units:
        if unit.role == "thing":
            behind.append([])
        elif _is_scene(unit):
            (behind[-1] if behind else before_all).append(unit)
    if sum(map(bool, behind)) < 2:
        return [*before_all, *(scene for scenes in behind for scene in scenes)]
    return [*before_all, *behind[number]]


def _counted(vocabulary: Vocabulary, units: Sequence[Unit]) -> list[tuple[Unit, int]]:
    """Return every thing of a caption, one of several, and how many there are; 0 if it is unclear.

    "Three red apples" is a red apple and 3, "a pair of cats" a cat and 2. "Cats" are 2 if nothing
    else is named, and one thing otherwise.
    """
    found: list[tuple[Unit, int]] = []
    alone = sum(unit.role == "thing" for unit in units) == 1
    pending: list[str] = []
    for unit in units:
        numbers = [*pending, *unit.numbers]
        pending = numbers if unit.role == "property" else []
        if unit.role != "thing" or unit.named is None:
            continue
        if not numbers and not (unit.named.plural and alone):
            found.append((unit, 1))
            continue
        count = (
            2 if not numbers else _NUMBERS_UP_TO_FOUR.get(numbers[0], 0) if len(numbers) == 1 else 0
        )
        named = unit.named._replace(plural=False)
        properties = [word for word in unit.beside_name if word not in ARTICLES | {*numbers}]
        article = [] if named.thing.bare else ["a"]
        words = agreeing((*article, *properties, *named.name.split()), named)
        found.append((replace(unit, words=words, named=named), count))
    return found if all(count for _, count in found) else []


def _sides_of(units: Sequence[Unit]) -> Sequence[str]:
    """Return where each of several things lies: as said, or side by side."""
    things = [i for i, unit in enumerate(units) if unit.role == "thing"]
    usual = _PLACES_OF[len(things)]
    if len(things) > 2:
        *_, last = (unit for unit in units[: things[2]] if unit.role in ("relation", "thing"))
        below = last.sides[1:] == ("top",) and len(things) == max(_BELOW)
        return _BELOW[len(things)] if below else usual
    first, second = things
    between = units[first + 1 : second]
    relation = next((unit.sides for unit in between if unit.role == "relation"), None)
    if relation:
        return relation
    leading = any(unit.role == "side" for unit in units[:first])
    places = (units[:first], between) if leading else (between, units[second + 1 :])
    one, other = (_side_in(part) for part in places)
    if one and other:
        return (one, other) if one != other else usual
    if one in _OPPOSITE:
        return one, _OPPOSITE[one]
    return (_OPPOSITE[other], other) if other in _OPPOSITE else usual


def _side_in(units: Sequence[Unit]) -> str:
    """Return the first side that is said of a part of an image, or nothing."""
    sides = (unit.sides[0] for unit in units if unit.role == "side")
    return next((side for side in sides if side in _SIDES), "")


def _small(vocabulary: Vocabulary, unit: Unit) -> str:
    """Return a thing with its properties, and called small."""
    article = [word for word in unit.words[:1] if word in ARTICLES]
    rest = [word for word in unit.words[len(article) :] if not vocabulary.is_size(word)]
    bare = unit.named is not None and (unit.named.plural or unit.named.thing.bare)
    return " ".join([*(["a"] if article and not bare else []), "small", *rest])
