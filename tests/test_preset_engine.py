"""Two denoisers in one engine: what each preset draws, what shares a step, what is predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.bundle import Bundle, load_bundle, of_preset
from model.config import DENOISER, SamplingConfig
from model.image_request import Edit, Enlarge, ImageRequest, InputImage, Region, Repaint
from model.pipeline import Pipeline
from model.row_builder import DictCache, RowBuilder
from server.engine.cuda_graphs import StepGraphs, use_cuda_graphs
from server.engine.graph_shapes import GraphShapes, step_buckets
from server.engine.job import Job
from server.engine.latency_model import LatencyModel
from server.engine.messages import Finished, Heartbeat, Step, Timings
from server.engine.runner import WARM_UP_S, Runner, Stopwatch
from server.engine.scheduler import LENGTHS, Pool, RowId, Scheduler
from server.settings import Settings
from tests.conftest import emptied, micro_preset_config
from tests.test_cuda_graphs import rerun
from tests.test_row_builder import mask, picture, weight
from tests.test_worker import far, job  # noqa: F401, the fixture

CONFIG = micro_preset_config()
FAST, QUALITY = CONFIG.sampling("fast"), CONFIG.sampling("quality")
NETWORK = "denoiser-fast"


@pytest.fixture(scope="module")
def presets(preset_bundle: Path) -> Pipeline:
    return Pipeline.load(preset_bundle)


@pytest.fixture(scope="module")
def settings(preset_bundle: Path) -> Settings:
    return Settings(weights=str(preset_bundle), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def loaded(settings: Settings) -> Runner:
    return Runner(settings)


@pytest.fixture(name="runner")
def _fresh(loaded: Runner) -> Runner:
    return emptied(loaded)


def asked(
    id: str, sampling: SamplingConfig, seeds: tuple[int, ...] = (0,), **changes: object
) -> Job:
    return job(id, seeds=seeds, model="presets", sampling=sampling, **changes)


def drawn(runner: Runner, *jobs: Job) -> list[torch.Tensor]:
    """Every image's tokens, stepped as a scheduler steps them."""
    scheduler = Scheduler(64)
    for each in jobs:
        scheduler.add(each)
    rows = scheduler.admit()
    runner.start([(each, range(len(each.seeds))) for each in jobs], Stopwatch())
    while batch := scheduler.next_rows():
        runner.step(scheduler.pool(batch[0]).model, batch)
        for row in filter(runner.done, batch):
            scheduler.finish(row)
    return [runner.rows[row].tokens for row in rows]


# ── what a preset draws ───────────────────────────────────────────────────────────────────────────


def of_the_fast_denoiser_alone(directory: Path) -> Pipeline:
    """The same weights as if the fast denoiser and its recipe were all that the bundle had."""
    both = load_bundle(directory, torch.device("cpu"), torch.float32)
    alone = of_preset(both, "fast")
    assert alone.config.preset_names == ("quality",)
    assert alone.config.denoiser == both.config.denoisers["fast"]
    assert alone.denoiser is both.denoisers["fast"]
    return Pipeline.of(alone)


def test_a_preset_draws_what_a_bundle_of_its_denoiser_and_recipe_draws(presets, preset_bundle):
    alone = of_the_fast_denoiser_alone(preset_bundle)
    expected = alone.generate_tokens(["red apple", "the red apple"], [3, 4])
    tokens = presets.generate_tokens(["red apple", "the red apple"], [3, 4], FAST)
    assert torch.equal(tokens, expected)
    assert not torch.equal(presets.generate_tokens(["red apple", "the red apple"], [3, 4]), tokens)


def test_the_default_preset_draws_what_is_asked_for_without_one(preset_bundle):
    bundle: Bundle = load_bundle(preset_bundle, torch.device("cpu"), torch.float32)
    default = replace(bundle.config, default_preset="fast")
    pipeline = Pipeline.of(replace(bundle, config=default))
    tokens = pipeline.generate_tokens(["red apple"], [3])
    assert torch.equal(tokens, pipeline.generate_tokens(["red apple"], [3], FAST))


def requests(sampling: SamplingConfig) -> list[ImageRequest]:
    base = ImageRequest("red apple", 5, 32, 32, sampling)
    return [
        base,
        replace(base, canvas=Repaint(picture(), mask(16, 32))),
        replace(base, canvas=Edit(picture(), 0.7)),
        replace(base, regions=(Region("on and on", weight(128)),)),
    ]


def test_every_operation_is_drawn_by_the_preset_s_denoiser(presets, preset_bundle):
    alone = of_the_fast_denoiser_alone(preset_bundle)
    expected = RowBuilder(alone).build(requests(alone.config.sampling()))
    built = RowBuilder(presets).build(requests(FAST))
    assert torch.equal(presets.denoise(built), alone.denoise(expected))


