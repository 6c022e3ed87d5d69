"""Synthetic scenes: one or two shapes or well-known objects on a plain background, sampled, laid out and drawn at any size.

A scene is a description; `render` is its picture. What `captions.describe` says of a scene is always visible in that picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from model.training.palette import COLOURS, NAMES, distance

Size = Literal["small", "normal", "large"]
Side = Literal["centre", "left", "right", "top", "bottom"]
Relation = Literal["and", "left of", "right of", "above", "below"]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
T = TypeVar("T")

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "crescent")
SIDES: tuple[Side, ...] = ("centre", "left", "right", "top", "bottom")
RELATIONS: tuple[Relation, ...] = ("and", "left of", "right of", "above", "below")


@dataclass(frozen=True)
class Object:
    """A glyph of the emoji font. colour: the palette colour people would call it by, or None; words: its names, the usual one first."""

    glyph: str
    colour: str | None
    words: tuple[str, ...]


# The order counts: `objects=n` means the first n, and the text encoder's class numbers follow it, so new ones go to the end.
OBJECTS: dict[str, Object] = {
    "apple": Object("🍎", "red", ("apple",)),
    "banana": Object("🍌", "yellow", ("banana",)),
    "cat": Object("🐱", None, ("cat", "cat face", "kitten")),
    "dog": Object("🐶", None, ("dog", "dog face", "puppy")),
    "tree": Object("🌳", "green", ("tree",)),
    "sunflower": Object("🌻", "yellow", ("sunflower",)),
    "car": Object("🚗", "red", ("car",)),
    "house": Object("🏠", None, ("house",)),
    "sun": Object("🌞", "yellow", ("sun",)),
    "fish": Object("🐟", "blue", ("fish",)),
    "mushroom": Object("🍄", "red", ("mushroom", "toadstool")),
    "strawberry": Object("🍓", "red", ("strawberry",)),
    "ball": Object("⚽", None, ("soccer ball", "ball", "football")),
    "umbrella": Object("☂", "blue", ("umbrella",)),
    "cactus": Object("🌵", "green", ("cactus",)),
    "pizza": Object("🍕", None, ("pizza", "slice of pizza", "pizza slice")),
    "tulip": Object("🌷", "pink", ("tulip", "flower")),
    "frog": Object("🐸", "green", ("frog", "frog face")),
    "panda": Object("🐼", None, ("panda", "panda face")),
    "pumpkin": Object("🎃", "orange", ("pumpkin",)),
    "grapes": Object("🍇", "purple", ("bunch of grapes",)),
    "penguin": Object("🐧", None, ("penguin",)),
    "rocket": Object("🚀", None, ("rocket",)),
    "crab": Object("🦀", "orange", ("crab",)),
    "pig": Object("🐷", "pink", ("pig", "pig face")),
    "fox": Object("🦊", "orange", ("fox", "fox face")),
    "bear": Object("🐻", "brown", ("bear", "bear face")),
    "monkey": Object("🐵", "brown", ("monkey", "monkey face")),
    "rabbit": Object("🐰", None, ("rabbit", "rabbit face", "bunny")),
    "mouse": Object("🐭", "gray", ("mouse", "mouse face")),
    "chick": Object("🐤", "yellow", ("chick",)),
    "owl": Object("🦉", "brown", ("owl",)),
    "butterfly": Object("🦋", None, ("butterfly",)),
    "bee": Object("🐝", None, ("bee",)),
    "ladybug": Object("🐞", "red", ("ladybug", "ladybird")),
    "turtle": Object("🐢", "green", ("turtle",)),
    "snail": Object("🐌", "brown", ("snail",)),
    "octopus": Object("🐙", "pink", ("octopus",)),
    "lemon": Object("🍋", "yellow", ("lemon",)),
    "pear": Object("🍐", "green", ("pear",)),
    "cherries": Object("🍒", "red", ("pair of cherries",)),
    "watermelon": Object("🍉", None, ("watermelon", "slice of watermelon")),
    "pineapple": Object("🍍", None, ("pineapple",)),
    "carrot": Object("🥕", "orange", ("carrot",)),
    "cheese": Object("🧀", "yellow", ("piece of cheese",)),
    "burger": Object("🍔", None, ("burger", "hamburger")),
    "donut": Object("🍩", None, ("donut", "doughnut")),
    "bell": Object("🔔", "yellow", ("bell",)),
    "balloon": Object("🎈", "red", ("balloon",)),
    "rose": Object("🌹", "red", ("rose",)),
}
KINDS: tuple[str, ...] = (*SHAPES, *OBJECTS)


@dataclass(frozen=True)
class Thing:
    """One shape or object. colour: a shape's colour, an object's natural one or None."""

    kind: str
    colour: str | None
    size: Size = "normal"
    side: Side = "centre"


@dataclass(frozen=True)
class Scene:
    """background: a palette colour. relation: how the first of two things lies to the second ("and": first on the left), else None."""

    background: str
    things: tuple[Thing, ...] = ()
    relation: Relation | None = None


# ── sprites ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

FONT_FILE = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts/noto-emoji", "/usr/share/fonts/google-noto")
_FONT_SIZE = 109  # the only size of the font's bitmaps
_MASTER = 512  # pixels a side of a shape before it is scaled down

Point = tuple[float, float]


def find_font(folders: Sequence[str | Path] = FONT_FOLDERS) -> Path:
    """The emoji font's file. Raises FileNotFoundError naming the package to install."""
    for folder in folders:
        if (path := Path(folder) / FONT_FILE).is_file():
            return path
    raise FileNotFoundError(f"{FONT_FILE} is in none of {', '.join(map(str, folders))}: install the package fonts-noto-color-emoji")


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(find_font(), _FONT_SIZE)


