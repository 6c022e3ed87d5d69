"""The list of kinds: names people type, unambiguous, with sensible plurals, shapes of outline
and backgrounds.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from model.training import kinds
from model.training.kinds import (
    KINDS,
    NAMES_OF_KINDS,
    NUMBERS,
    SHAPES,
    aspect,
    backgrounds_for,
    object_of,
    outline,
    plural,
)
from model.training.palette import NAMES
from model.training.scenery import BACKGROUNDS, GROUND, HORIZON, SCENES


def test_there_are_six_hundred_objects_and_nine_shapes() -> None:
    assert len(KINDS) >= 600
    assert len(SHAPES) == 9
    assert NAMES_OF_KINDS[: len(SHAPES)] == SHAPES
    assert [NUMBERS[name] for name in NAMES_OF_KINDS] == list(range(len(SHAPES) + len(KINDS)))


def test_no_name_or_synonym_means_two_kinds() -> None:
    words = Counter([*SHAPES, *(word for kind in KINDS for word in (kind.name, *kind.synonyms))])
    assert [word for word, times in words.items() if times > 1] == []


def test_no_two_kinds_have_the_same_art_or_plural() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert len({kind.plural for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_a_kind_is_well_formed(kind: kinds.Kind) -> None:
    for word in (kind.name, kind.plural, *kind.synonyms):
        assert word == word.lower().strip()
        assert word.isascii()
        assert len(word) <= 40
    assert set(kind.bare) <= {kind.name, *kind.synonyms}
    assert kind.colour is None or kind.colour in NAMES
    assert kind.group in ("animal", "food", "travel", "activity", "thing")
    assert 0.1 < kind.aspect < 10
    assert not set(kind.tags) & {kind.name, *kind.synonyms}
    assert set(kind.hidden) <= set(BACKGROUNDS)
    assert len(backgrounds_for(kind.name)) >= 18


def test_a_colour_is_the_colour_of_the_name_only_where_both_are_said() -> None:
    """ "A green green apple" is no caption: a kind named by its colour has none beside it."""
    assert [kind.name for kind in KINDS if kind.colour and kind.colour in kind.name.split()] == []


def test_the_file_is_compact() -> None:
    for line in kinds.FILE.read_text(encoding="utf-8").splitlines():
        assert json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")) == line


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("apple", "apples"),
        ("glass of milk", "glasses of milk"),
        ("sun behind a cloud", "suns behind a cloud"),
        ("kitchen knife", "kitchen knives"),
        ("cherry", "cherries"),
        ("monkey", "monkeys"),
        ("snowman", "snowmen"),
        ("computer mouse", "computer mice"),
        ("christmas bush", "christmas bushes"),
        ("box", "boxes"),
    ],
)
def test_plurals_are_regular(one: str, many: str) -> None:
    assert plural(one) == many


def test_irregular_plurals_are_in_the_list() -> None:
    plurals = {kind.name: kind.plural for kind in KINDS}
    assert plurals["scissors"] == "pairs of scissors"
    assert plurals["bread"] == "loaves of bread"
    assert plurals["sheep"] == "sheep"


def test_what_must_not_be_mirrored_is_in_the_list() -> None:
    assert set(NAMES_OF_KINDS) >= kinds.ONE_WAY


def test_outlines() -> None:
    assert outline("circle", 100) == (100, 100)
    assert aspect("cactus") == aspect(NUMBERS["cactus"])
    width, height = outline("baguette", 96)
    assert max(width, height) == 96
    assert object_of("circle") is None
    apple = object_of("apple")
    assert apple is not None
    assert apple.colour == "red"


def test_things_are_not_drawn_where_nobody_would_see_them() -> None:
    assert "white" not in backgrounds_for("ghost")
    assert "black" in backgrounds_for("ghost")
    assert "red" not in backgrounds_for("circle", "red")
    assert "meadow" not in backgrounds_for("star", "green")
    with pytest.raises(ValueError, match="no colour of its own"):
        backgrounds_for("circle")
    with pytest.raises(KeyError):
        backgrounds_for("no such thing")


def test_scenes_have_names_and_horizons() -> None:
    assert len(SCENES) >= 8
    assert len(set(BACKGROUNDS)) == len(BACKGROUNDS) == 12 + len(SCENES)
    assert set(HORIZON) == set(SCENES)
    assert set(GROUND) == set(BACKGROUNDS)
    assert all(0.3 < level < 0.9 for level in HORIZON.values() if level is not None)
