"""Captions: what somebody might type for a scene, with the book of what each states.

`describe` words a scene in one of many ways: articles or none, synonyms, plurals, word order,
typing errors, "a photo of", upper case, a description instead of the noun. Sizes other than normal
and sides other than the centre are always said, so that a caption without them means a normal,
centred thing; a caption without a background means mostly white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import NamedTuple

from model.training.kinds import KINDS, NAMES_OF_KINDS, NUMBERS, SHAPES
from model.training.palette import NAMES
from model.training.scenery import BACKGROUNDS, SCENES
from model.training.scenes import (
    BACKGROUND_NUMBERS,
    MOST,
    RELATION_SIDES,
    RELATIONS,
    SIDES,
    THREE_SIDES,
    Random,
    Scene,
    Side,
    Thing,
    chance,
    default_background,
    kind_of,
    pick,
)

SIZES = ("small", "large")
PLACES = (1, 2, 3)  # of the things in a caption, in the order of Scene.things

# What a caption says of one thing; class 0: it is silent (or there is no such thing).
THING_ATTRIBUTES: dict[str, int] = {
    "kind": 1 + len(NAMES_OF_KINDS),
    "colour": 1 + len(NAMES),
    "size": 1 + len(SIZES),
    "side": 1 + len(SIDES),
    "count": 1 + MOST,
}
ATTRIBUTES: dict[str, int] = {
    "background": 1 + len(BACKGROUNDS),
    **{
        f"{name}_{place}": classes for place in PLACES for name, classes in THING_ATTRIBUTES.items()
    },
    "relation": 1 + len(RELATIONS),
    "view": 2,  # 1: a close-up
}
LONGEST = 160  # bytes of a caption in UTF-8, nearly always

_COLOUR_NUMBERS = {name: 1 + number for number, name in enumerate(NAMES)}
_SIDE_NUMBERS = {name: 1 + number for number, name in enumerate(SIDES)}
_SIZE_NUMBERS = {name: 1 + number for number, name in enumerate(SIZES)}

# ── words ─────────────────────────────────────────────────────────────────────────────────────────

_COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
}
_SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "cross": ("plus sign",),
    "diamond": ("rhombus",),
    "circle": ("disc",),
    "star": ("five-pointed star",),
}
_SHAPE_PLURALS: dict[str, str] = {"cross": "crosses"}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "big", "huge"),
}
_SIDE_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left", "at the left side", "on the left side", "left"),
    "right": ("on the right", "on the right", "at the right side", "on the right side", "right"),
    "top": ("at the top", "at the top", "on top", "in the upper part", "top"),
    "bottom": ("at the bottom", "at the bottom", "in the lower part", "bottom"),
    "centre": ("in the middle", "in the center", "in the centre", "centered"),
    "top left": ("at the top left", "in the top left corner", "in the upper left", "top left"),
    "top right": ("at the top right", "in the top right corner", "in the upper right", "top right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "and": ("and", "and", "and", "next to", "beside"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
_NUMBER_WORDS: dict[int, tuple[str, ...]] = {
    2: ("two",) * 6 + ("2", "a pair of", "a couple of"),
    3: ("three",) * 7 + ("3",),
    4: ("four",) * 7 + ("4",),
}
_MEDIA = (
    "a photo of ",
    "a picture of ",
    "a drawing of ",
    "an image of ",
    "an illustration of ",
    "a 3d render of ",
    "an icon of ",
    "photo of ",
    "picture of ",
    "drawing of ",
    "image of ",
    "draw ",
    "show me ",
)
_COMMAS = (", ", ", ", " ")
_FILLERS = ("cute ", "nice ", "beautiful ", "lovely ", "shiny ")
_CLOSE_UP_BEFORE = (
    "a close-up of ",
    "a close up of ",
    "close-up of ",
    "a closeup of ",
    "macro of ",
)
_CLOSE_UP_AFTER = (", close-up", " up close", ", close up", ", zoomed in")
_PLAIN = (
    "a plain {} background",
    "plain {} background",
    "{} background",
    "just {}",
    "plain {}",
    "nothing but {}",
    "an empty {} picture",
)
_PAINTED_EMPTY = ("{}", "{}", "{}", "a picture of {}", "an empty picture of {}", "just {}")
_TAGGED = (
    "something to do with {}",
    "a thing like this: {}",
    "a thing about {}",
    "{}",
)


class _SceneWords(NamedTuple):
    """Words for a painted scene: phrases behind a subject, nouns with article, bare nouns."""

    phrases: tuple[str, ...]
    nouns: tuple[str, ...]
    bare: tuple[str, ...]


_SCENE_WORDS: dict[str, _SceneWords] = {
    "day sky": _SceneWords(
        ("in the sky", "in a bright sky", "in the daytime sky", "against the sky", "up in the sky"),
        ("the sky", "a daytime sky", "a clear sky with clouds"),
        ("sky", "day sky", "daytime sky"),
    ),
    "sunset": _SceneWords(
        ("at sunset", "at sunset", "in front of a sunset", "at dusk", "in the evening light"),
        ("a sunset", "the sunset", "an evening sky"),
        ("sunset", "evening sky"),
    ),
    "starry night": _SceneWords(
        ("at night", "in a starry night", "under the stars", "under a starry sky", "by night"),
        ("a starry night", "a starry sky", "the night sky"),
        ("starry night", "night sky", "starry sky"),
    ),
    "sea": _SceneWords(
        ("at sea", "on the sea", "in the sea", "on the ocean", "by the sea", "on the water"),
        ("the sea", "the ocean", "a calm sea"),
        ("sea", "ocean"),
    ),
    "meadow": _SceneWords(
        ("in a meadow", "on a meadow", "on the grass", "in the grass", "in a grassy field"),
        ("a meadow", "a grassy field", "a lawn"),
        ("meadow", "grass", "grassy meadow"),
    ),
    "desert": _SceneWords(
        ("in the desert", "in the desert", "in a desert", "on sand dunes", "in the dunes"),
        ("the desert", "a desert", "sand dunes"),
        ("desert", "sand dunes"),
    ),
    "snow": _SceneWords(
        ("in the snow", "in the snow", "on snow", "in a snowy landscape", "in winter"),
        ("snow", "a snowy landscape", "a winter landscape"),
        ("snow", "snowy", "winter landscape"),
    ),
    "forest": _SceneWords(
        ("in a forest", "in the forest", "in the woods", "in the middle of a forest"),
        ("a forest", "the woods", "a dark forest"),
        ("forest", "woods"),
    ),
    "space": _SceneWords(
        ("in space", "in outer space", "floating in space", "in the cosmos"),
        ("space", "outer space", "the galaxy"),
        ("space", "outer space", "galaxy"),
    ),
    "beach": _SceneWords(
        ("on the beach", "at the beach", "on a beach", "on a sandy beach", "by the shore"),
        ("the beach", "a beach", "a sandy beach"),
        ("beach", "sandy beach", "seaside"),
    ),
    "mountains": _SceneWords(
        ("in the mountains", "before the mountains", "in a mountain landscape", "in the alps"),
        ("the mountains", "mountains", "a mountain range"),
        ("mountains", "mountain", "mountain landscape"),
    ),
    "city": _SceneWords(
        ("in the city", "in a city", "on the street", "in a street", "in town", "downtown"),
        ("the city", "a city", "a city skyline", "a skyline"),
        ("city", "skyline", "city street"),
    ),
    "underwater": _SceneWords(
        ("under water", "underwater", "deep in the ocean", "under the sea", "at the sea floor"),
        ("an underwater scene", "deep water", "the deep sea"),
        ("underwater", "deep sea", "deep water"),
    ),
    "room": _SceneWords(
        ("in a room", "in the room", "on the floor", "indoors", "at home", "in an empty room"),
        ("a room", "the wall of a room", "a living room"),
        ("room", "living room", "indoor"),
    ),
}


def _scene_words(name: str) -> _SceneWords:
    words = _SCENE_WORDS.get(name)
    if words is None:
        the = _article(name)
        return _SceneWords((f"in front of {the}", f"with {the} behind it"), (the,), (name,))
    return words


# ── wordings ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Wording:
    """How people are supposed to write: probabilities of everything that a caption may vary in.

    background: of naming it where it is not the default; default_background: where it is. synonyms,
    typos: per thing. tags: of a description instead of the noun, where tags point to one kind.
    """

    background: float = 0.93
    default_background: float = 0.37
    articles: float = 0.7
    shape_colours: float = 0.97
    object_colours: float = 0.3
    synonyms: float = 0.25
    typos: float = 0.04
    tags: float = 0.03
    centre: float = 0.1
    close_ups: float = 0.75
    media: float = 0.15
    fillers: float = 0.03
    capitals: float = 0.2
    upper: float = 0.03


USUAL = Wording()
# Everything that can be judged is said, in the usual words.
COMPLETE = replace(
    USUAL,
    background=1.0,
    default_background=1.0,
    shape_colours=1.0,
    synonyms=0.0,
    typos=0.0,
    tags=0.0,
    close_ups=1.0,
    fillers=0.0,
    upper=0.0,
)

Attributes = dict[str, int]


class Caption(NamedTuple):
    """A caption and what it says.

    stated: for every name in `ATTRIBUTES` the class of what the text states, 0 where it is silent.
    spans: the characters about each thing; things: what is said of it, for every name in
    `THING_ATTRIBUTES`. A thing's side is there also where only the relation tells it.
    """

    text: str
    stated: Attributes
    spans: tuple[range, ...]
    things: tuple[Attributes, ...]


_AN = ("a", "e", "i", "o", "u", "hour", "x-ray", "suv", "8 ")
_NOT_AN = ("uni", "use", "uku", "ufo", "eu", "one", "u-")


def _article(words: str) -> str:
    """Return the words with "a" or "an" in front."""
    vowel = words.startswith(_AN) and not words.startswith(_NOT_AN)
    return ("an " if vowel else "a ") + words


_NAME_WORDS = frozenset(
    word for name in (*NAMES_OF_KINDS, *NAMES, *SCENES) for word in name.split()
) | {word for kind in KINDS for name in (kind.plural, *kind.synonyms) for word in name.split()}
_SHORTEST_MISSPELT = 5  # letters


def misspell(noun: str, rng: Random) -> str:
    """Return the noun with two letters swapped, one dropped or one doubled in a longer word.

    The first letter stays, and no other kind's word comes out; a noun of short words is unchanged.
    """
    words = noun.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= _SHORTEST_MISSPELT]
    if not long:
        return noun
    where = pick(rng, long)
    word = words[where]
    i = 1 + int(rng.random() * (len(word) - 2))
    match int(rng.random() * 3):
        case 0:
            changed = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        case 1:
            changed = word[:i] + word[i + 1 :]
        case _:
            changed = word[:i] + word[i] + word[i:]
    if changed in _NAME_WORDS:
        return noun
    words[where] = changed
    return " ".join(words)


@cache
def tag_sets() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return for each kind the sets of two or three of its tags that no other kind has."""
    holders: dict[tuple[str, ...], set[int]] = {}
    for number, kind in enumerate(KINDS):
        for size in (2, 3):
            for tags in combinations(sorted(set(kind.tags)), size):
                holders.setdefault(tags, set()).add(number)
    unique: dict[str, list[tuple[str, ...]]] = {}
    for tags, numbers in holders.items():
        if len(numbers) == 1:
            unique.setdefault(KINDS[next(iter(numbers))].name, []).append(tags)
    return {name: tuple(sorted(sets, key=len)[:24]) for name, sets in unique.items()}


