"""Scenes: things can be seen, stay inside and apart, and lie where the description says."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from model.training import scene_layout, scene_samplers, scenes
from model.training.kinds import KINDS, NAMES_OF_KINDS, SHAPES, outline
from model.training.palette import COLOURS, NAMES, distance, lab
from model.training.scene_layout import Layout, Sprite, layout
from model.training.scene_samplers import sample
from model.training.scenery import BACKGROUNDS, GROUND, SCENES
from model.training.scenes import ASPECTS, RELATIONS, SIDES, SQUARE, TOKEN, Scene, Thing, held_out

KIND_NAMES = [kind.name for kind in KINDS]


def box(sprite: Sprite) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a sprite's box."""
    width, height = outline(sprite.number, sprite.length)
    return (
        sprite.x - width / 2,
        sprite.y - height / 2,
        sprite.x + width / 2,
        sprite.y + height / 2,
    )


def apart(first: Sprite, second: Sprite) -> float:
    """Return the gap between two boxes in pixels, negative where they overlap."""
    a, b = box(first), box(second)
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def inside(drawn: Layout, scene: Scene, slack: float = 0.01) -> bool:
    """Return whether every box lies within the picture."""
    width, height = scene.aspect
    boxes = map(box, drawn.sprites)
    return all(
        left >= -slack and top >= -slack and right <= width + slack and bottom <= height + slack
        for left, top, right, bottom in boxes
    )


def sampled(n: int, seed: int) -> list[tuple[Scene, random.Random]]:
    rng = random.Random(seed)
    return [(sample(rng), rng) for _ in range(n)]


def test_lab_agrees_with_known_values():
    assert lab([255, 255, 255]) == pytest.approx([100, 0, 0], abs=0.03)
    assert lab([255, 0, 0]) == pytest.approx([53.24, 80.09, 67.20], abs=0.03)
    assert lab([0, 0, 0]) == pytest.approx([0, 0, 0], abs=1e-9)


def test_palette_colours_are_far_apart():
    assert min(float(distance(a, b)) for a, b in combinations(COLOURS.values(), 2)) > 30


def test_the_mixture_has_its_stated_shares():
    def category(scene: Scene) -> str:
        if not scene.things:
            return "empty"
        if len(scene.things) == 3:
            return "three"
        shapes = [thing.kind in SHAPES for thing in scene.things]
        if scene.relation:
            return "shapes" if all(shapes) else "pair"
        if scene.things[0].count > 1:
            return "count"
        return "shape" if shapes[0] else "close-up" if scene.close_up else "object"

    counts = Counter(category(scene) for scene, _ in sampled(8000, 0))
    shares = {name: count / 8000 for name, count in counts.items()}
    assert shares == pytest.approx(
        {
            "object": 0.56,
            "close-up": 0.04,
            "shape": 0.08,
            "pair": 0.11,
            "shapes": 0.08,
            "count": 0.09,
            "three": 0.02,
            "empty": 0.02,
        },
        abs=0.02,
    )


def test_shares_of_backgrounds_aspects_and_places():
    drawn = [scene for scene, _ in sampled(8000, 1)]
    odd = sum(scene.aspect != SQUARE for scene in drawn) / len(drawn)
    assert odd == pytest.approx(0.08, abs=0.02)
    lone = [s for s in drawn if len(s.things) == 1 and s.things[0].count == 1 and not s.close_up]
    objects = [scene for scene in lone if scene.things[0].kind not in SHAPES]
    painted = sum(scene.background in SCENES for scene in objects) / len(objects)
    assert 0.14 < painted < 0.24
    centred = sum(scene.things[0].side == "centre" for scene in lone) / len(lone)
    assert 0.5 < centred < 0.75
    assert {scene.things[0].side for scene in lone} == set(SIDES)


def test_every_kind_and_background_is_drawn():
    drawn = [scene for scene, _ in sampled(30_000, 2)]
    assert {thing.kind for scene in drawn for thing in scene.things} == {*NAMES_OF_KINDS}
    assert {scene.background for scene in drawn} == {*BACKGROUNDS}


def test_things_are_seen_before_their_background():
    for scene, _ in sampled(4000, 3):
        for thing in scene.things:
            assert scene.background in scenes.visible_on(thing.kind, thing.colour)
            if thing.kind in SHAPES:
                assert thing.colour != scene.background


def test_held_out_pairs_are_never_shown():
    assert (
        0.03 < np.mean([held_out(kind, name) for kind in KIND_NAMES for name in BACKGROUNDS]) < 0.06
    )
    assert held_out("apple", "zebra") == held_out("zebra", "apple")
    for scene, _ in sampled(8000, 4):
        for thing in scene.things:
            if thing.kind in SHAPES:
                assert not held_out(thing.kind, thing.colour or "")
            else:
                assert not held_out(thing.kind, scene.background)
        kinds = [thing.kind for thing in scene.things]
        assert not any(held_out(*pair) for pair in combinations(kinds, 2))


def test_every_shape_keeps_most_colours():
    assert all(len(scene_samplers.shape_colours(shape)) >= 9 for shape in SHAPES)


@pytest.mark.parametrize("aligned", [True, False])
def test_sprites_stay_inside_and_never_touch(aligned):
    for scene, rng in sampled(4000, 5):
        drawn = layout(scene, rng, aligned=aligned)
        assert len(drawn.sprites) == sum(thing.count for thing in scene.things)
        assert BACKGROUNDS[drawn.background] == scene.background
        assert len(drawn.params) == 8
        if not scene.close_up:
            assert inside(drawn, scene), scene
            for first, second in combinations(drawn.sprites, 2):
                assert apart(first, second) > (0 if aligned else -2), scene


