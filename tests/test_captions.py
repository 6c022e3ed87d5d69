"""Captions: they say what the picture shows, in many ways, and the attribute classes repeat exactly what they say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from model.training import captions
from model.training.captions import ATTRIBUTES, batch, caption, describe
from model.training.palette import NAMES
from model.training.prompts import CONTACT_SHEET, evaluation_prompts, first_hundred
from model.training.scenes import KINDS, OBJECTS, RELATIONS, SHAPES, SIDES, Scene, Thing, sample
from tests.test_scenes import needs_font

COLOUR_WORDS = {"grey": "gray", "violet": "purple", "turquoise": "cyan", **{name: name for name in NAMES}}
SCENES = [
    Scene("blue", (Thing("heart", "red", "small", "left"),)),
    Scene("white", (Thing("circle", "orange"),)),
    Scene("black", (Thing("apple", "red", "large", "top"),)),
    Scene("gray", (Thing("star", "cyan"), Thing("ring", "purple", "small")), "left of"),
    Scene("green", (Thing("square", "pink", "large"), Thing("cat", None)), "below"),
    Scene("orange"),
]


def colours_in(text: str) -> list[str]:
    return [COLOUR_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in COLOUR_WORDS]


def colours_stated(stated: dict[str, int]) -> list[str]:
    return [NAMES[stated[name] - 1] for name in ("background", "colour_1", "colour_2") if stated[name]]


@pytest.mark.parametrize("scene", SCENES)
def test_attributes_repeat_the_colours_and_sizes_of_the_caption(scene):
    rng = np.random.default_rng(0)
    for _ in range(300):
        text, stated, *_ = describe(scene, rng)
        assert sorted(colours_in(text)) == sorted(colours_stated(stated))
        for size, words in captions._SIZE_WORDS.items():
            said = len(re.findall(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE))
            assert said == sum(stated[f"size_{place}"] == 1 + captions.SIZES.index(size) for place in (1, 2))


@pytest.mark.parametrize("scene", SCENES)
def test_captions_state_nothing_the_scene_does_not_show(scene):
    rng = np.random.default_rng(1)
    for _ in range(300):
        stated = describe(scene, rng).stated
        assert stated["background"] in (0, 1 + NAMES.index(scene.background))
        assert stated["relation"] == (1 + RELATIONS.index(scene.relation) if scene.relation else 0)
        for place in (1, 2):
            thing = scene.things[place - 1] if place <= len(scene.things) else None
            assert stated[f"kind_{place}"] == (1 + KINDS.index(thing.kind) if thing else 0)
            assert stated[f"colour_{place}"] in ({0, 1 + NAMES.index(thing.colour)} if thing and thing.colour else {0})


def test_sizes_and_sides_that_matter_are_never_left_out():
    rng = np.random.default_rng(2)
    for _ in range(300):
        stated = describe(SCENES[0], rng).stated
        assert stated["size_1"] == 1 + captions.SIZES.index("small")
        assert stated["side_1"] == 1 + SIDES.index("left")


def test_the_background_is_left_out_now_and_then_but_never_when_complete():
    rng = np.random.default_rng(3)
    silent = sum(describe(SCENES[0], rng).stated["background"] == 0 for _ in range(2000)) / 2000
    assert 0.12 < silent < 0.18
    complete = [describe(SCENES[0], rng, complete=True).stated for _ in range(500)]
    assert all(stated["background"] and stated["colour_1"] for stated in complete)


def test_wording_varies():
    rng = np.random.default_rng(4)
    assert len({caption(SCENES[0], rng) for _ in range(500)}) > 300


@pytest.mark.parametrize("scene", SCENES)
def test_articles_fit_and_spaces_are_single(scene):
    rng = np.random.default_rng(5)
    for text in (caption(scene, rng).lower() for _ in range(300)):
        assert not re.search(r"\ba [aeio]", text)
        assert not re.search(r"\ban [^aeiou]", text)
        assert text == re.sub(r"\s+", " ", text).strip()


def test_pair_captions_put_each_thing_on_its_side():
    rng = np.random.default_rng(6)
    scene = Scene("white", (Thing("star", "red"), Thing("ring", "blue")), "right of")
    sided = [stated for stated in (describe(scene, rng).stated for _ in range(300)) if stated["side_1"]]
    assert sided
    assert all(SIDES[stated["side_1"] - 1] == "right" and SIDES[stated["side_2"] - 1] == "left" for stated in sided)


@pytest.mark.parametrize("scene", SCENES)
def test_spans_hold_what_is_said_of_each_thing_and_nothing_else(scene):
    rng = np.random.default_rng(8)
    for _ in range(300):
        caption = describe(scene, rng)
        assert len(caption.spans) == len(caption.things) == len(scene.things)
        for place, (span, classes) in enumerate(zip(caption.spans, caption.things, strict=True), start=1):
            said = caption.text[span.start : span.stop]
            assert colours_in(said) == ([NAMES[classes["colour"] - 1]] if classes["colour"] else [])
            assert all(classes[name] == caption.stated[f"{name}_{place}"] for name in ("kind", "colour", "size"))


@pytest.mark.parametrize(("relation", "sides"), captions._RELATION_SIDES.items())
def test_the_side_of_each_of_two_things_is_known_even_where_only_their_relation_is_said(relation, sides):
    scene = Scene("white", (Thing("star", "red"), Thing("ring", "blue")), relation)
    rng = np.random.default_rng(9)
    for _ in range(50):
        assert tuple(SIDES[thing["side"] - 1] for thing in describe(scene, rng).things) == sides


@needs_font
def test_a_batch_is_aligned_and_its_classes_in_range():
    images, texts, attributes = batch(np.random.default_rng(7), 200, 96, 64, objects=len(OBJECTS))
    assert images.shape == (200, 64, 96, 3)
    assert images.dtype == np.uint8
    assert len(texts) == 200
    assert attributes.keys() == ATTRIBUTES.keys()
    for name, classes in attributes.items():
        assert classes.shape == (200,)
        assert 0 <= classes.min() <= classes.max() < ATTRIBUTES[name]
    for text, background in zip(texts, attributes["background"], strict=True):
        assert background == 0 or NAMES[background - 1] in colours_in(text)


@needs_font
def test_captions_fit_the_byte_encoder_of_small_bundles():
    rng = np.random.default_rng(8)
    assert max(len(caption(sample(rng, len(OBJECTS)), rng).encode()) for _ in range(5000)) < 160


@needs_font
def test_evaluation_prompts_are_fixed_complete_and_split_as_promised():
    prompts = evaluation_prompts()
    assert prompts == evaluation_prompts()
    singles = [scene.things[0].kind in SHAPES for _, scene in prompts if len(scene.things) == 1]
    assert (len(prompts), singles.count(True), singles.count(False)) == (240, 120, 60)
    for prompt, scene in prompts:
        assert {scene.background, *(t.colour for t in scene.things if t.kind in SHAPES)} <= set(colours_in(prompt))
    assert len(first_hundred()) == 100
    assert all(entry in prompts[:180] for entry in first_hundred())


def test_the_contact_sheet_starts_with_the_apple_and_has_no_doubles():
    assert CONTACT_SHEET[0] == "a red apple on a white background"
    assert len(set(CONTACT_SHEET)) == len(CONTACT_SHEET) == 32
