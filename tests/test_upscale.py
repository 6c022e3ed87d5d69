"""Enlarged images: tiles as rows of the engine, and the worker's two passes over a real pipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.image_request import Edit, Enlarge, InputImage, Reference, Region
from model.row_builder import RowBuilder
from model.tiles import Tiling, lanczos
from server.engine import worker
from server.engine.job import Job
from server.engine.latency_model import LatencyModel
from server.engine.messages import (
    Cancel,
    Dropped,
    Failed,
    Finished,
    Heartbeat,
    Preview,
    Step,
    Timings,
)
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.settings import Settings
from tests.conftest import emptied
from tests.test_row_builder import picture, tokens_of, weight
from tests.test_worker import SAMPLING, Far, Gate, far, job, shown  # noqa: F401, the fixture

FIXED = replace(SAMPLING, deterministic=True)


def enlarging(
    width: int, height: int, strength: float = 0.5, scale: float = 1.0, **changes: object
) -> Enlarge:
    """To width × height by tiles of 32 × 32, before any padding."""
    tiling = Tiling.of((round(width * scale), round(height * scale)), (32, 32), 4)
    return replace(Enlarge(tiling, tiling.canvas, strength, FIXED), **changes)


def upscaling(id: str = "a", width: int = 56, height: int = 32, **changes: object) -> Job:
    """An image that the client sent, in two tiles."""
    enlarge = enlarging(width, height, image=picture(3, width, height))
    return replace(job(id, sampling=FIXED, enlarge=enlarge), **changes)


def twice(id: str = "a", strength: float = 0.5, **changes: object) -> Job:
    """An image that is drawn at 32 × 32, then at 64 × 64 in nine tiles."""
    enlarge = enlarging(64, 64, strength)
    return replace(job(id, sampling=FIXED, enlarge=enlarge), **changes)


def drawn(runner: Runner, wanted: Job, *, rows: range | None = None) -> list[torch.Tensor]:
    """The tokens of rows, by default of the only pass."""
    numbers = rows or wanted.passes[0][0]
    runner.start([(wanted, numbers)], Stopwatch())
    ids = [RowId(wanted.id, i) for i in numbers]
    while left := [row for row in ids if not runner.rows[row].done]:
        for row in left:
            runner.step(wanted.model, [row])
    return [runner.rows[row].tokens for row in ids]


def array(answer: Finished, index: int = 0) -> np.ndarray:
    (image,) = [image for image in answer.images if image.index == index]
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_images_then_the_tiles_of_each() -> None:
    two = twice(seeds=(5, 6))
    assert two.passes == ((range(2), 4), (range(2, 20), 2))
    assert (two.rows, two.steps, two.row_steps) == (20, 6, 2 * 4 + 18 * 2)
    assert [two.tile(i) for i in (0, 1, 2, 10, 11, 19)] == [
        None,
        None,
        (0, 0),
        (0, 8),
        (1, 0),
        (1, 8),
    ]
    assert two.tile_rows(1) == range(11, 20)
    assert (two.drawn_size, two.row_size(0), two.row_size(19)) == ((64, 64), (32, 32), (32, 32))
    sent = upscaling(seeds=(5, 6))
    assert sent.passes == ((range(2, 6), 2),)
    assert (sent.rows, sent.steps, sent.drawn_size) == (4, 2, (56, 32))
    assert sent.image_bytes == 56 * 32 * 3


def test_work_counts_the_pixels_branches_and_steps_of_every_row_of_both_passes() -> None:
    guided_once = replace(SAMPLING, guidance_steps=1)
    enlarge = replace(enlarging(64, 64), sampling=replace(SAMPLING, guidance=(1.0, 1.0)))
    wanted = twice(width=48, sampling=guided_once, enlarge=enlarge)
    # Pixels times steps.
    image, tiles = 48 * 32 * 4, 9 * 32 * 32 * 2
    assert wanted.work == pytest.approx(image * 1.25 + tiles)
    assert replace(wanted, seeds=(5, 6)).work == pytest.approx(2 * wanted.work)
    assert replace(wanted, step_work=0.3).work == pytest.approx(0.3 * wanted.work)
    regions = replace(wanted, regions=(Region("on and on", weight()),))
    assert regions.work == pytest.approx(image * 2.25 + tiles * 2)
    sent = replace(wanted, enlarge=replace(enlarge, image=picture(3, 64, 64)))
    assert sent.work == pytest.approx(tiles)


def test_previews_are_spread_over_both_passes() -> None:
    assert twice(previews=2).preview_steps == (2, 4)
    assert twice(previews=8).preview_steps == (1, 2, 3, 4, 5)
    assert twice().steps_taken(0, 3) == 3
    assert [twice().steps_taken(row, 3) for row in (1, 5)] == [5, 5]
    edited = job("b", canvas=Edit(picture(), 0.5))
    assert (edited.steps, edited.steps_taken(0, 3)) == (2, 1)
    assert job("c").preview_steps == ()


def test_a_prediction_covers_both_passes_and_a_job_without_a_step() -> None:
    model = LatencyModel()
    model.record_step(Step(1, 2, 32 * 32, 0.1, "random"), now=0.0)
    model.record_step(Step(9, 18, 32 * 32, 0.9, "random"), now=0.0)
    seconds = model.predict(twice(), [], slots=16, now=0.0)
    # Deterministic tiles are stepped one after the other.
    assert seconds == pytest.approx(4 * 0.1 + 9 * 2 * 0.1, rel=0.05)
    loose = replace(
        twice(), sampling=SAMPLING, enlarge=replace(enlarging(64, 64), sampling=SAMPLING)
    )
    assert model.predict(loose, [], 16, 0.0) == pytest.approx(4 * 0.1 + 2 * 0.9, rel=0.05)
    nothing = job("b", canvas=Edit(picture(), 0.0))
    assert model.predict(nothing, [], 16, 0.0) == 0.0
    assert model.predict(nothing, [twice()], 16, 0.0) == 0.0
    model.record_job(job("c"), Timings(prior=9.0), now=0.0)
    assert model.predict(upscaling(), [], 16, 0.0, least=True) == pytest.approx(
        2 * 2 * 0.1, rel=0.05
    ), "the time around a text's steps proves nothing about tiles"


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_tile_s_randomness_is_its_part_of_the_whole_s(runner: Runner) -> None:
    pipeline, wanted = runner.pipelines["random"], upscaling()
    whole = pipeline.noise(0, 56, 32, SAMPLING.steps)
    prior = pipeline.noise(0, 32, 32, SAMPLING.steps).prior
    assert wanted.enlarge is not None
    for number, row in enumerate(wanted.tile_rows(0)):
        noise = RowBuilder(pipeline).noise(wanted.image(row))
        x, y = (side // 4 for side in wanted.enlarge.tiling.corner(number))
        for part, of in (
            (noise.start, whole.start),
            (noise.draw, whole.draw),
            (noise.renoise, whole.renoise),
        ):
            assert torch.equal(part, of[..., y : y + 8, x : x + 8])
        assert torch.equal(noise.prior, prior)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5])
def test_as_many_tokens_as_the_strength_says_are_drawn_and_the_others_kept(
    runner: Runner, strength: float
) -> None:
    own = emptied(runner)
    image = picture(3, 56, 32)
    wanted = upscaling(enlarge=enlarging(56, 32, strength, image=image), seeds=tuple(range(8)))
    assert wanted.enlarge is not None
    tokens = torch.stack(drawn(own, wanted))
    tiling = wanted.enlarge.tiling
    sources = [tokens_of(own, InputImage.of(tiling.part(image.array, i))) for i in range(2)]
    changed = (tokens != torch.stack(sources * 8)).float().mean().item()
    assert strength / 2 <= changed <= 1.3 * strength


def test_a_tile_of_strength_one_is_drawn_from_nothing_but_noise(runner: Runner) -> None:
    own = emptied(runner)
    alone = enlarging(32, 32, 1.0, image=picture())
    (tile,) = drawn(own, job("a", sampling=FIXED, enlarge=alone))
    (plain,) = drawn(own, job("b", sampling=FIXED))
    assert torch.equal(tile, plain)


def test_strength_zero_returns_the_tokens_of_the_scaled_image(runner: Runner) -> None:
    own, nothing = emptied(runner), upscaling()
    assert nothing.enlarge is not None
    nothing = replace(nothing, enlarge=replace(nothing.enlarge, strength=0.0))
    tiling = nothing.enlarge.tiling
    parts = [InputImage.of(tiling.part(picture(3, 56, 32).array, i)) for i in range(2)]
    for tile, part in zip(drawn(own, nothing), parts, strict=True):
        assert torch.equal(tile, tokens_of(own, part))


def test_tiles_share_the_prior_s_result_with_the_image_before(runner, monkeypatch) -> None:
    own, asked = emptied(runner), list[int]()
    pipeline = own.pipelines["random"]
    prior = type(pipeline).prior_embeddings
    monkeypatch.setattr(
        pipeline,
        "prior_embeddings",
        lambda prompts, *rest: asked.append(len(prompts)) or prior(pipeline, prompts, *rest),
    )
    both = twice()
    drawn(own, both)
    drawn(own, both.with_source(0, picture(3, 64, 64)), rows=both.tile_rows(0))
    assert asked == [1]
    conditions = {id(own.rows[RowId("a", i)].conditional) for i in range(both.rows)}
    assert len(conditions) == 1


def test_regions_lie_on_the_tiles_that_they_cover(runner: Runner) -> None:
    half = np.zeros((32, 56), dtype=np.uint8)
    half[:, :28] = 255
    wanted = upscaling(regions=(Region("on and on", weight()),))
    assert wanted.enlarge is not None
    region = Region("on and on", InputImage.of(half))
    wanted = replace(wanted, enlarge=replace(wanted.enlarge, regions=(region,)))
    own = emptied(runner)
    drawn(own, wanted)
    left, right = (own.rows[RowId("a", i)].regions[0].weight for i in wanted.tile_rows(0))
    assert left.shape == right.shape == (8, 8)
    assert (left.mean(), right.mean()) == (7 / 8, 1 / 8)


def test_a_reference_is_every_tile_s(runner: Runner) -> None:
    own = emptied(runner)
    tiles = drawn(own, upscaling("a", prompt="", references=(Reference(picture(8), 1.0),)))
    others = drawn(own, upscaling("b", prompt="", references=(Reference(picture(9), 1.0),)))
    assert any((one != other).any() for one, other in zip(tiles, others, strict=True))


def test_v1_draws_tiles_too(random_v1_bundle: Path) -> None:
    v1 = Runner(Settings(weights=str(random_v1_bundle), device="cpu", dtype="float32"))
    pipeline = v1.pipelines["random-v1"]
    sampling = pipeline.config.recipe.sampling(steps=4, deterministic=True)
    enlarge = Enlarge.of(pipeline.config, (23, 16), 2.0, 0.5, sampling)
    assert (enlarge.size, enlarge.tiling.canvas, enlarge.tiling.token) == ((46, 32), (48, 32), 2)
    wanted = job("a", model="random-v1", sampling=sampling)
    wanted = replace(wanted, enlarge=replace(enlarge, image=picture(3, 48, 32)))
    tiles = drawn(v1, wanted)
    assert [tile.shape for tile in tiles] == [(16, 16)] * 2
    # The other half, and what lies where both are, is drawn from the same randomness.
    assert all(0 <= tile.min() <= tile.max() < 64 for tile in tiles)


# ── the worker ────────────────────────────────────────────────────────────────────────────────────


def test_a_sent_image_comes_back_blended_from_its_tiles(far: Far) -> None:  # noqa: F811
    wanted = upscaling("sent", seeds=(5, 6))
    far.send(wanted)
    answer = far.answer("sent")
    assert isinstance(answer, Finished)
    assert sorted(image.index for image in answer.images) == [0, 1]
    assert far.runner.rows == {}
    own = emptied(far.runner)
    tokens = drawn(own, wanted)
    pipeline = own.pipelines["random"]
    parts = [pipeline.decode(each[None])[0].numpy() for each in tokens]
    assert wanted.enlarge is not None
    for index in (0, 1):
        expected = wanted.enlarge.tiling.blend(parts[2 * index : 2 * index + 2])
        assert np.array_equal(array(answer, index), expected)


def test_a_drawn_image_is_drawn_again_from_what_it_looked_like(far: Far) -> None:  # noqa: F811
    far.send(job("small", sampling=FIXED))
    far.send(twice("large"))
    small, large = far.answer("small"), far.answer("large")
    assert isinstance(small, Finished)
    assert isinstance(large, Finished)
    assert array(large).shape == (64, 64, 3)
    source = InputImage.of(lanczos(array(small), (64, 64)))
    far.send(replace(twice("sent"), enlarge=replace(enlarging(64, 64), image=source)))
    sent = far.answer("sent")
    assert isinstance(sent, Finished)
    assert np.array_equal(array(large), array(sent))
    assert far.runner.rows == {}


def test_a_drawn_image_is_scaled_once_for_all_of_its_tiles(far: Far, monkeypatch) -> None:  # noqa: F811
    scaled = list[tuple[int, ...]]()
    monkeypatch.setattr(
        worker,
        "lanczos",
        lambda pixels, *sizes: scaled.append(pixels.shape) or lanczos(pixels, *sizes),
    )
    far.send(twice("a", seeds=(7, 8)))
    assert isinstance(far.answer("a"), Finished)
    assert scaled == [(32, 32, 3)] * 2


def test_image_i_of_a_seed_is_the_first_image_of_seed_plus_i(far: Far) -> None:  # noqa: F811
    far.send(twice("many", seeds=(7, 8)))
    far.send(twice("one", seeds=(8,)))
    many, one = far.answer("many"), far.answer("one")
    assert isinstance(many, Finished)
    assert isinstance(one, Finished)
    assert np.array_equal(array(many, 1), array(one))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_previews_cover_both_passes(far: Far, strength: float) -> None:  # noqa: F811
    wanted = twice("a", strength, previews=8)
    far.send(wanted)
    previews, answer = shown(far, "a")
    assert array(answer).shape == (64, 64, 3)
    numbers = [preview.number for preview in previews]
    assert numbers == sorted(set(numbers))
    steps = [preview.step for preview in previews]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(1, wanted.steps))
    sizes = {preview.step: (preview.image.width, preview.image.height) for preview in previews}
    assert sizes[1] == (32, 32)
    if strength:
        assert sizes[4] == (32, 32), "the whole first pass"
        assert sizes[5] == (64, 64)


def test_beats_count_the_steps_of_both_passes(far: Far, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(worker, "_HEARTBEAT_S", 0.0)
    enlarge = replace(enlarging(64, 64), sampling=SAMPLING)
    wanted = twice("a", sampling=SAMPLING, enlarge=enlarge)
    far.send(wanted)
    left, pixels = list[int](), set[int]()
    while not isinstance(
        message := far.receive(lambda m: isinstance(m, Heartbeat | Finished)), Finished
    ):
        assert isinstance(message, Heartbeat)
        left += message.left.values()
        pixels |= {step.pixels for step in message.steps}
    assert left[0] == wanted.row_steps - 1
    assert left == sorted(left, reverse=True)
    assert pixels == {32 * 32}


def test_a_job_cancelled_in_its_second_pass_leaves_nothing(far: Far, monkeypatch) -> None:  # noqa: F811
    long = replace(enlarging(64, 64), sampling=replace(FIXED, steps=64))
    far.send(twice("a", previews=8, enlarge=long))
    far.receive(lambda m: isinstance(m, Preview) and m.step > SAMPLING.steps)
    gate = Gate(far, monkeypatch)
    gate.wait()
    far.send(Cancel("a"))
    gate.opened.set()
    far.receive(lambda m: m == Dropped("a"))
    far.send(job("b"))
    assert isinstance(far.answer("b"), Finished)
    assert far.runner.rows == {}


def test_a_second_pass_that_fails_fails_its_job_alone(far: Far, monkeypatch) -> None:  # noqa: F811
    start = far.runner.start

    def picky(parts, watch):
        if any(index and job.enlarge for job, indices in parts for index in indices):
            raise MemoryError
        return start(parts, watch)

    monkeypatch.setattr(far.runner, "start", picky)
    far.send(twice("a"))
    far.send(job("b"))
    ends = [far.receive(lambda m: isinstance(m, Finished | Failed)) for _ in range(2)]
    assert {getattr(end, "id", ""): type(end) for end in ends} == {"a": Failed, "b": Finished}
    assert far.runner.rows == {}