def _glyph(text: str) -> Image.Image:
    image = Image.new("RGBA", (2 * _FONT_SIZE, 2 * _FONT_SIZE))
    ImageDraw.Draw(image).text((16, 16), text, font=_font(), embedded_color=True)
    return image


def _star() -> list[Point]:
    turns = [(math.pi * i / 5, 0.5 if i % 2 == 0 else 0.21) for i in range(10)]
    return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for a, r in turns]


def _heart() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 120)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(0.5 + a / 34, 0.48 - b / 34) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _cross() -> list[Point]:
    a, b = 0.33, 0.67
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


_POLYGONS: dict[str, Callable[[], list[Point]]] = {
    "square": lambda: [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)],
    "triangle": lambda: [(0.5, 0.05), (1, 0.95), (0, 0.95)],
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "diamond": lambda: [(0.5, 0), (0.88, 0.5), (0.5, 1), (0.12, 0.5)],
}
# Ellipses drawn one over the other, each (x0, y0, x1, y1, filled); an empty one cuts a hole.
_ELLIPSES: dict[str, list[tuple[float, float, float, float, bool]]] = {
    "circle": [(0, 0, 1, 1, True)],
    "ring": [(0, 0, 1, 1, True), (0.24, 0.24, 0.76, 0.76, False)],
    "crescent": [(0, 0, 1, 1, True), (0.36, 0.08, 1.2, 0.92, False)],
}


def _shape(kind: str) -> Image.Image:
    mask = Image.new("L", (_MASTER, _MASTER))
    draw = ImageDraw.Draw(mask)
    if kind in _POLYGONS:
        draw.polygon([(x * _MASTER, y * _MASTER) for x, y in _POLYGONS[kind]()], fill=255)
    for x0, y0, x1, y1, filled in _ELLIPSES.get(kind, []):
        draw.ellipse((x0 * _MASTER, y0 * _MASTER, x1 * _MASTER, y1 * _MASTER), fill=255 if filled else 0)
    image = Image.new("RGBA", mask.size, (255, 255, 255, 255))
    image.putalpha(mask)
    return image


@lru_cache(maxsize=len(KINDS))
def _master(kind: str) -> Image.Image:
    image = _glyph(OBJECTS[kind].glyph) if kind in OBJECTS else _shape(kind)
    return image.crop(image.getchannel("A").getbbox())


@lru_cache(maxsize=4096)
def sprite(kind: str, pixels: int) -> tuple[Floats, Floats]:
    """A kind cropped to its outline, the longer side `pixels` long → (RGB of 0…255 `[3,h,w]`, opacity of 0…1 `[h,w]`); shapes are white.

    The arrays are cached, so do not write to them. Raises FileNotFoundError for an object when the emoji font is missing.
    """
    master = _master(kind)
    scale = pixels / max(master.size)
    size = (max(1, round(master.width * scale)), max(1, round(master.height * scale)))
    scaled = np.asarray(master.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC), dtype=np.float32)
    planes = np.ascontiguousarray(scaled.transpose(2, 0, 1))
    return planes[:3], planes[3] / 255


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

