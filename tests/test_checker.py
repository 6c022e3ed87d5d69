"""The comparison of what a judge found with what was asked for: a wrong word fails a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from model.training.checker import Found, Reading, Verdict, check, read_all, side_of, wanted
from model.training.scenes import Scene, Side, Thing

pytestmark = pytest.mark.training

SHAPE = (256, 256)
HEART = Found("heart", "red", (0.5, 0.5), (0.6, 0.6), 0.9)
STAR = Found("star", "yellow", (0.27, 0.5), (0.4, 0.4), 0.9)
SQUARE = Found("square", "green", (0.73, 0.52), (0.4, 0.4), 0.8)
ONE = Scene("white", (Thing("heart", "red"),))
TWO = Scene("black", (Thing("star", "yellow"), Thing("square", "green")), "left of")
THREE = Scene("blue", (Thing("banana", "yellow", count=3),))


def reading(background: str, *things: Found) -> Reading:
    return Reading(background, things, SHAPE)


def bananas(count: int) -> list[Found]:
    return [Found("banana", None, (0.2 + 0.3 * i, 0.5), (0.3, 0.3), 0.9) for i in range(count)]


def test_the_scene_itself_passes() -> None:
    assert check(reading("white", HEART), ONE).all
    assert check(reading("black", STAR, SQUARE), TWO).all
    assert check(reading("blue", *bananas(3)), THREE).all


def test_the_order_in_which_things_are_found_does_not_matter() -> None:
    assert check(reading("black", SQUARE, STAR), TWO).all


@pytest.mark.parametrize(
    ("shown", "asked", "wrong"),
    [
        (reading("white", HEART), replace(ONE, background="pink"), {"background"}),
        (reading("white", HEART), replace(ONE, things=(Thing("heart", "blue"),)), {"colours"}),
        (reading("white", HEART), replace(ONE, things=(Thing("circle", "red"),)), {"kinds"}),
        (
            reading("white", HEART),
            replace(ONE, things=(Thing("heart", "red", side="left"),)),
            {"positions"},
        ),
        (reading("black", STAR, SQUARE), replace(TWO, relation="right of"), {"positions"}),
        (reading("black", STAR, SQUARE), replace(TWO, relation="above"), {"positions"}),
        (reading("white", HEART, SQUARE), ONE, {"count"}),
        (reading("blue", *bananas(4)), THREE, {"count"}),
    ],
)
def test_one_wrong_word_fails_one_verdict(shown: Reading, asked: Scene, wrong: set[str]) -> None:
    verdict = check(shown, asked)
    names = ("background", "count", "kinds", "colours", "positions")
    assert {name for name in names if not getattr(verdict, name)} == wrong
    assert verdict.attribution == (not wrong & {"kinds", "colours"})


def test_swapped_colours_fail_the_attribution() -> None:
    swapped = (replace(STAR, colour="green"), replace(SQUARE, colour="yellow"))
    verdict = check(reading("black", *swapped), TWO)
    assert verdict.kinds
    assert not verdict.attribution


def test_a_missing_thing_fails_all_but_the_background() -> None:
    assert check(reading("black", STAR), TWO) == Verdict(True, False, False, False, False, False)
    assert not check(reading("blue", *bananas(2)), THREE).kinds


def test_any_colour_will_do_for_an_object() -> None:
    scene = Scene("white", (Thing("apple", "red"),))
    assert check(reading("white", replace(HEART, kind="apple", colour=None)), scene).all


def test_an_empty_scene_wants_nothing() -> None:
    assert wanted(Scene("red")) == []
    assert check(reading("red"), Scene("red")).all
    assert not check(reading("red", HEART), Scene("red")).count


def test_a_close_up_has_no_side() -> None:
    scene = Scene("white", (Thing("heart", "red"),), close_up=True)
    assert check(reading("white", replace(HEART, centre=(0.3, 0.3))), scene).positions


@pytest.mark.parametrize(
    ("centre", "side"),
    [
        ((0.5, 0.5), "centre"),
        ((0.53, 0.47), "centre"),
        ((0.35, 0.5), "left"),
        ((0.65, 0.5), "right"),
        ((0.5, 0.3), "top"),
        ((0.5, 0.7), "bottom"),
        ((0.3, 0.7), "bottom left"),
    ],
)
def test_sides(centre: tuple[float, float], side: Side) -> None:
    assert side_of(replace(HEART, centre=centre), SHAPE) == side


def test_sides_of_a_wide_picture_are_measured_by_its_shorter_side() -> None:
    assert side_of(replace(HEART, centre=(0.45, 0.5)), (256, 384)) == "left"


def test_pictures_of_one_size_are_read_together() -> None:
    class Counting:
        def __init__(self) -> None:
            self.sizes: list[tuple[int, ...]] = []

        def read(self, pictures: Tensor) -> list[Reading]:
            self.sizes.append(tuple(pictures.shape))
            return [Reading(str(int(p[0, 0, 0])), (), SHAPE) for p in pictures]

    judge = Counting()
    sizes = [(8, 8), (8, 12), (8, 8)]
    pictures = [np.full((*size, 3), i, np.uint8) for i, size in enumerate(sizes)]
    assert [one.background for one in read_all(judge, pictures)] == ["0", "1", "2"]
    assert judge.sizes == [(2, 8, 8, 3), (1, 8, 12, 3)]
