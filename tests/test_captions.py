"""Captions: they say what the picture shows, in many ways, and the classes repeat what they say."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from model.training import captions
from model.training.caption_words import SCENE_WORDS, SIZE_WORDS, misspell, names_of, tag_sets
from model.training.captions import ATTRIBUTES, LONGEST, PLACES, THING_ATTRIBUTES, USUAL, describe
from model.training.kinds import KINDS, NUMBERS, SHAPES
from model.training.palette import NAMES
from model.training.scene_samplers import sample
from model.training.scenery import BACKGROUNDS, SCENES
from model.training.scenes import RELATION_SIDES, RELATIONS, SIDES, Scene, Thing

pytestmark = pytest.mark.training

COLOUR_WORDS = {"grey": "gray", "violet": "purple", "turquoise": "cyan"} | {n: n for n in NAMES}
CORRECT = replace(USUAL, typos=0.0, tags=0.0)
# Kinds whose names hold no colour, before plain backgrounds: every colour word means a colour.
PLAIN_SCENES = [
    Scene("blue", (Thing("heart", "red", "small", "left"),)),
    Scene("white", (Thing("circle", "orange"),)),
    Scene("black", (Thing("key", "yellow", "large", "top left"),)),
    Scene("gray", (Thing("star", "cyan"), Thing("ring", "purple", "small")), "left of"),
    Scene("green", (Thing("square", "pink", "large"), Thing("zebra", None)), "below"),
    Scene("green", (Thing("square", "pink"), Thing("zebra", None), Thing("moose", "brown"))),
    Scene("yellow", (Thing("square", "pink", count=3),)),
    Scene("orange"),
]
PAINTED = [Scene(name, (Thing("zebra", None),)) for name in SCENES] + [Scene(n) for n in SCENES]


def colours_in(text: str) -> list[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return [COLOUR_WORDS[word] for word in words if word in COLOUR_WORDS]


def colours_stated(stated: dict[str, int]) -> list[str]:
    names = ("background", *(f"colour_{place}" for place in PLACES))
    return [NAMES[stated[name] - 1] for name in names if stated[name]]


@pytest.mark.parametrize("scene", PLAIN_SCENES)
def test_attributes_repeat_the_colours_and_sizes_of_the_caption(scene):
    rng = random.Random(0)
    for _ in range(300):
        text, stated, *_ = describe(scene, rng, wording=CORRECT)
        assert sorted(colours_in(text)) == sorted(colours_stated(stated)), text
        for size, words in SIZE_WORDS.items():
            said = len(re.findall(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE))
            number = 1 + captions.SIZES.index(size)
            assert said == sum(stated[f"size_{place}"] == number for place in PLACES)


def test_captions_state_nothing_the_scene_does_not_show():
    rng = random.Random(1)
    for _ in range(5000):
        scene = sample(rng)
        stated = describe(scene, rng).stated
        assert stated.keys() == ATTRIBUTES.keys()
        assert stated["background"] in (0, 1 + BACKGROUNDS.index(scene.background))
        assert stated["relation"] == (1 + RELATIONS.index(scene.relation) if scene.relation else 0)
        assert stated["view"] <= scene.close_up
        for place in PLACES:
            thing = scene.things[place - 1] if place <= len(scene.things) else None
            assert stated[f"kind_{place}"] == (1 + NUMBERS[thing.kind] if thing else 0)
            assert stated[f"count_{place}"] == (thing.count if thing else 0)
            colours = {0, 1 + NAMES.index(thing.colour)} if thing and thing.colour else {0}
            assert stated[f"colour_{place}"] in colours


def test_sizes_and_sides_that_matter_are_never_left_out():
    rng = random.Random(2)
    for _ in range(300):
        stated = describe(PLAIN_SCENES[0], rng).stated
        assert stated["size_1"] == 1 + captions.SIZES.index("small")
        assert stated["side_1"] == 1 + SIDES.index("left")


def test_a_caption_without_a_background_means_white_most_of_the_time():
    rng = random.Random(3)
    drawn = [sample(rng) for _ in range(20_000)]
    silent = [s for s in drawn if not describe(s, rng).stated["background"]]
    assert len(silent) / len(drawn) == pytest.approx(0.15, abs=0.02)
    default = [captions.default_background(scene) == scene.background for scene in silent]
    assert sum(default) / len(silent) == pytest.approx(0.65, abs=0.05)


def test_complete_captions_leave_nothing_open():
    rng = random.Random(4)
    for _ in range(3000):
        scene = sample(rng)
        caption = describe(scene, rng, complete=True)
        assert caption.stated["background"]
        assert caption.stated["view"] == scene.close_up
        for place, thing in enumerate(scene.things, start=1):
            assert caption.stated[f"colour_{place}"] or thing.kind not in SHAPES
            name = names_of(thing.kind).plural if thing.count > 1 else thing.kind
            assert name in caption.text.lower()


def test_wording_varies():
    rng = random.Random(5)
    assert len({captions.caption(PLAIN_SCENES[0], rng) for _ in range(500)}) > 300


@pytest.mark.parametrize("scene", [*PLAIN_SCENES, *PAINTED])
def test_articles_fit_and_spaces_are_single(scene):
    rng = random.Random(6)
    for _ in range(200):
        text = describe(scene, rng, wording=CORRECT).text.lower()
        assert not re.search(r"\ba [aeio]", text), text
        assert not re.search(r"\ban [^aeiou]", text), text
        assert text == re.sub(r"\s+", " ", text).strip()


def test_pair_captions_put_each_thing_on_its_side():
    rng = random.Random(7)
    scene = Scene("white", (Thing("star", "red"), Thing("ring", "blue")), "right of")
    sided = [s for s in (describe(scene, rng).stated for _ in range(300)) if s["side_1"]]
    assert sided
    for stated in sided:
        assert SIDES[stated["side_1"] - 1] == "right"
        assert SIDES[stated["side_2"] - 1] == "left"


@pytest.mark.parametrize("scene", PLAIN_SCENES)
def test_spans_hold_what_is_said_of_each_thing_and_nothing_else(scene):
    rng = random.Random(8)
    for _ in range(300):
        caption = describe(scene, rng, wording=CORRECT)
        assert len(caption.spans) == len(caption.things) == len(scene.things)
        for place, (span, classes) in enumerate(
            zip(caption.spans, caption.things, strict=True), start=1
        ):
            assert classes.keys() == THING_ATTRIBUTES.keys()
            said = caption.text[span.start : span.stop]
            assert colours_in(said) == ([NAMES[classes["colour"] - 1]] if classes["colour"] else [])
            for name in ("kind", "colour", "size", "count"):
                assert classes[name] == caption.stated[f"{name}_{place}"]


@pytest.mark.parametrize(("relation", "sides"), RELATION_SIDES.items())
def test_the_side_of_each_of_two_things_is_known_even_where_only_their_relation_is_said(
    relation, sides
):
    scene = Scene("white", (Thing("star", "red"), Thing("ring", "blue")), relation)
    rng = random.Random(9)
    for _ in range(50):
        things = describe(scene, rng).things
        assert tuple(SIDES[thing["side"] - 1] for thing in things) == sides


def test_captions_are_short_nearly_always():
    rng = random.Random(10)
    lengths = [len(describe(sample(rng), rng).text.encode()) for _ in range(10_000)]
    assert sum(length >= LONGEST for length in lengths) < 20


def test_misspelt_words_are_near_the_right_one_and_no_other_name():
    rng = random.Random(11)
    for kind in KINDS:
        wrong = misspell(kind.name, rng)
        assert abs(len(wrong) - len(kind.name)) <= 1
        assert wrong[0] == kind.name[0]
        assert wrong == kind.name or wrong not in NUMBERS
    assert misspell("key", rng) == "key"
    assert len({misspell("elephant", rng) for _ in range(100)}) > 10


def test_descriptions_point_to_one_kind_without_its_noun():
    sets = tag_sets()
    assert len(sets) > 300
    for kind in KINDS:
        for tags in sets.get(kind.name, ()):
            others = [k for k in KINDS if k is not kind and set(tags) <= set(k.tags)]
            assert not others
            assert kind.name not in tags
    rng = random.Random(12)
    scene = Scene("white", (Thing("zebra", None),))
    caption = describe(scene, rng, wording=replace(USUAL, tags=1.0))
    assert "stripe" in caption.text.lower()
    assert "zebra" not in caption.text.lower()
    assert caption.stated["kind_1"] == 1 + NUMBERS["zebra"]


def test_counts_are_said_with_plurals():
    rng = random.Random(13)
    scene = Scene("white", (Thing("knife", None, count=3),))
    texts = [describe(scene, rng, wording=CORRECT).text.lower() for _ in range(100)]
    assert all("knives" in text for text in texts)
    assert all(re.search(r"\b(three|3) ", text) for text in texts)


def test_uncountable_names_have_no_article():
    rng = random.Random(14)
    scene = Scene("white", (Thing("scissors", None),))
    for _ in range(200):
        text = describe(scene, rng, wording=CORRECT).text.lower()
        assert not re.search(r"\ban? (gray |grey )?scissors", text)


@pytest.mark.parametrize("scene", PAINTED)
def test_every_painted_scene_has_words_of_its_own(scene):
    assert scene.background in SCENE_WORDS
    rng = random.Random(15)
    assert len({describe(scene, rng, complete=True).text.lower() for _ in range(50)}) > 5


def test_no_words_mean_two_painted_scenes():
    seen: dict[str, str] = {}
    for name, words in SCENE_WORDS.items():
        for phrase in {*words.phrases, *words.nouns, *words.bare}:
            assert seen.setdefault(phrase, name) == name