def test_a_cache_keeps_presets_apart(presets):
    builder, plain = RowBuilder(presets, DictCache()), RowBuilder(presets)
    unguided = replace(QUALITY, guidance=(1.0, 1.0), guidance_steps=0)
    reweighed = replace(unguided, attention_weights=(1.0, 2.0))
    for sampling in (unguided, FAST, reweighed, QUALITY, FAST, unguided):
        # Batches of other sizes round otherwise.
        request = ImageRequest("red apple", 5, 32, 32, replace(sampling, deterministic=True))
        mine, expected = builder.build([request]), plain.build([request])
        assert torch.equal(mine[0].conditional.kv, expected[0].conditional.kv)
        assert torch.equal(presets.denoise(mine), presets.denoise(expected))


def test_attention_weights_of_a_request_replace_the_recipe_s(presets):
    request = ImageRequest("red apple", 5, 32, 32, QUALITY)

    def keys(sampling: SamplingConfig) -> torch.Tensor:
        (row,) = RowBuilder(presets).build([replace(request, sampling=sampling)])
        return row.conditional.kv

    recipe = CONFIG.recipe.attention_weights
    assert torch.equal(keys(QUALITY), keys(replace(QUALITY, attention_weights=recipe)))
    assert torch.equal(keys(QUALITY), keys(replace(QUALITY, attention_weights=None)))
    off = keys(replace(QUALITY, attention_weights=(1.0, 1.0)))
    assert not torch.equal(keys(QUALITY), off)


# ── what shares a step ────────────────────────────────────────────────────────────────────────────


def test_rows_of_two_denoisers_never_share_a_step_and_draw_what_they_draw_alone(
    runner, monkeypatch
):
    pipeline = runner.pipelines["presets"]
    steps: list[set[str]] = []
    advance = type(pipeline).advance

    def watched(rows):
        steps.append({row.sampling.denoiser for row in rows})
        advance(pipeline, rows)

    monkeypatch.setattr(pipeline, "advance", watched)
    jobs = [asked("a", QUALITY), asked("b", FAST, (1, 2)), asked("c", FAST, (3,))]
    together = drawn(runner, *jobs)
    assert all(len(each) == 1 for each in steps)
    assert sum(NETWORK in each for each in steps) == FAST.steps
    alone = [tokens for each in jobs for tokens in drawn(emptied(runner), each)]
    for one, other in zip(together, alone, strict=True):
        assert (one == other).float().mean() >= 0.99


def test_presets_that_share_a_denoiser_share_steps():
    other = replace(FAST, preset="live", steps=2)
    jobs = [asked("a", FAST), asked("b", other), asked("c", QUALITY)]
    pools = [Pool.of(each, 0) for each in jobs]
    assert pools[0] == pools[1] != pools[2]
    assert [pool.denoiser for pool in pools] == [NETWORK, NETWORK, DENOISER]


def test_tiles_are_drawn_by_the_denoiser_of_their_job(runner):
    image = InputImage.of(np.zeros((64, 64, 3), dtype=np.uint8))
    enlarge = Enlarge.of(CONFIG, (32, 32), 2.0, 0.5, FAST)
    tiled = asked("a", FAST, enlarge=replace(enlarge, image=image))
    rows = tiled.tile_rows(0)
    runner.start([(tiled, rows)], Stopwatch())
    assert {runner.rows[RowId("a", i)].sampling.denoiser for i in rows} == {NETWORK}
    assert {Pool.of(tiled, i).denoiser for i in rows} == {NETWORK}


def test_the_worker_draws_jobs_of_both_and_tells_the_denoiser_of_each_step(far, presets):  # noqa: F811
    far.send(asked("a", QUALITY))
    far.send(asked("b", FAST))
    steps: Counter[str] = Counter()
    images: dict[str, bytes] = {}

    def seen(message: object) -> bool:
        if isinstance(message, Heartbeat):
            steps.update(step.denoiser for step in message.steps)
        if isinstance(message, Finished):
            images[message.id] = bytes(message.images[0].pixels)
        return len(images) == 2 and sum(steps.values()) == QUALITY.steps + FAST.steps

    far.receive(seen)
    assert steps == {DENOISER: QUALITY.steps, NETWORK: FAST.steps}
    for id, sampling in (("a", QUALITY), ("b", FAST)):
        tokens = presets.generate_tokens(["red apple"], [0], sampling)
        assert images[id] == presets.decode(tokens)[0].numpy().tobytes()


# ── before the first request ──────────────────────────────────────────────────────────────────────


def test_the_warm_up_runs_every_preset_and_the_largest_batch_of_every_denoiser(runner, monkeypatch):
    pipeline = runner.pipelines["presets"]
    calls: list[tuple[str, int]] = []
    generate = type(pipeline).generate

    def watched(prompts, seeds, config):
        calls.append((config.preset, len(prompts)))
        return generate(pipeline, prompts, seeds, config)

    monkeypatch.setattr(pipeline, "generate", watched)
    runner.warm_up()
    assert calls[:2] == [("quality", 1), ("fast", 1)]
    assert [preset for preset, _ in calls[2:]] == ["quality", "fast"]
    assert all(count > 1 for _, count in calls[2:])


