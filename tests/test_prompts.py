"""PaellaBench: enough prompts, disjoint sets, each of which says all of its scene."""

from __future__ import annotations

import re

import pytest

from model.training import prompts
from model.training.kinds import KINDS, NUMBERS, SHAPES
from model.training.palette import NAMES
from model.training.prompts import CATEGORIES, CONTACT_SHEET, SETS, BenchPrompt, bench
from model.training.scenery import BACKGROUNDS, SCENES
from model.training.scenes import ASPECTS, SIDES, SQUARE, held_out, visible_on

ALL = [(name, category, p) for name in SETS for category, ps in bench(name).items() for p in ps]


@pytest.mark.parametrize("name", SETS)
def test_every_category_has_a_hundred_prompts(name):
    found = bench(name)
    assert found.keys() == CATEGORIES.keys()
    assert all(len(category) >= 100 for category in found.values())
    singles = [prompt.scene.things[0].kind for prompt in found["single_object"]]
    assert sorted(singles) == sorted(kind.name for kind in KINDS)
    assert len(prompts.seen_combinations(name)) >= 100


def test_no_prompt_comes_twice():
    texts = [p.text.lower().rstrip(".") for _, _, p in ALL]
    texts += [p.text.lower().rstrip(".") for p in prompts.regression_gate()]
    texts += [p.text.lower().rstrip(".") for n in SETS for p in prompts.seen_combinations(n)]
    assert len(set(texts)) == len(texts)
    assert not {text.lower() for text in CONTACT_SHEET} & set(texts)


def test_scenes_are_well_formed_and_can_be_seen():
    for _, _, prompt in ALL:
        scene = prompt.scene
        assert scene.background in BACKGROUNDS
        assert scene.aspect in ASPECTS
        for thing in scene.things:
            assert thing.kind in NUMBERS
            assert thing.side in SIDES
            assert scene.background in visible_on(thing.kind, thing.colour)
            assert thing.colour in NAMES or thing.kind not in SHAPES


def in_category(category: str) -> list[BenchPrompt]:
    return [prompt for _, name, prompt in ALL if name == category]


def test_categories_are_what_they_are_called():
    assert all(p.scene.aspect != SQUARE for p in in_category("three_two"))
    assert all(p.scene.close_up for p in in_category("close_up"))
    assert all(p.scene.background in SCENES for p in in_category("background_scene"))
    assert all(len(p.scene.things) == 2 for p in in_category("two_objects"))
    assert {p.scene.things[0].count for p in in_category("counting")} == {2, 3, 4}
    for prompt in in_category("colour_attribution"):
        first, second = prompt.scene.things
        assert first.colour != second.colour
        assert {first.kind, second.kind} <= {*SHAPES}
    for prompt in in_category("position"):
        assert prompt.scene.relation or prompt.scene.things[0].side != "centre"
    for prompt in in_category("descriptions"):
        assert not re.search(rf"\b{prompt.scene.things[0].kind}\b", prompt.text.lower())


@pytest.mark.parametrize("name", SETS)
def test_unseen_combinations_are_held_out_and_seen_ones_are_not(name):
    def pairs(prompt: BenchPrompt) -> list[tuple[str, str]]:
        scene = prompt.scene
        if len(scene.things) == 2:
            return [(scene.things[0].kind, scene.things[1].kind)]
        thing = scene.things[0]
        return [(thing.kind, thing.colour or "" if thing.kind in SHAPES else scene.background)]

    assert all(held_out(*pair) for p in bench(name)["unseen_combinations"] for pair in pairs(p))
    assert not any(held_out(*pair) for p in prompts.seen_combinations(name) for pair in pairs(p))


def test_the_files_are_what_their_seeds_draw():
    for name, drawn in prompts.draw_all().items():
        assert list(prompts._read(name)) == drawn


def test_the_gate_has_thirty_prompts():
    assert len(prompts.regression_gate()) == 30


def test_the_contact_sheet_starts_with_the_apple_and_has_no_doubles():
    assert CONTACT_SHEET[0] == "a red apple on a white background"
    assert len(set(CONTACT_SHEET)) == len(CONTACT_SHEET) == 48


def test_another_set_is_an_error():
    with pytest.raises(KeyError, match="holiday"):
        bench("holiday")