DEFAULT_OBJECTS = 16
_ALIKE = 32.0  # ΔE below which a thing would be hard to tell from its background
_LONE_SIZES: tuple[Size, ...] = ("normal", "normal", "normal", "small", "large")
_PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
    ("normal", "normal"),
    ("normal", "normal"),
    ("normal", "normal"),
    ("normal", "small"),
    ("small", "normal"),
    ("normal", "large"),
    ("large", "normal"),
    ("small", "large"),
    ("large", "small"),
)


def _clashes(kind: str, colour: str | None, background: str) -> bool:
    if colour is not None and distance(COLOURS[colour], COLOURS[background]) < _ALIKE:
        return True
    if kind in SHAPES:
        return False
    rgb, alpha = sprite(kind, 64)
    solid = alpha > 0.5
    seen = solid & (distance(rgb.transpose(1, 2, 0), COLOURS[background]) >= _ALIKE)
    shrinks = any(seen.any(axis=a).sum() < 0.94 * solid.any(axis=a).sum() for a in (0, 1))
    return bool(shrinks or seen.sum() < 0.78 * solid.sum())


@lru_cache(maxsize=1024)
def backgrounds(kind: str, colour: str | None) -> tuple[str, ...]:
    """The palette colours in front of which neither much of the thing nor a part of its outline vanishes."""
    return tuple(name for name in NAMES if not _clashes(kind, colour, name))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely (`Generator.choice` takes ten times as long)."""
    return options[int(rng.random() * len(options))]


def _some_shape(rng: np.random.Generator) -> Thing:
    return Thing(pick(rng, SHAPES), pick(rng, NAMES))


def _some_object(rng: np.random.Generator, objects: int) -> Thing:
    kind = pick(rng, KINDS[len(SHAPES) : len(SHAPES) + objects])
    return Thing(kind, OBJECTS[kind].colour)


def _lone(rng: np.random.Generator, thing: Thing) -> Scene:
    size = pick(rng, _LONE_SIZES)
    side = pick(rng, SIDES) if rng.random() < 0.55 else "centre"
    return Scene(pick(rng, backgrounds(thing.kind, thing.colour)), (replace(thing, size=size, side=side),))


def sample_shape(rng: np.random.Generator) -> Scene:
    """One shape, with any colour, size and side."""
    return _lone(rng, _some_shape(rng))


def sample_object(rng: np.random.Generator, objects: int = DEFAULT_OBJECTS) -> Scene:
    """One of the first `objects` objects, with any size and side."""
    return _lone(rng, _some_object(rng, objects))


def sample_pair(rng: np.random.Generator, objects: int = DEFAULT_OBJECTS) -> Scene:
    """Two different things, three in four of them shapes, at most one of them large."""
    while True:
        first, second = (_some_shape(rng) if rng.random() < 0.75 else _some_object(rng, objects) for _ in range(2))
        shared = [name for name in backgrounds(first.kind, first.colour) if name in backgrounds(second.kind, second.colour)]
        if first != second and shared:
            break
    sizes = pick(rng, _PAIR_SIZES)
    things = (replace(first, size=sizes[0]), replace(second, size=sizes[1]))
    return Scene(pick(rng, shared), things, pick(rng, RELATIONS))


def sample(rng: np.random.Generator, objects: int = DEFAULT_OBJECTS) -> Scene:
    """A training scene: 17 % one shape, 15 % one object, 65 % two things, 3 % nothing but the background."""
    draw = rng.random()
    if draw < 0.17:
        return sample_shape(rng)
    if draw < 0.32:
        return sample_object(rng, objects)
    return sample_pair(rng, objects) if draw < 0.97 else Scene(pick(rng, NAMES))


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# A thing's longer side as a share of the picture's shorter one.
LONE_EXTENT: dict[Size, tuple[float, float]] = {"small": (0.23, 0.27), "normal": (0.39, 0.46), "large": (0.60, 0.68)}
PAIR_EXTENT: dict[Size, tuple[float, float]] = {"small": (0.24, 0.26), "normal": (0.34, 0.35), "large": (0.425, 0.45)}
_MARGIN = (0.04, 0.08)  # between a thing at a side and the picture's edge
_WOBBLE = 0.04  # how far a centred thing may lie from the middle
_COLOUR_JITTER = 4.0


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def _snap(x: float, lattice: int, most: float = math.inf) -> int:
    """The multiple of the lattice that is nearest to x and at most `most`."""
    snapped = lattice * round(x / lattice)
    return snapped if snapped <= most else int(most // lattice) * lattice


def _centred(rng: np.random.Generator, room: int, length: int, unit: int) -> float:
    return (room - length) / 2 + _between(rng, (-_WOBBLE, _WOBBLE)) * unit


def _lone_corner(rng: np.random.Generator, side: Side, room: tuple[int, int], box: tuple[int, int]) -> tuple[float, float]:
    """(x, y) of the thing's top left corner; room and box are (width, height)."""
    unit = min(room)
    x, y = (_centred(rng, room[axis], box[axis], unit) for axis in (0, 1))
    margin = _between(rng, _MARGIN) * unit
    match side:
        case "left":
            x = margin
        case "right":
            x = room[0] - box[0] - margin
        case "top":
            y = margin
        case "bottom":
            y = room[1] - box[1] - margin
    return x, y