@pytest.mark.parametrize(
    ("fitting", "count"), [(100, 4), (4.01, 4), (3.99, 3), (2.01, 2), (1.99, 1), (0.1, 1)]
)
def test_the_largest_batch_has_as_many_rows_as_fit_into_the_warm_up_up_to_those_of_a_step(
    loaded, monkeypatch, fitting, count
):
    """As if one row took the warm-up's time divided by `fitting`."""
    settings = Settings(device="cpu", dtype="float32", max_batch_rows=4, threads=1)
    runner = Runner(settings, loaded.pipelines.values())
    clock = SimpleNamespace(now=0.0)
    batches: list[tuple[list[str], list[int]]] = []

    def watched(prompts, seeds, config):
        clock.now += WARM_UP_S / fitting
        batches.append((list(prompts), list(seeds)))

    monkeypatch.setattr(runner.pipelines["presets"], "generate", watched)
    ticking = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("server.engine.runner.time", ticking)
    runner.warm_up()
    assert [len(prompts) for prompts, _ in batches] == [1, 1, count, count]
    for prompts, seeds in batches[2:]:
        assert seeds == list(range(count))
        # As many words as the longest class has bytes.
        assert all(len(prompt.split()) >= LENGTHS[-1] for prompt in prompts)


@pytest.mark.parametrize("preset", ["fast", "quality"])
def test_graphs_of_both_denoisers_replay_what_is_drawn_eagerly(preset_bundle, preset):
    pipeline, eager = Pipeline.load(preset_bundle), Pipeline.load(preset_bundle)
    shapes = GraphShapes.for_server(pipeline.config, [pipeline.config.native_size], 2, 2)
    counters: Counter = Counter()
    use_cuda_graphs(pipeline, shapes, lambda: rerun, counters)
    assert all(isinstance(each, StepGraphs) for each in pipeline.executors.values())
    sampling = pipeline.config.sampling(preset)
    replayed = pipeline.generate_tokens(["red apple"], [7], sampling)
    expected = eager.generate_tokens(["red apple"], [7], sampling)
    assert (replayed == expected).float().mean() >= 0.99
    assert not counters["graph_eager_steps", ""]
    assert counters["graph_replays", ""] > 2 * sampling.steps


def test_a_denoiser_whose_presets_are_unguided_has_graphs_of_one_branch():
    def branches(config, network):
        buckets = step_buckets(config, 2, [config.native_size], network)
        return {bucket.branches_per_row for bucket in buckets}

    assert branches(CONFIG, DENOISER) == {1, 2}
    assert branches(CONFIG, NETWORK) == {1}
    fast = CONFIG.presets["fast"]
    guided = replace(fast, recipe=replace(fast.recipe, guidance_scale=(2.0, 2.0), guidance_steps=3))
    assert branches(CONFIG.with_preset("guided", guided), NETWORK) == {1, 2}


# ── predictions ───────────────────────────────────────────────────────────────────────────────────


def test_a_denoiser_s_steps_are_predicted_from_its_own():
    model, pixels = LatencyModel(), 32 * 32
    model.record_step(Step(1, 2, pixels, 0.2, "presets"), now=0.0)
    fast, quality = asked("a", FAST), asked("b", QUALITY)
    # The likely prediction scales what is known, and the least one knows nothing of this denoiser.
    assert model.predict(fast, [], 4, 0.0) == pytest.approx(3 * 0.1)
    assert model.predict(fast, [], 4, 0.0, least=True) == 0.0
    model.record_step(Step(1, 1, pixels, 0.01, "presets", NETWORK), now=0.0)
    assert model.predict(fast, [], 4, 0.0, least=True) == pytest.approx(3 * 0.01)
    assert model.predict(quality, [], 4, 0.0) == pytest.approx(6 * 0.2)


def test_presets_of_one_denoiser_have_their_own_time_around_the_steps():
    """The prior of one may take more steps than that of another."""
    model, pixels = LatencyModel(), 32 * 32
    model.record_step(Step(1, 1, pixels, 0.01, "presets", NETWORK), now=0.0)
    slow, fast = asked("a", replace(FAST, preset="slow")), asked("b", FAST)
    model.record_job(slow, Timings(prior=9.0), now=0.0)
    assert model.predict(fast, [], 4, 0.0, least=True) == pytest.approx(3 * 0.01)
    assert model.predict(slow, [], 4, 0.0, least=True) == pytest.approx(3 * 0.01 + 9)
    model.record_job(fast, Timings(prior=0.1), now=0.0)
    assert model.predict(fast, [], 4, 0.0) == pytest.approx(3 * 0.01 + 0.1)
