"""Word scenes as captions, and record what each caption states.

`describe` words a scene in one of many ways: articles or none, synonyms, plurals, word order,
typing errors, "a photo of", upper case, a description instead of the noun. Sizes other than normal
and sides other than the centre are always stated, so that a caption without them means a normal,
centred thing; a caption without a background means mostly white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from model.training.caption_words import (
    CLOSE_UP_AFTER,
    CLOSE_UP_BEFORE,
    COMMAS,
    FILLERS,
    MEDIA,
    NUMBER_WORDS,
    PAINTED_EMPTY,
    PLAIN,
    RELATION_WORDS,
    SIDE_WORDS,
    SIZE_WORDS,
    TAGGED,
    colour_word,
    misspell,
    names_of,
    scene_words,
    tag_sets,
)
from model.training.kinds import NAMES_OF_KINDS, NUMBERS, SHAPES
from model.training.palette import NAMES
from model.training.scenery import BACKGROUNDS
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
    pick,
)
from model.vocabulary import with_article

SIZES = ("small", "large")
PLACES = (1, 2, 3)  # of the things in a caption, in the order of Scene.things

# The attributes that a caption states of a thing; class 0: none (or there is no such thing).
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

# ── wordings ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Wording:
    """The probabilities of all variations of a caption, as people are supposed to write.

    background: of naming it where it is not the default; default_background: where it is. synonyms,
    typos: per thing. tags: of a description instead of the noun, where tags point to one kind.
    """

    background: float = 0.93
    default_background: float = 0.37
    articles: float = 0.7
    shape_colours: float = 0.97
    object_colours: float = 0.3
    synonyms: float = 0.35
    typos: float = 0.08
    tags: float = 0.2
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


def _tagged(tags: tuple[str, ...], rng: Random) -> str:
    order = list(tags)
    if chance(rng, 0.5):
        order.reverse()
    joined = ", ".join(order[:-1]) + (" and " if chance(rng, 0.6) else ", ") + order[-1]
    return pick(rng, TAGGED).format(joined)


def _thing(
    thing: Thing, place: int, article: bool, wording: Wording, rng: Random, stated: Attributes
) -> str:
    """Return a thing in words, such as "a small red heart"; a size other than normal is said."""
    names = names_of(thing.kind)
    stated[f"kind_{place}"] = 1 + NUMBERS[thing.kind]
    stated[f"count_{place}"] = thing.count
    lone = thing.size == "normal" and thing.count == 1 and place == 1
    if (
        wording.tags
        and lone
        and chance(rng, wording.tags)
        and (sets := tag_sets().get(names.usual))
    ):
        return _tagged(pick(rng, sets), rng)
    words = pick(rng, FILLERS) if chance(rng, wording.fillers) else ""
    if thing.size != "normal":
        words += pick(rng, SIZE_WORDS[thing.size]) + " "
        stated[f"size_{place}"] = _SIZE_NUMBERS[thing.size]
    noun = names.usual
    if names.synonyms and chance(rng, wording.synonyms):
        noun = pick(rng, names.synonyms)
    if thing.count > 1:
        noun = names.plural
    if thing.colour:
        shape = thing.kind in SHAPES
        said = chance(rng, wording.shape_colours if shape else wording.object_colours)
        if said and (shape or thing.colour not in noun):
            words += colour_word(thing.colour, rng) + " "
            stated[f"colour_{place}"] = _COLOUR_NUMBERS[thing.colour]
    words += misspell(noun, rng) if chance(rng, wording.typos) else noun
    if thing.count > 1:
        return f"{pick(rng, NUMBER_WORDS[thing.count])} {words}"
    return with_article(words) if article and noun not in names.bare else words


def _side(side: Side, place: int, rng: Random, stated: Attributes) -> str:
    stated[f"side_{place}"] = _SIDE_NUMBERS[side]
    return pick(rng, SIDE_WORDS[side])


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
        between = f" {pick(rng, RELATION_WORDS[scene.relation])} "
        return [(phrases[0], 1), (between, 0), (phrases[1], 2)]
    if chance(rng, 0.15):
        return _sided(phrases, THREE_SIDES, rng, stated)
    last = pick(rng, (" and ", " and ", ", and ", ", "))
    return [(phrases[0], 1), (", ", 0), (phrases[1], 2), (last, 0), (phrases[2], 3)]


def _on_plain(background: str, rng: Random) -> tuple[str, str]:
    """Return the words before and behind the subject that name a plain background."""
    whole = f"{background} background"
    if chance(rng, 0.75):
        whole = with_article(whole)
    before = after = ""
    match int(rng.random() * 10):
        case 0 | 1 | 2 | 3:
            after = f" on {whole}"
        case 4:
            after = f" on {background}"
        case 5:
            after = f"{pick(rng, COMMAS)}{background} background"
        case 6:
            after = f" with {whole}"
        case 7:
            after = f", the background is {background}"
        case 8:
            before = f"{background} background, "
        case _:
            after = f" in front of {whole}"
    return before, after


def _in_scene(background: str, rng: Random) -> tuple[str, str]:
    """Return the words before and behind the subject that name a painted scene."""
    words = scene_words(background)
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
        return pick(rng, PLAIN).format(colour_word(scene.background, rng))
    return pick(rng, PAINTED_EMPTY).format(pick(rng, scene_words(scene.background).nouns))


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
    words, as a prompt must whose image is to be judged. wording: other probabilities.
    """
    wording = wording or (COMPLETE if complete else USUAL)
    stated = dict.fromkeys(ATTRIBUTES, 0)
    if not scene.things:
        stated["background"] = 1 + BACKGROUND_NUMBERS[scene.background]
        return Caption(_finish(_empty(scene, rng), wording, rng), stated, (), ())
    article = chance(rng, wording.articles)
    media = pick(rng, MEDIA) if chance(rng, wording.media) else ""
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
            before, after = _on_plain(colour_word(scene.background, rng), rng)
        else:
            before, after = _in_scene(scene.background, rng)
    if scene.close_up and chance(rng, wording.close_ups):
        stated["view"] = 1
        if chance(rng, 0.7):
            before += pick(rng, CLOSE_UP_BEFORE)
        else:
            closing = pick(rng, CLOSE_UP_AFTER)
    else:
        before += media
    text, spans = _joined(before, parts)
    text = _finish(text + closing + after, wording, rng)
    return Caption(text, stated, spans, _by_thing(scene, stated))


def caption(scene: Scene, rng: Random) -> str:
    """Return a caption alone."""
    return describe(scene, rng).text
