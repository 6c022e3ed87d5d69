"""Define the words of captions: synonyms, plurals, articles, phrases and typing errors.

`captions.py` makes captions of them. An entry that is listed twice is chosen twice as often.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import NamedTuple

from model.training.kinds import KINDS, NAMES_OF_KINDS
from model.training.palette import NAMES
from model.training.scenery import SCENES
from model.training.scenes import Random, kind_of, pick
from model.vocabulary import with_article

# ── tables ────────────────────────────────────────────────────────────────────────────────────────

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
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
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "big", "huge"),
}
SIDE_WORDS: dict[str, tuple[str, ...]] = {
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
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "and": ("and", "and", "and", "next to", "beside"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
NUMBER_WORDS: dict[int, tuple[str, ...]] = {
    2: ("two",) * 6 + ("2", "a pair of", "a couple of"),
    3: ("three",) * 7 + ("3",),
    4: ("four",) * 7 + ("4",),
}
MEDIA = (
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
COMMAS = (", ", ", ", " ")
FILLERS = ("cute ", "nice ", "beautiful ", "lovely ", "shiny ")
CLOSE_UP_BEFORE = (
    "a close-up of ",
    "a close up of ",
    "close-up of ",
    "a closeup of ",
    "macro of ",
)
CLOSE_UP_AFTER = (", close-up", " up close", ", close up", ", zoomed in")
PLAIN = (
    "a plain {} background",
    "plain {} background",
    "{} background",
    "just {}",
    "plain {}",
    "nothing but {}",
    "an empty {} picture",
)
PAINTED_EMPTY = ("{}", "{}", "{}", "a picture of {}", "an empty picture of {}", "just {}")
TAGGED = (
    "something to do with {}",
    "a thing like this: {}",
    "a thing about {}",
    "{}",
)


class SceneWords(NamedTuple):
    """Words for a painted scene: phrases behind a subject, nouns with article, bare nouns."""

    phrases: tuple[str, ...]
    nouns: tuple[str, ...]
    bare: tuple[str, ...]


SCENE_WORDS: dict[str, SceneWords] = {
    "day sky": SceneWords(
        ("in the sky", "in a bright sky", "in the daytime sky", "against the sky", "up in the sky"),
        ("the sky", "a daytime sky", "a clear sky with clouds"),
        ("sky", "day sky", "daytime sky"),
    ),
    "sunset": SceneWords(
        ("at sunset", "at sunset", "in front of a sunset", "at dusk", "in the evening light"),
        ("a sunset", "the sunset", "an evening sky"),
        ("sunset", "evening sky"),
    ),
    "starry night": SceneWords(
        ("at night", "in a starry night", "under the stars", "under a starry sky", "by night"),
        ("a starry night", "a starry sky", "the night sky"),
        ("starry night", "night sky", "starry sky"),
    ),
    "sea": SceneWords(
        ("at sea", "on the sea", "in the sea", "on the ocean", "by the sea", "on the water"),
        ("the sea", "the ocean", "a calm sea"),
        ("sea", "ocean"),
    ),
    "meadow": SceneWords(
        ("in a meadow", "on a meadow", "on the grass", "in the grass", "in a grassy field"),
        ("a meadow", "a grassy field", "a lawn"),
        ("meadow", "grass", "grassy meadow"),
    ),
    "desert": SceneWords(
        ("in the desert", "in the desert", "in a desert", "on sand dunes", "in the dunes"),
        ("the desert", "a desert", "sand dunes"),
        ("desert", "sand dunes"),
    ),
    "snow": SceneWords(
        ("in the snow", "in the snow", "on snow", "in a snowy landscape", "in winter"),
        ("snow", "a snowy landscape", "a winter landscape"),
        ("snow", "snowy", "winter landscape"),
    ),
    "forest": SceneWords(
        ("in a forest", "in the forest", "in the woods", "in the middle of a forest"),
        ("a forest", "the woods", "a dark forest"),
        ("forest", "woods"),
    ),
    "space": SceneWords(
        ("in space", "in outer space", "floating in space", "in the cosmos"),
        ("space", "outer space", "the galaxy"),
        ("space", "outer space", "galaxy"),
    ),
    "beach": SceneWords(
        ("on the beach", "at the beach", "on a beach", "on a sandy beach", "by the shore"),
        ("the beach", "a beach", "a sandy beach"),
        ("beach", "sandy beach", "seaside"),
    ),
    "mountains": SceneWords(
        ("in the mountains", "before the mountains", "in a mountain landscape", "in the alps"),
        ("the mountains", "mountains", "a mountain range"),
        ("mountains", "mountain", "mountain landscape"),
    ),
    "city": SceneWords(
        ("in the city", "in a city", "on the street", "in a street", "in town", "downtown"),
        ("the city", "a city", "a city skyline", "a skyline"),
        ("city", "skyline", "city street"),
    ),
    "underwater": SceneWords(
        ("under water", "underwater", "deep in the ocean", "under the sea", "at the sea floor"),
        ("an underwater scene", "deep water", "the deep sea"),
        ("underwater", "deep sea", "deep water"),
    ),
    "room": SceneWords(
        ("in a room", "in the room", "on the floor", "indoors", "at home", "in an empty room"),
        ("a room", "the wall of a room", "a living room"),
        ("room", "living room", "indoor"),
    ),
}


# ── choosing words ────────────────────────────────────────────────────────────────────────────────


def scene_words(name: str) -> SceneWords:
    """Return the words for a painted scene, by its name if none are listed."""
    words = SCENE_WORDS.get(name)
    if words is None:
        the = with_article(name)
        return SceneWords((f"in front of {the}", f"with {the} behind it"), (the,), (name,))
    return words


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


class Names(NamedTuple):
    """The names of a kind. bare: those in the singular that take no article."""

    usual: str
    synonyms: tuple[str, ...]
    plural: str
    bare: tuple[str, ...]


@cache
def names_of(kind: str) -> Names:
    """Return the names of a shape or object."""
    thing = kind_of(kind)
    if thing is None:
        return Names(kind, synonyms(kind), _SHAPE_PLURALS.get(kind, f"{kind}s"), ())
    return Names(thing.name, thing.synonyms, thing.plural, thing.bare)


def colour_word(name: str, rng: Random) -> str:
    """Return a word for a palette colour."""
    words = COLOUR_WORDS.get(name)
    return pick(rng, words) if words else name