def _pair_starts(rng: np.random.Generator, room: int, lengths: tuple[int, int]) -> tuple[float, float]:
    """Where two things in a row start; nearly half of the spare room lies between them, so that they never touch."""
    spare = room - sum(lengths)
    start = spare * _between(rng, (0.2, 0.34))
    gap = spare * _between(rng, (0.42, 0.5))
    return start, start + lengths[0] + gap


def _pair_corners(
    rng: np.random.Generator, relation: Relation, room: tuple[int, int], boxes: Sequence[tuple[int, int]]
) -> list[tuple[float, float]]:
    axis = 1 if relation in ("above", "below") else 0
    order = (1, 0) if relation in ("right of", "below") else (0, 1)
    starts = _pair_starts(rng, room[axis], (boxes[order[0]][axis], boxes[order[1]][axis]))
    corners = []
    for place, box in zip((starts[order[0]], starts[order[1]]), boxes, strict=True):
        across = _centred(rng, room[1 - axis], box[1 - axis], min(room))
        corners.append((place, across) if axis == 0 else (across, place))
    return corners


def _paint(name: str, rng: np.random.Generator) -> list[float]:
    """A palette colour, slightly off."""
    return [min(255.0, max(0.0, c + (rng.random() - 0.5) * 2 * _COLOUR_JITTER)) for c in COLOURS[name]]


def _paste(planes: Pixels, thing: Thing, pixels: int, left: int, top: int, rng: np.random.Generator) -> None:
    rgb, alpha = sprite(thing.kind, pixels)
    inks: Sequence[Floats | float] = _paint(thing.colour, rng) if thing.kind in SHAPES and thing.colour else list(rgb)
    for plane, ink in zip(planes, inks, strict=True):
        patch = plane[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        patch[:] = patch + alpha * (ink - patch) + 0.5


def render(scene: Scene, rng: np.random.Generator, width: int = 64, height: int = 64, lattice: int = 1) -> Pixels:
    """The scene's picture, `[height,width,3]`. `rng` moves places, sizes and colours a little.

    lattice: pixels of which a thing's longer side and its left and upper margins are multiples.

    Raises FileNotFoundError for a scene with objects when the emoji font is missing.
    """
    # Colour planes first: NumPy is several times faster on long rows than on rows of three.
    planes = np.empty((3, height, width), dtype=np.uint8)
    for plane, level in zip(planes, _paint(scene.background, rng), strict=True):
        plane.fill(round(level))
    extent = LONE_EXTENT if len(scene.things) == 1 else PAIR_EXTENT
    lengths = [max(lattice, _snap(_between(rng, extent[thing.size]) * min(width, height), lattice)) for thing in scene.things]
    boxes = [sprite(thing.kind, length)[1].shape[::-1] for thing, length in zip(scene.things, lengths, strict=True)]
    if scene.relation is None:
        corners = [_lone_corner(rng, thing.side, (width, height), box) for thing, box in zip(scene.things, boxes, strict=True)]
    else:
        corners = _pair_corners(rng, scene.relation, (width, height), boxes)
    for thing, length, box, (x, y) in zip(scene.things, lengths, boxes, corners, strict=True):
        _paste(planes, thing, length, _snap(x, lattice, width - box[0]), _snap(y, lattice, height - box[1]), rng)
    return np.stack(list(planes), axis=-1)
