"""Name what the synthetic images show: nine shapes and the objects of `kinds.jsonl`.

Needs neither the art nor torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from model.training.palette import COLOURS, distance
from model.training.scenery import BACKGROUNDS, SCENES

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "diamond",
    "ring",
    "crescent",
)
SHAPE_ASPECTS: dict[str, float] = {
    "star": 1.05,
    "heart": 1.1,
    "triangle": 1.11,
    "diamond": 0.76,
    "crescent": 0.77,
}

FILE = Path(__file__).with_name("kinds.jsonl")
_ALIKE = 32.0  # ΔE below which a shape would be hard to tell from its background

# The palette colours in which a shape would be hard to see before much of a scene.
HIDDEN_COLOURS: dict[str, tuple[str, ...]] = {
    "day sky": ("white",),
    "sea": ("white",),
    "meadow": ("green",),
    "snow": ("white",),
    "starry night": ("black",),
    "space": ("black",),
    "city": ("gray",),
    "room": ("white",),
}

_MANY_WORDS = (" of ", " with ", " in ", " on ", " behind ", " from ", " taking ")
_IRREGULAR = {
    "leaf": "leaves",
    "knife": "knives",
    "loaf": "loaves",
    "scarf": "scarves",
    "wolf": "wolves",
}
_IRREGULAR |= {"mouse": "mice", "tooth": "teeth", "foot": "feet", "goose": "geese", "ox": "oxen"}
_IRREGULAR |= {"dice": "dice", "fish": "fish", "deer": "deer"}


@dataclass(frozen=True, slots=True)
class Kind:
    """One object of the art.

    name: what people type, lower case and singular; unique over all kinds and shapes, as is every
    synonym. code: the file's stem in the art. tags: words about it without the noun. colour: the
    palette colour people would call it by, or None. bare: those of name and synonyms that take no
    article ("bread", "scissors"). aspect: width over height of its outline. hidden: the backgrounds
    before which too little of it can be seen.
    """

    name: str
    code: str
    plural: str
    synonyms: tuple[str, ...]
    tags: tuple[str, ...]
    colour: str | None
    group: str
    bare: tuple[str, ...]
    aspect: float
    hidden: tuple[str, ...]


def plural(noun: str) -> str:
    """Return the regular plural of a noun phrase: "glass of milk" → "glasses of milk"."""
    for middle in _MANY_WORDS:
        if middle in noun:
            head, tail = noun.split(middle, 1)
            return plural(head) + middle + tail
    start, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        ending = _IRREGULAR[last]
    elif last.endswith("man"):
        ending = last[:-3] + "men"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        ending = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        ending = last[:-1] + "ies"
    else:
        ending = last + "s"
    return f"{start} {ending}".lstrip()


def _read(path: Path) -> tuple[Kind, ...]:
    kinds = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        lists = {key: tuple(row.get(key, ())) for key in ("synonyms", "tags", "bare", "hidden")}
        kinds.append(
            Kind(
                name=row["name"],
                code=row["code"],
                plural=row.get("plural") or plural(row["name"]),
                colour=row.get("colour"),
                group=row["group"],
                aspect=row["aspect"],
                **lists,
            )
        )
    return tuple(kinds)


KINDS: tuple[Kind, ...] = _read(FILE)
NAMES_OF_KINDS: tuple[str, ...] = (*SHAPES, *(kind.name for kind in KINDS))
NUMBERS: dict[str, int] = {
    name: number for number, name in enumerate(NAMES_OF_KINDS)
}  # sprite number by name

# Objects with letters, numbers or notes on them, which a mirror would spoil.
ONE_WAY: frozenset[str] = frozenset(
    (
        "gold medal",
        "silver medal",
        "bronze medal",
        "slot machine",
        "music note",
        "treble clef",
        "convenience store",
        "dollar bill",
        "flying money",
        "money bag",
        "bank",
        "red envelope",
        "hotel",
        "watch",
        "mantel clock",
        "world map",
        "globe",
    )
)


def object_of(sprite: int | str) -> Kind | None:
    """Return the object of a sprite's name or number, None for a shape.

    Raises KeyError or IndexError for an unknown one.
    """
    number = NUMBERS[sprite] if isinstance(sprite, str) else sprite
    return None if number < len(SHAPES) else KINDS[number - len(SHAPES)]


def aspect(sprite: int | str) -> float:
    """Return width over height of a sprite's outline, by its name or number."""
    kind = object_of(sprite)
    if kind is not None:
        return kind.aspect
    return SHAPE_ASPECTS.get(sprite if isinstance(sprite, str) else SHAPES[sprite], 1.0)


def outline(sprite: int | str, length: float) -> tuple[float, float]:
    """Return width and height in pixels of a sprite whose longer side is `length` pixels."""
    ratio = aspect(sprite)
    return (length, length / ratio) if ratio >= 1 else (length * ratio, length)


@lru_cache(maxsize=4096)
def backgrounds_for(sprite: int | str, colour: str | None = None) -> tuple[str, ...]:
    """Return the backgrounds before which a sprite can be seen.

    colour: a shape's palette colour. Raises ValueError for a shape without one.
    """
    kind = object_of(sprite)
    if kind is not None:
        return tuple(name for name in BACKGROUNDS if name not in kind.hidden)
    if colour is None:
        raise ValueError("a shape has no colour of its own")
    plain = [name for name in COLOURS if distance(COLOURS[colour], COLOURS[name]) >= _ALIKE]
    return (*plain, *(name for name in SCENES if colour not in HIDDEN_COLOURS.get(name, ())))
