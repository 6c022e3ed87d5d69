"""Replayed steps are the eager ones: whatever the rows, lengths and samplers, padding and static
memory change nothing.

What records here runs the function again on every replay, so shapes, padding, places and counts are
tested without a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import BundleConfig
from model.networks.denoiser_v3 import Condition
from model.pipeline import Pipeline, PipelineV3
from model.rows import RegionBranch, Row
from server.engine.cuda_graphs import DecodeGraphs, PriorGraphs, StepGraphs, use_cuda_graphs
from server.engine.graph_shapes import Bucket, GraphShapes, row_counts, step_buckets
from server.engine.messages import Count
from server.engine.runner import Runner
from server.settings import Settings
from tests.conftest import micro_config, micro_preset_config, micro_v1_config
from tests.test_pipeline import PLAIN, PROMPTS, SAMPLERS, UNGUIDED, agreement, row, run

GRID = (8, 8)
LENGTHS = (16, 80)


class NothingAsked(TorchDispatchMode):
    """Fails where a function asks the device for a number: what is recorded may not, and what
    runs beside the steps would wait for it.
    """

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.ASKING, f"{func} waits for the device"
        return func(*args, **kwargs or {})


@dataclass
class Rerun:
    """As a graph: its output lies always in the same place."""

    function: Callable[[], Tensor]
    output: Tensor

    def replay(self) -> None:
        self.output.copy_(self.function())


def rerun(function: Callable[[], Tensor]) -> Rerun:
    with NothingAsked():
        return Rerun(function, function())


@pytest.fixture(scope="module")
def recorded(pipeline: Pipeline) -> StepGraphs:
    buckets = [
        Bucket(GRID, rows, branches, length)
        for rows in (1, 2, 4)
        for branches in (1, 2)
        for length in LENGTHS
    ]
    graphs = StepGraphs(pipeline, buckets, rerun, Counter())
    graphs.capture_all()
    return graphs


@pytest.fixture
def graphs(pipeline: Pipeline, recorded: StepGraphs) -> Iterator[StepGraphs]:
    """The pipeline computes with these for as long as the test runs.

    Their static inputs hold what earlier tests left there.
    """
    for count in ("graph_eager_steps", "graph_replays"):
        recorded.counters[count, ""] = 0
    eager, pipeline.executor = pipeline.executor, recorded
    yield recorded
    pipeline.executor = eager


def eagerly(pipeline: Pipeline, *rows: Row) -> list[Tensor]:
    return run(PipelineV3(pipeline.bundle), *rows)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "config",
    [PLAIN, UNGUIDED, replace(PLAIN, guidance_steps=3)],
    ids=["guided", "unguided", "guided at first"],
)
@pytest.mark.parametrize("order", ["random", "halton", "confidence"])
def test_one_row_draws_what_it_draws_eagerly(pipeline, graphs, config, sampler, order):
    config = replace(config, sampler=sampler, renoise_order=order)
    (replayed,) = run(pipeline, row(pipeline, config=config))
    (expected,) = eagerly(pipeline, row(pipeline, config=config))
    assert agreement(replayed, expected) >= 0.99
    assert not graphs.counters["graph_eager_steps", ""]


def test_rows_of_every_kind_share_a_replay(pipeline, graphs):
    def rows() -> list[Row]:
        configs = [
            PLAIN,
            replace(UNGUIDED, sampler="argmax"),
            replace(PLAIN, guidance_steps=2, sampler="typical"),
        ]
        return [
            row(pipeline, prompt, seed, config)
            for seed, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=False))
        ]

    for replayed, expected in zip(run(pipeline, *rows()), eagerly(pipeline, *rows()), strict=True):
        assert agreement(replayed, expected) >= 0.99
    assert not graphs.counters["graph_eager_steps", ""]


def test_rows_that_join_and_leave_meet_nothing_of_those_before_them(pipeline, graphs):
    (expected,) = eagerly(pipeline, row(pipeline))
    long, mine = (
        row(pipeline, PROMPTS[2], 1, replace(PLAIN, steps=3, renoise_steps=2)),
        row(pipeline),
    )
    pipeline.advance([long, mine])
    pipeline.advance([mine])
    pipeline.advance([mine, long])
    pipeline.advance([long, mine])
    run(pipeline, mine)
    assert agreement(mine.tokens, expected) >= 0.99


def test_a_picture_with_nothing_but_nan_harms_no_padded_neighbour(pipeline, graphs):
    broken, mine = row(pipeline, PROMPTS[2], seed=1), row(pipeline)
    broken.conditional = replace(
        broken.conditional, kv=torch.full_like(broken.conditional.kv, torch.nan)
    )
    pipeline.advance([broken])
    (replayed,) = run(pipeline, mine)
    (expected,) = eagerly(pipeline, row(pipeline))
    assert agreement(replayed, expected) >= 0.99


def test_padding_of_an_unguided_row_reads_nothing_of_a_broken_row_that_was_there_before(
    pipeline, graphs
):
    broken = row(pipeline, PROMPTS[2], seed=1)
    for kind in ("conditional", "unconditional"):
        condition = getattr(broken, kind)
        setattr(broken, kind, replace(condition, kv=torch.full_like(condition.kv, torch.nan)))
    pipeline.advance([broken, row(pipeline, PROMPTS[2], seed=2)])

    def rows() -> list[Row]:
        return [row(pipeline, config=UNGUIDED), row(pipeline, PROMPTS[2], 3)]

    for replayed, expected in zip(run(pipeline, *rows()), eagerly(pipeline, *rows()), strict=True):
        assert agreement(replayed, expected) >= 0.99
    assert not graphs.counters["graph_eager_steps", ""]


def test_conditions_are_copied_once_while_the_same_rows_step(pipeline, graphs, monkeypatch):
    mine, copied, put = row(pipeline), list[int](), Condition.put
    monkeypatch.setattr(
        Condition, "put", lambda self, branch, one: copied.append(branch) or put(self, branch, one)
    )
    pipeline.advance([mine])
    first = list(copied)
    assert set(first) == {0, 1}
    pipeline.advance([mine])
    assert copied == first
    pipeline.advance([row(pipeline, seed=1)])
    assert copied == first * 2


def test_what_no_graph_fits_is_computed_eagerly_and_counted(pipeline, graphs):
    many = [row(pipeline, seed=seed) for seed in range(5)]
    pipeline.advance(many)
    assert graphs.counters["graph_eager_steps", ""] == 1
    assert not graphs.counters["graph_replays", ""]


def test_the_smallest_graph_that_fits_is_replayed(pipeline, graphs, monkeypatch):
    shapes, features = list[tuple[int, int, int]](), graphs.denoiser.features

    def seen(tokens: Tensor, times: Tensor, condition: Condition, row_of: Tensor) -> Tensor:
        shapes.append((len(tokens), len(row_of), condition.length))
        return features(tokens, times, condition, row_of)

    monkeypatch.setattr(graphs.denoiser, "features", seen)
    draws, sample = list[int](), graphs.eager.sample
    monkeypatch.setattr(
        graphs.eager,
        "sample",
        lambda name, *rest: draws.append(len(rest[0])) or sample(name, *rest),
    )
    unguided, guided = row(pipeline, config=UNGUIDED), row(pipeline)
    length = min(length for length in LENGTHS if length >= unguided.conditional.length)
    rows = [unguided, guided, row(pipeline, config=UNGUIDED), row(pipeline, seed=1)]
    for count in range(1, 5):
        pipeline.advance(rows[:count])
    assert shapes == [(1, 1, length), (2, 4, length), (4, 8, length), (4, 8, length)]
    assert draws == [1, 2, 4, 4]
    assert graphs.counters["graph_replays", ""] == len(shapes) + len(draws)


def test_a_graph_is_replayed_for_conditions_of_exactly_its_length(pipeline):
    mine, counters = row(pipeline, config=UNGUIDED), Counter[Count]()
    replaying = PipelineV3(pipeline.bundle)
    for length, replays in ((mine.conditional.length - 1, 0), (mine.conditional.length, 1)):
        graphs = StepGraphs(pipeline, [Bucket(GRID, 1, 1, length)], rerun, counters)
        graphs.capture_all()
        replaying.executor = graphs
        replaying.advance([mine])
        assert counters["graph_eager_steps", ""] == 1
        # One of the step, and one of each draw.
        assert counters["graph_replays", ""] == 1 + 2 * replays


def test_everything_is_recorded_before_the_first_step_and_nothing_after_it(pipeline, graphs):
    recorded = graphs.counters["graph_captures", "false"]
    run(pipeline, row(pipeline), row(pipeline, seed=1, config=UNGUIDED))
    assert recorded == graphs.counters["graph_captures", "false"] == 12 + 3 * len(SAMPLERS)
    assert not graphs.counters["graph_captures", "true"]
    assert graphs.counters["graph_replays", ""] == 12  # six steps and six draws


def test_the_largest_graph_is_recorded_first(pipeline, monkeypatch):
    buckets = [Bucket(GRID, rows, 2, length) for length in LENGTHS for rows in (1, 4, 2)]
    graphs = StepGraphs(pipeline, buckets, rerun, Counter())
    shapes, features = list[tuple[int, int]](), graphs.denoiser.features

    def seen(tokens: Tensor, times: Tensor, condition: Condition, row_of: Tensor) -> Tensor:
        shapes.append((len(tokens), condition.length))
        return features(tokens, times, condition, row_of)

    monkeypatch.setattr(graphs.denoiser, "features", seen)
    graphs.capture_all()
    assert shapes == [(4, 80), (4, 16), (2, 80), (2, 16), (1, 80), (1, 16)]


@pytest.mark.parametrize(
    ("most", "counts"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_numbers_of_rows_are_powers_of_two_and_the_most(most, counts):
    assert row_counts(most) == counts


def test_every_row_count_up_to_the_most_has_a_bucket_and_every_length_that_a_text_can_have():
    config = micro_config()
    made = step_buckets(config, max_rows=12, sizes=[(64, 32)])
    assert {b.rows for b in made} == {1, 2, 4, 8, 12}
    assert {b.grid for b in made} == {(8, 16)}
    assert {b.branches_per_row for b in made} == {1, 2}
    assert max(b.length for b in made) == config.byt5.max_bytes + 2 * config.denoiser.clip_seq_len


def test_lengths_are_the_scheduler_s_classes_up_to_the_longest_text_and_one_for_v1():
    config = micro_config()
    longer = replace(config, byt5=replace(config.byt5, max_bytes=300))
    beside = 2 * config.denoiser.clip_seq_len

    def lengths(config: BundleConfig) -> list[int]:
        return sorted({b.length for b in step_buckets(config, 2, [config.native_size])})

    assert lengths(longer) == [96 + beside, 256 + beside, 300 + beside]
    assert lengths(micro_v1_config()) == [1]


def test_a_server_s_shapes_are_of_its_sizes_rows_and_decodes_for_every_denoiser():
    config = micro_preset_config()
    shapes = GraphShapes.for_server(config, [(64, 32), (32, 32)], max_rows=5, decode_rows=3)
    assert shapes.grids == [(8, 16), (8, 8)]
    assert (shapes.decode_rows, shapes.prior_rows) == ([1, 2, 3], [1, 2, 4, 5])
    assert list(shapes.further) == ["denoiser-fast"]
    for buckets in (shapes.buckets, shapes.further["denoiser-fast"]):
        assert {b.rows for b in buckets} == {1, 2, 4, 5}
        assert {b.grid for b in buckets} == {(8, 16), (8, 8)}


def test_what_the_buckets_promise_is_what_the_longest_prompt_needs(pipeline):
    made = step_buckets(pipeline.config, max_rows=2, sizes=[pipeline.config.native_size])
    (prompt,) = pipeline.encode(["the apple " * 100])
    condition = pipeline.condition(prompt, torch.ones(1, 16))
    assert condition.length <= max(b.length for b in made)


def test_a_runner_s_rows_are_drawn_from_graphs_of_the_native_size_and_the_settings(random_bundle):
    runner = Runner(
        Settings(
            weights=str(random_bundle), dtype="float32", max_batch_rows=2, graph_sizes="32x64,40x40"
        )
    )
    pipeline = runner.pipelines["random"]
    runner.capture_graphs(pipeline, lambda: rerun)
    captures = runner.counters["graph_captures", "false"]
    for width, height in ((32, 32), (32, 64), (64, 64)):
        pipeline.generate(["red apple"], [0], PLAIN, width=width, height=height)
    # The size 64×64 has no graph, 40×40 is none of its sizes; each picture's prior is one, and so
    # is what decodes the others.
    assert runner.counters["graph_replays", ""] == 2 * 2 * PLAIN.steps + 3 + 2
    assert runner.counters["graph_eager_steps", ""] == PLAIN.steps
    assert captures == runner.counters["graph_captures", "false"]
    assert not runner.counters["graph_captures", "true"]


def test_nothing_on_the_way_from_a_text_to_a_step_waits_for_the_device(pipeline, graphs):
    with NothingAsked():
        mine = row(pipeline, config=replace(PLAIN, sampler="quant"))
        unsure = row(pipeline, config=replace(PLAIN, renoise_order="confidence"))
        pipeline.advance([mine, row(pipeline, PROMPTS[2], 1, UNGUIDED), unsure])
        pipeline.advance([unsure])


def test_a_prior_s_replay_is_its_eager_run_for_any_number_of_images(pipeline):
    counters: Counter[Count] = Counter()
    graphs = PriorGraphs(pipeline, (1, 4), rerun, counters)
    graphs.capture_all()
    settings = pipeline.prior_settings()
    steps, width = pipeline.prior_noise(settings)
    rows, eager = list[int](), graphs.eager
    graphs.eager = lambda text, *rest: rows.append(len(text)) or eager(text, *rest)
    drawn = []
    for count in (1, 3, 2, 4):
        text, noise = torch.randn(count, width), torch.randn(steps, count, width)
        drawn.append((graphs(text, noise, settings), pipeline.run_prior(text, noise, settings)))
    for (
        replayed,
        expected,
    ) in drawn:  # after all of them: a replay takes nothing away from those before it
        torch.testing.assert_close(replayed, expected, atol=1e-5, rtol=1e-5)
    graphs(torch.randn(5, width), torch.randn(steps, 5, width), settings)
    assert rows == [1, 4, 4, 4, 5], "the smallest graph that fits"
    assert counters["graph_replays", ""] == 4


def test_pictures_replayed_are_those_decoded_eagerly_for_any_number_and_size_of_them(pipeline):
    counters: Counter[Count] = Counter()
    graphs = DecodeGraphs(pipeline, [GRID, (8, 16)], (1, 4), rerun, counters)
    graphs.capture_all()
    rows, eager = list[int](), graphs.eager
    graphs.eager = lambda tokens: rows.append(len(tokens)) or eager(tokens)
    tokens = [
        torch.randint(64, (count, *grid))
        for count, grid in ((3, GRID), (1, (8, 16)), (2, GRID), (4, GRID))
    ]
    decoded = [graphs(each) for each in tokens]
    for each, pictures in zip(
        tokens, decoded, strict=True
    ):  # after all of them: a replay takes nothing away from those before it
        assert (pictures.int() - pipeline.decode_tokens(each).int()).abs().max() <= 1
    assert (counters["graph_captures", "false"], counters["graph_replays", ""]) == (4, 4)
    for odd in (torch.randint(64, (5, *GRID)), torch.randint(64, (1, 16, 16))):
        assert torch.equal(graphs(odd), pipeline.decode_tokens(odd))
    assert rows == [4, 1, 4, 4, 5, 1], "the smallest graph that fits"
    assert counters["graph_replays", ""] == 4


V1 = replace(PLAIN, temperature=(1.0, 1.0), schedule="cosine")


@pytest.fixture(scope="module")
def v1(random_v1_bundle) -> Pipeline:
    return Pipeline.load(random_v1_bundle)


@pytest.fixture
def v1_graphs(v1: Pipeline) -> Iterator[StepGraphs]:
    """As `graphs`."""
    made = StepGraphs(v1, step_buckets(v1.config, 4, [v1.config.native_size]), rerun, Counter())
    made.capture_all()
    eager, v1.executor = v1.executor, made
    yield made
    v1.executor = eager


@pytest.mark.parametrize("sampler", ["multinomial", "argmax", "typical"])
def test_rows_of_v1_draw_what_they_draw_eagerly(v1, v1_graphs, sampler):
    def rows() -> list[Row]:
        configs = [
            replace(V1, sampler=sampler),
            replace(V1, guidance=(1.0, 1.0)),
            replace(V1, guidance_steps=2, sampler="argmax"),
        ]
        return [
            row(v1, prompt, seed, config)
            for seed, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=False))
        ]

    for replayed, expected in zip(
        run(v1, *rows()), run(Pipeline.of(v1.bundle), *rows()), strict=True
    ):
        assert agreement(replayed, expected) >= 0.99
    assert not v1_graphs.counters["graph_eager_steps", ""]
    assert v1_graphs.counters["graph_captures", "false"] == 6 + 3 * 3


def test_rows_of_v1_with_regions_are_computed_eagerly_beside_others(v1, v1_graphs):
    def rows() -> list[Row]:
        (other,) = v1.encode(["red"])
        plain, own = row(v1), row(v1, seed=1)
        region = RegionBranch(v1.condition(other), torch.eye(16))
        return [
            plain,
            v1.start(own.noise, own.sampling, own.conditional, own.unconditional, [region]),
        ]

    for replayed, expected in zip(
        run(v1, *rows()), run(Pipeline.of(v1.bundle), *rows()), strict=True
    ):
        assert agreement(replayed, expected) >= 0.99
    assert v1_graphs.counters["graph_eager_steps", ""] == PLAIN.steps


def test_graphs_of_v1_are_of_its_steps_and_beside_them_of_its_images(v1):
    pipeline, eager = Pipeline.of(v1.bundle), Pipeline.of(v1.bundle)
    recorded, counters = list[int](), Counter[Count]()

    def new_recorder() -> Callable[[Callable[[], Tensor]], Rerun]:
        number = len(recorded)
        recorded.append(0)

        def record(function: Callable[[], Tensor]) -> Rerun:
            recorded[number] += 1
            return rerun(function)

        return record

    shapes = GraphShapes.for_server(v1.config, [v1.config.native_size], 1, 1)
    use_cuda_graphs(pipeline, shapes, new_recorder, counters)
    # Steps of one branch and of two, and draws of three samplers.
    assert recorded == [2 + 3, 1]
    tokens = pipeline.generate_tokens(["red apple"], [7], V1)
    assert agreement(tokens, eager.generate_tokens(["red apple"], [7], V1)) >= 0.99
    assert (pipeline.decode(tokens).int() - eager.decode(tokens).int()).abs().max() <= 1
    assert counters["graph_replays", ""] == 2 * V1.steps + 1
    assert not counters["graph_eager_steps", ""]


def test_what_cannot_be_recorded_is_computed_eagerly(pipeline):
    def refuse_large(function: Callable[[], Tensor]) -> Rerun:
        recording = rerun(function)
        if len(recording.output) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return recording

    counters: Counter[Count] = Counter()
    graphs = StepGraphs(
        pipeline, [Bucket(GRID, rows, 2, 80) for rows in (1, 2)], refuse_large, counters
    )
    graphs.capture_all()
    assert counters["graph_captures", "false"] == 1 + len(SAMPLERS)
    replaying = PipelineV3(pipeline.bundle)
    replaying.executor = graphs
    for tokens, expected in zip(
        run(replaying, row(pipeline), row(pipeline, seed=1)),
        eagerly(pipeline, row(pipeline), row(pipeline, seed=1)),
        strict=True,
    ):
        assert agreement(tokens, expected) >= 0.99
    assert counters["graph_eager_steps", ""] == PLAIN.steps