def synonyms(kind: str) -> tuple[str, ...]:
    """Return the other names of a shape or object, in the singular."""
    thing = kind_of(kind)
    return thing.synonyms if thing else _SHAPE_WORDS.get(kind, ())


@cache
def _names(kind: str) -> tuple[str, tuple[str, ...], str, tuple[str, ...]]:
    """Return (the usual name, the others, the plural, those of them that take no article)."""
    thing = kind_of(kind)
    if thing is None:
        return kind, synonyms(kind), _SHAPE_PLURALS.get(kind, f"{kind}s"), ()
    return thing.name, thing.synonyms, thing.plural, thing.bare


def _colour(name: str, rng: Random) -> str:
    words = _COLOUR_WORDS.get(name)
    return pick(rng, words) if words else name


def _tagged(tags: tuple[str, ...], rng: Random) -> str:
    order = list(tags)
    if chance(rng, 0.5):
        order.reverse()
    joined = ", ".join(order[:-1]) + (" and " if chance(rng, 0.6) else ", ") + order[-1]
    return pick(rng, _TAGGED).format(joined)


def _thing(
    thing: Thing, place: int, article: bool, wording: Wording, rng: Random, stated: Attributes
) -> str:
    """Return a thing in words, such as "a small red heart"; a size other than normal is said."""
    name, others, plural, bare = _names(thing.kind)
    stated[f"kind_{place}"] = 1 + NUMBERS[thing.kind]
    stated[f"count_{place}"] = thing.count
    lone = thing.size == "normal" and thing.count == 1 and place == 1
    if wording.tags and lone and chance(rng, wording.tags) and (sets := tag_sets().get(name)):
        return _tagged(pick(rng, sets), rng)
    words = pick(rng, _FILLERS) if chance(rng, wording.fillers) else ""
    if thing.size != "normal":
        words += pick(rng, _SIZE_WORDS[thing.size]) + " "
        stated[f"size_{place}"] = _SIZE_NUMBERS[thing.size]
    noun = name
    if others and chance(rng, wording.synonyms):
        noun = pick(rng, others)
    if thing.count > 1:
        noun = plural
    if thing.colour:
        shape = thing.kind in SHAPES
        said = chance(rng, wording.shape_colours if shape else wording.object_colours)
        if said and (shape or thing.colour not in noun):
            words += _colour(thing.colour, rng) + " "
            stated[f"colour_{place}"] = _COLOUR_NUMBERS[thing.colour]
    words += misspell(noun, rng) if chance(rng, wording.typos) else noun
    if thing.count > 1:
        return f"{pick(rng, _NUMBER_WORDS[thing.count])} {words}"
    return _article(words) if article and noun not in bare else words


