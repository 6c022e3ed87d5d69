"""Draw and read PaellaBench's prompts, each with the scene that its image must show.

    python -m model.training.prompts        # writes the files anew, after a change of the kinds

There are three disjoint sets: "tune" to search recipes on, "reward" to learn from, "report" for the
figures that are published. They were drawn once from seeds and lie beside this module, one prompt a
line: [category, text, background, things, relation, width, height, close-up], a thing as [kind,
colour, size, side, count]. No prompt was chosen or reworded after a look at its image. The prompts
of the contact sheet and of the regression gate are here too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from model.training import scene_layout, scene_samplers, scenes
from model.training.caption_words import synonyms, tag_sets
from model.training.captions import COMPLETE, Wording, describe
from model.training.kinds import KINDS, SHAPES
from model.training.palette import NAMES
from model.training.scenery import SCENES
from model.training.scenes import (
    RELATIONS,
    SQUARE,
    TALL,
    WIDE,
    Random,
    Scene,
    Size,
    Thing,
    held_out,
    object_named,
    pick,
    visible_on,
)

SETS: tuple[str, ...] = ("tune", "reward", "report")
_FOLDER = Path(__file__).parent / "prompts"
_GATE = "gate"
_N = 120  # prompts in a category that does not list its prompts


class BenchPrompt(NamedTuple):
    """A prompt and the scene its image must show."""

    text: str
    scene: Scene


# ── drawing them ──────────────────────────────────────────────────────────────────────────────────

_SYNONYMS = replace(COMPLETE, synonyms=1.0)
_TYPOS = replace(COMPLETE, typos=1.0)
_TAGS = replace(COMPLETE, tags=1.0, object_colours=0.0)

_SIZES: tuple[Size, ...] = ("normal", "normal", "large", "small")

# A scene and how to word it; the set's number decides where a list starts.
_Drawn = Iterator[tuple[Scene, Wording]]


def _alone(rng: Random, thing: Thing, background: str) -> Scene:
    size = pick(rng, _SIZES)
    return Scene(background, (replace(thing, size=size),))


def _single_object(rng: Random, number: int) -> _Drawn:
    """Yield every object, in each set before another background."""
    for kind in KINDS:
        choices = list(scenes.backgrounds(kind.name, kind.colour))
        random.Random(kind.name).shuffle(choices)
        yield _alone(rng, object_named(kind.name), choices[number % len(choices)]), COMPLETE


def _squared(scene: Scene) -> Scene:
    """Return the scene as a square image.

    Its thing stands in the middle if a square image has no room for it on its side.
    """
    square = replace(scene, aspect=SQUARE)
    if len(scene.things) != 1 or scene.things[0].side == "centre":
        return square
    thing = scene.things[0]
    if thing.side in scene_layout.sides_for(thing.kind, thing.size, SQUARE, scene.background):
        return square
    return replace(square, things=(replace(thing, side="centre"),))


def _shape_colour(rng: Random, number: int) -> _Drawn:
    """Yield every shape in every colour that training shows it in."""
    for shape in SHAPES:
        for colour in scene_samplers.shape_colours(shape):
            yield _squared(scene_samplers.lone(rng, Thing(shape, colour), 0.0)), COMPLETE


def _square(sampler: Callable[[Random], Scene]) -> Callable[[Random, int], _Drawn]:
    def drawn(rng: Random, number: int) -> _Drawn:
        while True:
            yield _squared(sampler(rng)), COMPLETE

    return drawn


def _counting(rng: Random, number: int) -> _Drawn:
    """Yield two, three and four of the same in turn."""
    for turn in range(1_000_000):
        scene = replace(scene_samplers.sample_count(rng), aspect=SQUARE)
        yield replace(scene, things=(replace(scene.things[0], count=2 + turn % 3),)), COMPLETE


def _position(rng: Random, number: int) -> _Drawn:
    """Yield things at a side, and as often two things with a relation such as "left of"."""
    while True:
        scene = _squared(scene_samplers.sample_object(rng))
        if scene.things[0].side != "centre":
            yield scene, COMPLETE
            pair = replace(scene_samplers.sample_pair(rng), aspect=SQUARE)
            yield replace(pair, relation=pick(rng, RELATIONS[1:])), COMPLETE


def _background_scene(rng: Random, number: int) -> _Drawn:
    """Yield objects before every painted scene in turn."""
    for turn in range(1_000_000):
        kind = pick(rng, KINDS)
        background = SCENES[turn % len(SCENES)]
        if background in scenes.backgrounds(kind.name, kind.colour):
            yield _alone(rng, object_named(kind.name), background), COMPLETE


def _synonyms_misspellings(rng: Random, number: int) -> _Drawn:
    """Yield synonyms, and as often the usual name misspelt."""
    with_synonyms = [kind.name for kind in KINDS if synonyms(kind.name)]
    long = [kind.name for kind in KINDS if max(map(len, kind.name.split())) >= 6]
    while True:
        for names, wording in ((with_synonyms, _SYNONYMS), (long, _TYPOS)):
            thing = object_named(pick(rng, names))
            yield _alone(rng, thing, _plain(rng, thing)), wording


def _descriptions(rng: Random, number: int) -> _Drawn:
    """Yield objects described by their tags, without their noun."""
    names = tuple(tag_sets())
    while True:
        thing = object_named(pick(rng, names))
        yield Scene(_plain(rng, thing), (thing,)), _TAGS


def _plain(rng: Random, thing: Thing) -> str:
    seen = scenes.backgrounds(thing.kind, thing.colour)
    return pick(rng, [name for name in seen if name in NAMES] or seen)


def _combinations(rng: Random, unseen: bool) -> _Drawn:
    """Yield objects before backgrounds, shapes in colours and pairs of objects.

    unseen: combinations that training never shows.
    """
    coloured = [(s, c) for s in SHAPES for c in NAMES if held_out(s, c) == unseen]
    while True:
        for options in (SCENES, NAMES, SCENES):
            yield _before(rng, options, unseen), COMPLETE
        shape, colour = pick(rng, coloured)
        yield _squared(scene_samplers.lone(rng, Thing(shape, colour), 0.0)), COMPLETE
        for _ in range(2):
            yield _both(rng, unseen), COMPLETE


def _before(rng: Random, options: tuple[str, ...], unseen: bool) -> Scene:
    while True:
        kind, background = pick(rng, KINDS), pick(rng, options)
        seen = background in visible_on(kind.name, kind.colour)
        if seen and held_out(kind.name, background) == unseen:
            return _alone(rng, object_named(kind.name), background)


def _both(rng: Random, unseen: bool) -> Scene:
    while True:
        first, second = (object_named(pick(rng, KINDS).name) for _ in range(2))
        if first.kind == second.kind or held_out(first.kind, second.kind) != unseen:
            continue
        both = set(scenes.backgrounds(first.kind, first.colour))
        plain = [n for n in scenes.backgrounds(second.kind, second.colour) if n in both & {*NAMES}]
        if plain:
            return Scene(pick(rng, plain), (first, second), pick(rng, RELATIONS))


def _three_two(rng: Random, number: int) -> _Drawn:
    """Yield wide and tall images: one object, one object, two things, two to four of the same."""
    for turn in range(1_000_000):
        samplers = (
            scene_samplers.sample_object,
            scene_samplers.sample_object,
            scene_samplers.sample_pair,
        )
        sampler = (*samplers, scene_samplers.sample_count)[turn // 2 % 4]
        yield replace(sampler(rng), aspect=(WIDE, TALL)[turn % 2]), COMPLETE


CATEGORIES: dict[str, Callable[[Random, int], _Drawn]] = {
    "single_object": _single_object,
    "shape_colour": _shape_colour,
    "two_objects": _square(scene_samplers.sample_pair),
    "counting": _counting,
    "position": _position,
    "colour_attribution": _square(scene_samplers.sample_attribution),
    "background_scene": _background_scene,
    "synonyms_misspellings": _synonyms_misspellings,
    "descriptions": _descriptions,
    "unseen_combinations": lambda rng, _: _combinations(rng, unseen=True),
    "close_up": _square(scene_samplers.sample_close_up),
    "three_two": _three_two,
}
# As unseen_combinations, but of pairs that training shows: to compare with, not in the mean.
CONTROL = "seen_combinations"
_LISTED = ("single_object", "shape_colour")  # categories that list their prompts
_DRAWN: dict[str, Callable[[Random, int], _Drawn]] = {
    **CATEGORIES,
    CONTROL: lambda rng, _: _combinations(rng, unseen=False),
}
# The number of prompts of a category in the regression gate.
_GATE_COUNTS = {"single_object": 10, "shape_colour": 3, "two_objects": 3}
_GATE_OTHERS = ("counting", "position", "colour_attribution", "background_scene")
_GATE_MORE = ("synonyms_misspellings", "close_up", "three_two")


def _worded(rng: Random, scene: Scene, wording: Wording, taken: set[str]) -> BenchPrompt | None:
    """Return the scene in words that no other prompt has, None if no attempt found any."""
    for _ in range(20):
        text = describe(scene, rng, wording=wording).text
        if wording is _TYPOS and scene.things[0].kind in text.lower():
            continue
        if (key := text.lower().rstrip(".")) not in taken:
            taken.add(key)
            return BenchPrompt(text, scene)
    return None


def _draw(name: str, number: int, n: int | None, taken: set[str]) -> list[BenchPrompt]:
    rng = random.Random(f"PaellaBench/{number}/{name}")
    prompts: list[BenchPrompt] = []
    for scene, wording in _DRAWN[name](rng, number):
        if prompt := _worded(rng, scene, wording, taken):
            prompts.append(prompt)
        if n is not None and len(prompts) == n:
            break
    return prompts


def draw_all() -> dict[str, list[tuple[str, BenchPrompt]]]:
    """Return all sets and the gate as (category, prompt), drawn anew from their seeds."""
    taken = {text.lower() for text in CONTACT_SHEET}
    files: dict[str, list[tuple[str, BenchPrompt]]] = {}
    for number, name in enumerate(SETS):
        files[name] = [
            (category, prompt)
            for category in _DRAWN
            for prompt in _draw(category, number, None if category in _LISTED else _N, taken)
        ]
    counts = {**_GATE_COUNTS, **dict.fromkeys((*_GATE_OTHERS, *_GATE_MORE), 2)}
    files[_GATE] = []
    for category, count in counts.items():
        drawn = _draw(category, len(SETS), 4 * count if category not in _LISTED else None, taken)
        chosen = random.Random(category).sample(drawn, count)
        files[_GATE] += [(category, prompt) for prompt in chosen]
    return files


# ── the files ─────────────────────────────────────────────────────────────────────────────────────


def _row(category: str, prompt: BenchPrompt) -> str:
    scene = prompt.scene
    things = [[t.kind, t.colour, t.size, t.side, t.count] for t in scene.things]
    row = [category, prompt.text, scene.background, things, scene.relation, *scene.aspect]
    return json.dumps([*row, scene.close_up], ensure_ascii=False, separators=(",", ":"))


def _parsed(line: str) -> tuple[str, BenchPrompt]:
    row: list[Any] = json.loads(line)
    category, text, background, things, relation, width, height, close_up = row
    scene = Scene(
        background, tuple(Thing(*thing) for thing in things), relation, (width, height), close_up
    )
    return category, BenchPrompt(text, scene)


@cache
def _read(name: str) -> tuple[tuple[str, BenchPrompt], ...]:
    lines = (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(_parsed(line) for line in lines)


def write() -> None:
    """Write the prompts' files anew."""
    _FOLDER.mkdir(exist_ok=True)
    for name, prompts in draw_all().items():
        lines = "".join(_row(category, prompt) + "\n" for category, prompt in prompts)
        (_FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    _read.cache_clear()


def bench(set_name: str) -> dict[str, list[BenchPrompt]]:
    """Return PaellaBench's prompts of one of SETS by category. Raises KeyError for another set."""
    if set_name not in SETS:
        raise KeyError(f"no set {set_name!r} among {', '.join(SETS)}")
    found: dict[str, list[BenchPrompt]] = {category: [] for category in CATEGORIES}
    for category, prompt in _read(set_name):
        if category in found:
            found[category].append(prompt)
    return found


def seen_combinations(set_name: str) -> list[BenchPrompt]:
    """Return prompts like those of unseen_combinations, but of pairs that training shows."""
    return [prompt for category, prompt in _read(set_name) if category == CONTROL]


def regression_gate() -> list[BenchPrompt]:
    """Return the 30 prompts by which `make test` notices a broken bundle."""
    return [prompt for _, prompt in _read(_GATE)]


# Written down before any image was drawn.
CONTACT_SHEET: tuple[str, ...] = (
    "a red apple on a white background",
    "a zebra on a green background",
    "a sailboat on the sea",
    "three bananas on a blue background",
    "a rocket in space",
    "a red star and a blue heart on white",
    "a camel in the desert",
    "a big sunflower, purple background",
    "an owl at night",
    "a cat to the left of a dog on a yellow background",
    "a snowman in the snow",
    "a close-up of a lion",
    "a helicopter in the sky",
    "a tiny ladybug on a white background",
    "an octopus under water",
    "a green triangle above a yellow circle on black",
    "a castle at sunset",
    "two penguins, cyan background",
    "a guitar on an orange background",
    "a fox in the forest",
    "a slice of pizza on a gray background",
    "a large purple ring on yellow",
    "a palm tree on the beach",
    "a police car in the city",
    "four strawberries on a white background",
    "a butterfly at the top, pink background",
    "a couch in a room",
    "a teapot to the right of a cupcake on green",
    "A DRAGON IN THE MOUNTAINS",
    "a cow in a meadow",
    "a white crescent on a blue background",
    "a violin, a drum and a trumpet on white",
    "a T-Rex on a pink background",
    "a doughnut on a cyan background",
    "an elefant on a red background",
    "a turtle on the grass",
    "a small bicycle at the bottom, white background",
    "a fire truck on a white background",
    "a diamond ring on a black background",
    "a cactus in the desert",
    "a mushroom below a snail on a brown background",
    "a robot on a blue background",
    "a koala",
    "a rose on a black background",
    "a flamingo by the sea",
    "a shark in the ocean",
    "headphones on a yellow background",
    "a plain blue background",
)


if __name__ == "__main__":
    write()
