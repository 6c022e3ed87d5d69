"""The judge: agrees with clean and with blurred pictures of a scene, and with no picture of another one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from model.training.checker import Verdict, judge, objects_found
from model.training.scenes import Scene, Thing, render, sample_object, sample_pair, sample_shape
from tests.test_scenes import needs_font

pytestmark = needs_font
N = 50
SAMPLERS = [sample_shape, sample_object, sample_pair]


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a small VQGAN does to a picture: blur, some ringing, noise."""
    blurred = ndimage.gaussian_filter(image.astype(np.float64), (0.7, 0.7, 0))
    ringing = blurred + 0.3 * (blurred - ndimage.gaussian_filter(blurred, (1.2, 1.2, 0)))
    return np.clip(np.rint(ringing + rng.normal(0, 6, image.shape)), 0, 255).astype(np.uint8)


def share(verdicts: list[Verdict], name: str) -> float:
    return sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clean_pictures_pass(sampler):
    rng = np.random.default_rng(0)
    drawn = [sampler(rng) for _ in range(N)]
    verdicts = [judge(render(scene, rng), scene) for scene in drawn]
    assert share(verdicts, "background") == 1
    assert share(verdicts, "colours") >= 0.98
    assert share(verdicts, "shapes") >= 0.97
    assert share(verdicts, "positions") >= 0.98
    assert share(verdicts, "all") >= 0.96


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_degraded_like_a_reconstruction_pass(sampler):
    rng = np.random.default_rng(1)
    drawn = [sampler(rng) for _ in range(N)]
    verdicts = [judge(degrade(render(scene, rng), rng), scene) for scene in drawn]
    for name in ("background", "count", "colours", "shapes", "positions", "sizes"):
        assert share(verdicts, name) >= 0.95, name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_of_other_scenes_are_rejected(sampler):
    rng = np.random.default_rng(2)
    drawn = [sampler(rng) for _ in range(N)]
    pairs = [(a, b) for a, b in pairwise(drawn) if a != b]
    assert share([judge(render(other, rng), scene) for scene, other in pairs], "all") == 0


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (128, 128)])
def test_other_sizes_are_judged_alike(width, height):
    rng = np.random.default_rng(3)
    drawn = [sampler(rng) for sampler in SAMPLERS for _ in range(8)]
    assert share([judge(render(scene, rng, width, height), scene) for scene in drawn], "all") >= 0.94


ONE = Scene("white", (Thing("heart", "red"),))
TWO = Scene("black", (Thing("star", "yellow"), Thing("square", "green")), "left of")


@pytest.mark.parametrize(
    ("shown", "asked", "wrong"),
    [
        (ONE, replace(ONE, background="pink"), {"background"}),
        (ONE, replace(ONE, things=(Thing("heart", "purple"),)), {"colours"}),
        (ONE, replace(ONE, things=(Thing("circle", "red"),)), {"shapes"}),
        (ONE, replace(ONE, things=(Thing("heart", "red", side="left"),)), {"positions"}),
        (ONE, replace(ONE, things=(Thing("heart", "red", size="large"),)), {"sizes"}),
        (TWO, replace(TWO, relation="right of"), {"positions"}),
        (TWO, replace(TWO, relation="above"), {"positions"}),
        (TWO, replace(TWO, things=(Thing("star", "yellow"), Thing("ring", "green"))), {"shapes"}),
        (TWO, replace(TWO, things=(Thing("star", "green"), Thing("square", "yellow"))), {"colours"}),
    ],
)
def test_one_wrong_word_fails_one_verdict(shown, asked, wrong):
    verdict = judge(render(shown, np.random.default_rng(4)), asked)
    assert {name for name in ("background", "count", "colours", "shapes", "positions", "sizes") if not getattr(verdict, name)} == wrong


def test_a_missing_thing_fails_all_but_the_background():
    picture = render(Scene("black"), np.random.default_rng(5))
    assert judge(picture, TWO) == Verdict(background=True, count=False, colours=False, shapes=False, positions=False, sizes=False)


def test_a_thing_too_many_is_counted():
    assert not judge(render(TWO, np.random.default_rng(6)), Scene("black", (Thing("square", "green"),))).count


def test_noise_shows_nothing():
    rng = np.random.default_rng(7)
    pictures = rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    assert not any(judge(picture, ONE).all or judge(picture, ONE).shapes for picture in pictures)


def test_an_object_in_wrong_colours_is_not_that_object_in_its_colours():
    picture = render(Scene("white", (Thing("apple", "red"),)), np.random.default_rng(8))
    recoloured = picture[..., ::-1].copy()  # red and blue swapped; white stays
    assert not judge(recoloured, Scene("white", (Thing("apple", "red"),))).colours


def test_found_things_are_described_in_shares_of_the_picture():
    picture = render(Scene("white", (Thing("square", "blue", side="right"),)), np.random.default_rng(9), 96, 64)
    (found,) = objects_found(picture)
    assert (found.kind, found.colour) == ("square", "blue")
    assert found.centre[0] > 0.65
    assert found.centre[1] == pytest.approx(0.5, abs=0.06)
    assert found.extent == pytest.approx((0.425, 0.425), abs=0.06)
    assert found.unexplained < 0.1


def test_an_empty_picture_holds_nothing():
    assert objects_found(render(Scene("red"), np.random.default_rng(10))) == []