def _side(side: Side, place: int, rng: Random, stated: Attributes) -> str:
    stated[f"side_{place}"] = _SIDE_NUMBERS[side]
    return pick(rng, _SIDE_WORDS[side])


Parts = list[tuple[str, int]]  # pieces of the text, each with the place of its thing, 0 for none


def _one(
    thing: Thing, article: bool, led: bool, wording: Wording, rng: Random, stated: Attributes
) -> Parts:
    """Return one thing in words. led: words such as "a photo of" go before it."""
    phrase = _thing(thing, 1, article, wording, rng, stated)
    if thing.side == "centre" and not (thing.count == 1 and chance(rng, wording.centre)):
        return [(phrase, 1)]
    side = _side(thing.side, 1, rng, stated)
    if " " in side and not led and chance(rng, 0.15):
        return [(f"{side}, {phrase}", 1)]
    return [(f"{phrase} {side}", 1)]


def _sided(phrases: Sequence[str], sides: Sequence[Side], rng: Random, stated: Attributes) -> Parts:
    """Return the things with each one's side said, joined by commas and "and"."""
    parts: Parts = []
    for place, (phrase, side) in enumerate(zip(phrases, sides, strict=True), start=1):
        if place > 1:
            parts.append((" and " if place == len(phrases) else ", ", 0))
        parts.append((f"{phrase} {_side(side, place, rng, stated)}", place))
    return parts


