"""PaellaBench: its figures and intervals, and that pictures meet their own prompts only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from model.pipeline import Pipeline
from model.training import benchmark
from model.training.art import shapes
from model.training.benchmark import CONTROL, CRITERIA, Drawn, Figure, Sheet
from model.training.checker import Found, Reading
from model.training.prompts import CATEGORIES, BenchPrompt
from model.training.scenes import TALL, WIDE, Scene, Thing

CASES = [
    BenchPrompt("a red star on white", Scene("white", (Thing("star", "red"),))),
    BenchPrompt("a blue ring on black", Scene("black", (Thing("ring", "blue"),))),
    BenchPrompt("a pink heart on gray", Scene("gray", (Thing("heart", "pink"),), None, WIDE)),
]


def seen(scene: Scene) -> Reading:
    """Return what a judge reads in a perfect picture of a single thing."""
    (thing,) = scene.things
    found = Found(thing.kind, thing.colour, (0.5, 0.5), (0.6, 0.6), 1.0)
    return Reading(scene.background, (found,), (256, 256))


class Source:
    """Pictures whose first two pixels say the prompt's number and the seed."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def images(self, cases: Sequence[BenchPrompt], seeds: Sequence[int]) -> Tensor:
        self.batches.append(len(cases))
        assert len({case.scene.aspect for case in cases}) == 1
        pictures = torch.zeros(len(cases), 8, 8, 3, dtype=torch.uint8)
        pictures[:, 0, 0, 0] = torch.tensor([CASES.index(case) for case in cases])
        pictures[:, 0, 1, 0] = torch.tensor(list(seeds))
        return pictures


class Reader:
    """Reads what is meant, but for pictures of odd seeds."""

    def read(self, pictures: Tensor) -> list[Reading]:
        numbers = [(int(p[0, 0, 0]), int(p[0, 1, 0])) for p in pictures]
        nothing = Reading("red", (), (256, 256))
        return [nothing if seed % 2 else seen(CASES[i].scene) for i, seed in numbers]

    def features(self, pictures: Tensor) -> Tensor:
        return pictures[:, 0, :2, 0].float()


@pytest.fixture
def sheet() -> Sheet:
    return benchmark.judged(Source(), CASES, range(4), Reader(), Reader())


# ── drawing and reading ───────────────────────────────────────────────────────────────────────────


def test_every_picture_is_compared_with_its_own_prompt(sheet: Sheet) -> None:
    found = benchmark.hits(sheet, "detector", CRITERIA["single_object"])
    assert found.tolist() == [[True, False, True, False]] * 3
    assert benchmark.hits(sheet, "templates", CRITERIA["single_object"]).shape == (3, 1)


def test_features_are_the_first_seeds(sheet: Sheet) -> None:
    assert sheet.features.tolist() == [[0, 0], [1, 0], [2, 0]]


def test_shuffled_prompts_fail(sheet: Sheet) -> None:
    assert not benchmark.hits(sheet, "detector", CRITERIA["single_object"], shift=1).any()


def test_weak_kinds_are_those_with_half_of_their_pictures_right(sheet: Sheet) -> None:
    assert benchmark.weak_kinds(sheet) == CASES
    strong = benchmark.judged(Source(), CASES, [0, 2], Reader())
    assert benchmark.weak_kinds(strong) == []


def test_batches_hold_one_aspect_each() -> None:
    source = Source()
    benchmark.judged(source, CASES * 3, range(4), Reader())
    assert sum(source.batches) == 36
    assert max(source.batches) <= 16


def test_a_bundle_of_any_size_draws_every_aspect(pipeline: Pipeline) -> None:
    source = Drawn(pipeline, pipeline.config.recipe.sampling(steps=1))
    width, height = pipeline.config.native_size
    assert source.images(CASES[:1], [0]).shape == (1, height, width, 3)
    wide = source.images(CASES[2:], [0])
    assert wide.shape[2] > wide.shape[1]


def test_every_prompt_has_seeds_of_its_own() -> None:
    seeds = [benchmark.seed_of(text, number) for text in ("a cat", "a dog") for number in range(4)]
    assert len(set(seeds)) == 8
    assert seeds == [benchmark.seed_of(text, n) for text in ("a cat", "a dog") for n in range(4)]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_bundle_draws_each_prompt_with_its_own_seed(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def generate(texts: object, seeds: Sequence[int], *_: object, **__: object) -> Tensor:
        drawn.extend(seeds)
        return torch.zeros(len(seeds), 32, 32, 3)

    monkeypatch.setattr(pipeline, "generate", generate)
    Drawn(pipeline, pipeline.config.recipe.sampling(steps=1)).images(CASES[:2], [0, 0])
    assert drawn == [benchmark.seed_of(case.text, 0) for case in CASES[:2]]


def test_true_pictures_have_the_aspects_of_their_scenes() -> None:
    scene = Scene("white", (Thing("star", "red"),), None, TALL)
    picture = benchmark.rendered([scene], [0], shapes(64))
    assert picture.shape == (1, 384, 256, 3)
    assert benchmark.rendered([scene], [0], shapes(64), (64, 96)).shape == (1, 96, 64, 3)


# ── figures ───────────────────────────────────────────────────────────────────────────────────────


def test_the_interval_holds_the_mean_and_shrinks_with_more_prompts() -> None:
    rng = np.random.default_rng(0)
    few, many = (Figure.of(rng.random((n, 4)) < 0.8) for n in (50, 800))
    for figure in (few, many):
        assert figure.low <= figure.mean <= figure.high <= figure.best
    assert many.high - many.low < few.high - few.low


def test_seeds_of_one_prompt_are_not_independent() -> None:
    prompts = np.arange(100) < 50
    together = np.repeat(prompts[:, None], 4, axis=1)
    figure = Figure.of(together)
    assert figure.mean == figure.best == 0.5
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * 0.05, rel=0.2)


def test_without_prompts_there_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        Figure.of(np.zeros((0, 4), np.bool_))


def test_the_mean_counts_categories_alike_and_leaves_the_control_out(sheet: Sheet) -> None:
    figures = benchmark.figures({"single_object": sheet, CONTROL: sheet}, "detector")
    assert benchmark.mean(figures) == 0.5
    assert benchmark.best_mean(figures) == 1
    assert set(benchmark.more_figures({"shape_colour": sheet}, "detector")) == {
        "shape",
        "shape's colour",
        "whole scene",
    }


def test_every_category_has_a_criterion_and_a_hundred_prompts() -> None:
    found = benchmark.categories("report")
    assert set(found) == set(CRITERIA) == {*CATEGORIES, CONTROL}
    assert all(len(cases) >= 100 for cases in found.values())
    assert all(len(cases) == 7 for cases in benchmark.categories("tune", 7).values())


def test_features_of_the_same_pictures_are_no_distance_apart() -> None:
    torch.manual_seed(0)
    one, same, other = torch.randn(300, 16), torch.randn(300, 16), torch.randn(300, 16) + 0.5
    assert abs(benchmark.kid(one, same)[0]) < 5
    assert benchmark.kid(other, one)[0] > 50
