"""Scenes: what is sampled can be seen, fits, and keeps the promises its description makes."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from model.training import scenes
from model.training.palette import COLOURS, distance, lab, nearest
from model.training.scenes import OBJECTS, SHAPES, Scene, Thing, backgrounds, find_font, render, sample, sprite


def font_missing() -> bool:
    try:
        find_font()
    except FileNotFoundError:
        return True
    return False


needs_font = pytest.mark.skipif(font_missing(), reason="the emoji font (Debian: fonts-noto-color-emoji) is not installed")
SIZES = [(64, 64), (96, 64), (64, 96), (128, 128), (224, 160)]


def mask(image: np.ndarray) -> np.ndarray:
    """Pixels that are not the background, which is the top left one."""
    return (image != image[0, 0]).any(axis=-1)


def test_lab_agrees_with_known_values():
    assert lab([255, 255, 255]) == pytest.approx([100, 0, 0], abs=0.03)
    assert lab([255, 0, 0]) == pytest.approx([53.24, 80.09, 67.20], abs=0.03)
    assert lab([0, 0, 0]) == pytest.approx([0, 0, 0], abs=1e-9)


def test_palette_colours_are_far_apart():
    assert min(float(distance(a, b)) for a, b in combinations(COLOURS.values(), 2)) > 30


@pytest.mark.parametrize("name", COLOURS)
def test_a_jittered_colour_keeps_its_name(name):
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert nearest(render(Scene(name), rng, 8, 8)[0, 0]) == name


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pictures_have_the_size_asked_for_and_things_stay_inside(width, height):
    rng = np.random.default_rng(1)
    for kind in SHAPES:
        for side in scenes.SIDES:
            image = render(Scene("white", (Thing(kind, "blue", "large", side),)), rng, width, height)
            assert image.shape == (height, width, 3)
            assert image.dtype == np.uint8
            thing = mask(image)
            assert 0 < thing.sum() == thing[1:-1, 1:-1].sum()


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("relation", scenes.RELATIONS)
def test_two_things_lie_as_the_relation_says_and_never_touch(relation, width, height):
    rng = np.random.default_rng(2)
    for first, second in scenes._PAIR_SIZES:
        things = (Thing("square", "red", first), Thing("square", "blue", second))
        image = render(Scene("white", things, relation), rng, width, height)
        red, blue = (np.argwhere(distance(image, COLOURS[colour]) < 30) for colour in ("red", "blue"))
        axis = 0 if relation in ("above", "below") else 1
        ahead, behind = (blue, red) if relation in ("right of", "below") else (red, blue)
        assert behind[:, axis].min() - ahead[:, axis].max() > 2


@pytest.mark.parametrize("side", scenes.SIDES)
def test_a_thing_lies_at_its_side(side):
    rng = np.random.default_rng(3)
    for size in ("small", "normal", "large"):
        rows, columns = np.nonzero(mask(render(Scene("black", (Thing("circle", "red", size, side),)), rng)))
        x, y = (columns.min() + columns.max() - 63) / 2, (rows.min() + rows.max() - 63) / 2
        beyond = {"centre": 4 - max(abs(x), abs(y)), "left": -x - 4, "right": x - 4, "top": -y - 4, "bottom": y - 4}
        assert beyond[side] > 0


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("side", scenes.SIDES)
def test_an_aligned_thing_begins_and_ends_with_a_cell_of_the_lattice(side, width, height):
    rng = np.random.default_rng(4)
    for size in ("small", "normal", "large"):
        scene = Scene("white", (Thing("circle", "red", size, side),))
        image = render(scene, rng, width, height, lattice=8)
        rows, columns = np.nonzero(mask(image))
        assert {limit % 8 for limit in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)} == {0}


def test_size_words_do_not_overlap():
    for extents in (scenes.LONE_EXTENT, scenes.PAIR_EXTENT):
        assert extents["small"][1] * 1.3 < extents["normal"][0]
        assert extents["normal"][1] * 1.2 < extents["large"][0]


def test_edges_are_smooth():
    image = render(Scene("black", (Thing("circle", "white"),)), np.random.default_rng(4))
    assert len(np.unique(image[..., 0])) > 20


def test_the_same_seed_draws_the_same_picture():
    scene = Scene("pink", (Thing("star", "black"), Thing("ring", "green")), "above")
    assert np.array_equal(render(scene, np.random.default_rng(5)), render(scene, np.random.default_rng(5)))
    assert not np.array_equal(render(scene, np.random.default_rng(5)), render(scene, np.random.default_rng(6)))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_sprite_has_the_length_asked_for_and_is_not_written_out_of_its_box(kind):
    for pixels in (9, 27, 64, 300):
        rgb, alpha = sprite(kind, pixels)
        assert max(alpha.shape) == pixels
        assert rgb.shape == (3, *alpha.shape)
        assert alpha.min() >= 0
        assert alpha.max() <= 1


def test_a_missing_font_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        find_font([tmp_path])


@needs_font
@pytest.mark.parametrize("kind", OBJECTS)
def test_every_object_has_a_glyph_of_its_own_and_backgrounds_that_show_it(kind):
    _, alpha = sprite(kind, 64)
    assert 0.15 < alpha.mean() < 0.99
    assert len(backgrounds(kind, OBJECTS[kind].colour)) >= 6


@needs_font
def test_no_two_objects_look_the_same():
    pictures = {kind: sprite(kind, 32)[0].mean(axis=(1, 2)) for kind in OBJECTS}
    assert len({tuple(mean.tolist()) for mean in pictures.values()}) == len(OBJECTS)


@needs_font
def test_things_never_have_the_background_s_colour():
    rng = np.random.default_rng(7)
    for scene in (sample(rng) for _ in range(2000)):
        for thing in scene.things:
            assert thing.colour != scene.background
            assert scene.background in backgrounds(thing.kind, thing.colour)


@needs_font
def test_the_mixture_has_its_stated_shares():
    rng = np.random.default_rng(8)
    counts = Counter(
        "plain" if not s.things else "pair" if s.relation else "shape" if s.things[0].kind in SHAPES else "object"
        for s in (sample(rng) for _ in range(4000))
    )
    shares = {name: count / 4000 for name, count in counts.items()}
    assert shares == pytest.approx({"shape": 0.17, "object": 0.15, "pair": 0.65, "plain": 0.03}, abs=0.03)


@needs_font
@pytest.mark.parametrize("objects", [1, 16, len(OBJECTS)])
def test_only_the_first_objects_are_drawn_and_all_of_them(objects):
    rng = np.random.default_rng(9)
    kinds = {thing.kind for _ in range(2500) for thing in sample(rng, objects).things}
    assert kinds == {*SHAPES, *list(OBJECTS)[:objects]}