def _several(
    scene: Scene, article: bool, wording: Wording, rng: Random, stated: Attributes
) -> Parts:
    phrases = [
        _thing(thing, place, article, wording, rng, stated)
        for place, thing in enumerate(scene.things, start=1)
    ]
    if scene.relation:
        stated["relation"] = 1 + RELATIONS.index(scene.relation)
        if chance(rng, 0.15):
            return _sided(phrases, RELATION_SIDES[scene.relation], rng, stated)
        between = f" {pick(rng, _RELATION_WORDS[scene.relation])} "
        return [(phrases[0], 1), (between, 0), (phrases[1], 2)]
    if chance(rng, 0.15):
        return _sided(phrases, THREE_SIDES, rng, stated)
    last = pick(rng, (" and ", " and ", ", and ", ", "))
    return [(phrases[0], 1), (", ", 0), (phrases[1], 2), (last, 0), (phrases[2], 3)]


def _on_plain(background: str, rng: Random) -> tuple[str, str]:
    """Return the words before and behind the subject that name a plain background."""
    whole = f"{background} background"
    if chance(rng, 0.75):
        whole = _article(whole)
    match int(rng.random() * 10):
        case 0 | 1 | 2 | 3:
            return "", f" on {whole}"
        case 4:
            return "", f" on {background}"
        case 5:
            return "", f"{pick(rng, _COMMAS)}{background} background"
        case 6:
            return "", f" with {whole}"
        case 7:
            return "", f", the background is {background}"
        case 8:
            return f"{background} background, ", ""
        case _:
            return "", f" in front of {whole}"