def test_aligned_sprites_lie_on_the_lattice_with_few_lengths():
    lengths = Counter()
    for scene, rng in sampled(4000, 6):
        for sprite in layout(scene, rng, aligned=True).sprites:
            assert sprite.x % TOKEN == 0
            assert sprite.y % TOKEN == 0
            assert sprite.angle == 0
            lengths[sprite.length] += 1
    assert all(length % TOKEN == 0 for length in lengths)
    assert len(lengths) <= 12


def test_things_of_the_usual_sizes_lie_in_steps_of_a_patch_and_are_not_mirrored():
    for scene, rng in sampled(4000, 16):
        if {thing.size for thing in scene.things} == {"normal"} and not scene.close_up:
            for sprite in layout(scene, rng).sprites:
                assert sprite.x % (2 * TOKEN) == 0, scene
                assert sprite.y % (2 * TOKEN) == 0, scene
                assert not sprite.mirror


def test_the_first_mixture_is_mostly_one_thing_in_the_middle():
    rng = random.Random(17)
    first, full = (
        [scene_samplers.sample(rng, mix) for _ in range(3000)]
        for mix in (scene_samplers.FIRST, scene_samplers.FULL)
    )

    def share(scenes_, holds):
        return sum(map(holds, scenes_)) / len(scenes_)

    def plain_middle(scene):
        return (
            len(scene.things) == 1
            and scene.things[0].count == 1
            and scene.things[0].side == "centre"
            and scene.things[0].size == "normal"
        )

    assert share(first, plain_middle) > 1.5 * share(full, plain_middle)
    for mix in (first, full):
        assert {len(scene.things) for scene in mix} == {0, 1, 2, 3}


def test_the_mixture_of_several_shows_more_of_what_is_hard():
    rng = random.Random(18)
    several, first = (
        [scene_samplers.sample(rng, mix) for _ in range(4000)]
        for mix in (scene_samplers.SEVERAL, scene_samplers.FIRST)
    )
    for hard in (
        lambda scene: len(scene.things) == 2,
        lambda scene: len(scene.things) == 3,
        lambda scene: any(thing.count > 1 for thing in scene.things),
        lambda scene: scene.close_up,
        lambda scene: scene.aspect != SQUARE,
    ):
        assert sum(map(hard, several)) > 1.15 * sum(map(hard, first))


def test_layouts_off_the_lattice_are_turned_and_mirrored_at_times():
    rng = random.Random(7)
    scene = Scene("white", (Thing("zebra", None),))
    drawn = [layout(scene, rng, aligned=False).sprites[0] for _ in range(400)]
    assert 0.4 < np.mean([sprite.mirror for sprite in drawn]) < 0.6
    assert 0.4 < np.mean([sprite.angle != 0 for sprite in drawn]) < 0.6
    assert max(abs(sprite.angle) for sprite in drawn) <= 10


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("side", SIDES)
def test_a_thing_lies_at_its_side(side, aspect):
    rng = random.Random(8)
    for size in ("small", "normal", "large"):
        if side != "centre" and side not in scene_layout.sides_for("skull", size, aspect, "white"):
            continue
        scene = Scene("black", (Thing("skull", "white", size, side),), None, aspect)
        for _ in range(20):
            sprite = layout(scene, rng).sprites[0]
            x, y = sprite.x - aspect[0] / 2, sprite.y - aspect[1] / 2
            assert {"left": x <= -32, "right": x >= 32}.get(side.split()[-1], True)
            assert {"top": y <= -32, "bottom": y >= 32}.get(side.split()[0], True)
            if side == "centre":
                assert (x, y) == (0, 0)


def test_nothing_flies_over_a_ground():
    for scene, _ in sampled(6000, 9):
        if len(scene.things) == 1 and GROUND.get(scene.background):
            assert not scene.things[0].side.startswith("top")


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_two_things_lie_as_the_relation_says(relation, aspect):
    rng = random.Random(10)
    for sizes in scene_samplers.PAIR_SIZES:
        kinds = rng.sample(KIND_NAMES, 2)
        things = tuple(Thing(kind, None, size) for kind, size in zip(kinds, sizes, strict=True))
        first, second = layout(Scene("white", things, relation, aspect), rng).sprites
        across = {"above": first.y < second.y, "below": first.y > second.y}
        along = {"right of": first.x > second.x}
        assert {**across, **along}.get(relation, first.x < second.x)
        assert first.x == second.x or first.y == second.y


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_things_of_a_count_are_alike(count, aspect):
    rng = random.Random(11)
    for kind in (*SHAPES, *rng.sample(KIND_NAMES, 40)):
        drawn = layout(Scene("white", (Thing(kind, "red", count=count),), None, aspect), rng)
        assert len(drawn.sprites) == count
        assert len({(s.number, s.length, s.mirror) for s in drawn.sprites}) == 1


def test_close_ups_are_larger_than_the_picture():
    rng = random.Random(12)
    for _ in range(200):
        scene = scene_samplers.sample_close_up(rng)
        (sprite,) = layout(scene, rng).sprites
        assert 1.1 * 256 < sprite.length < 1.7 * 256


def test_the_same_seed_samples_the_same_scenes():
    first, second = (
        [layout(sample(rng), rng) for _ in range(50)]
        for rng in (random.Random(1), random.Random(1))
    )
    assert first == second


def test_the_default_background_is_white_where_that_shows_the_things():
    assert scenes.default_background(Scene("red", (Thing("star", "blue"),))) == "white"
    white = Scene("red", (Thing("star", "white"), Thing("ring", "green")), "and")
    assert scenes.default_background(white) == "blue"
    assert {scenes.default_background(scene) for scene, _ in sampled(500, 13)} <= {*NAMES}


def test_a_numpy_generator_is_as_good_a_source():
    assert sample(np.random.default_rng(0)).background in BACKGROUNDS