def _in_scene(background: str, rng: Random) -> tuple[str, str]:
    """Return the words before and behind the subject that name a painted scene."""
    words = _scene_words(background)
    match int(rng.random() * 10):
        case 0:
            return "", f", {pick(rng, words.bare)} background"
        case 1:
            return "", f" in front of {pick(rng, words.nouns)}"
        case 2:
            return "", f", {pick(rng, words.bare)}"
        case 3:
            return f"{pick(rng, words.phrases)}, ", ""
        case _:
            return "", f" {pick(rng, words.phrases)}"


def _finish(text: str, wording: Wording, rng: Random) -> str:
    """Return the text in one of the ways people end and capitalise it; no character moves."""
    if chance(rng, wording.upper):
        return text.upper() if chance(rng, 0.6) else text.title()
    if chance(rng, wording.capitals):
        text = text[0].upper() + text[1:]
    return text + "." if chance(rng, 0.12) else text


def _empty(scene: Scene, rng: Random) -> str:
    if scene.background in NAMES:
        return pick(rng, _PLAIN).format(_colour(scene.background, rng))
    return pick(rng, _PAINTED_EMPTY).format(pick(rng, _scene_words(scene.background).nouns))


def _by_thing(scene: Scene, stated: Attributes) -> tuple[Attributes, ...]:
    if scene.relation:
        sides: Sequence[Side] = RELATION_SIDES[scene.relation]
    else:
        sides = THREE_SIDES if len(scene.things) == len(THREE_SIDES) else [scene.things[0].side]
    return tuple(
        {
            "kind": stated[f"kind_{place}"],
            "colour": stated[f"colour_{place}"],
            "size": stated[f"size_{place}"],
            "side": _SIDE_NUMBERS[side],
            "count": stated[f"count_{place}"],
        }
        for place, side in enumerate(sides, start=1)
    )


def _joined(before: str, parts: Parts) -> tuple[str, tuple[range, ...]]:
    """Return the text so far and where each part about a thing lies in it."""
    text, spans = before, []
    for part, place in parts:
        if place:
            spans.append(range(len(text), len(text) + len(part)))
        text += part
    return text, tuple(spans)


def describe(
    scene: Scene, rng: Random, *, complete: bool = False, wording: Wording | None = None
) -> Caption:
    """Return what somebody might type for the scene.

    complete: name the background, the colours of shapes and a close-up for certain, in the usual
    words, as a prompt must whose picture is to be judged. wording: other probabilities.
    """
    wording = wording or (COMPLETE if complete else USUAL)
    stated = dict.fromkeys(ATTRIBUTES, 0)
    if not scene.things:
        stated["background"] = 1 + BACKGROUND_NUMBERS[scene.background]
        return Caption(_finish(_empty(scene, rng), wording, rng), stated, (), ())
    article = chance(rng, wording.articles)
    media = pick(rng, _MEDIA) if chance(rng, wording.media) else ""
    if scene.close_up:
        parts: Parts = [(_thing(scene.things[0], 1, article, wording, rng, stated), 1)]
    elif len(scene.things) == 1:
        parts = _one(scene.things[0], article, bool(media), wording, rng, stated)
    else:
        parts = _several(scene, article, wording, rng, stated)
    before = after = closing = ""
    usual = default_background(scene) == scene.background
    if chance(rng, wording.default_background if usual else wording.background):
        stated["background"] = 1 + BACKGROUND_NUMBERS[scene.background]
        if scene.background in NAMES:
            before, after = _on_plain(_colour(scene.background, rng), rng)
        else:
            before, after = _in_scene(scene.background, rng)
    if scene.close_up and chance(rng, wording.close_ups):
        stated["view"] = 1
        if chance(rng, 0.7):
            before += pick(rng, _CLOSE_UP_BEFORE)
        else:
            closing = pick(rng, _CLOSE_UP_AFTER)
    else:
        before += media
    text, spans = _joined(before, parts)
    text = _finish(text + closing + after, wording, rng)
    return Caption(text, stated, spans, _by_thing(scene, stated))


def caption(scene: Scene, rng: Random) -> str:
    """Return a caption alone."""
    return describe(scene, rng).text
