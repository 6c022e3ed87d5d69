"""deterministic=true: the same tokens at every step and the same file, bit for bit, whatever
else the worker does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from model import rows as operations
from model.config import SamplingConfig
from model.executor import SamplingInputs
from model.rows import PinnedTokens, RegionBranch, Row
from server.api.images.encode import encode
from server.engine.job import Job
from server.engine.messages import Image
from server.engine.prompt_cache import tensors_in
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId, Scheduler
from server.settings import Settings
from tests.conftest import emptied

SEEDS = (0, 7, -(2**63))
STEPS = 5
FIXED = SamplingConfig(
    steps=STEPS,
    renoise_steps=4,
    guidance=(4.0, 2.0),
    guidance_steps=3,
    temperature=(0.7, 0.3),
    sampler="multinomial",
    typical_mass=0.2,
    deterministic=True,
)
LOOSE = replace(FIXED, deterministic=False)


def job(
    id: str, prompt: str = "red apple", seeds: tuple[int, ...] = (7,), **changes: object
) -> Job:
    sampling = changes.pop("sampling", FIXED)
    return replace(Job(id, "random", prompt, "", 32, 32, seeds, sampling, deadline=60.0), **changes)  # type: ignore[arg-type]


def neighbour(i: int, **changes: object) -> Job:
    return job(
        f"neighbour{i}",
        **{
            "prompt": "the apple " * i,
            "seeds": (i,),
            "sampling": LOOSE,
            "deadline": 50.0 + 4 * i,
            **changes,
        },
    )


@dataclass
class Loop:
    """The worker's loop without a process.

    tokens, features: every row's, of each of its steps. Tokens seldom show that a sum was rounded
    differently; the features they are drawn from always do.
    """

    runner: Runner
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(16))
    tokens: dict[RowId, list[bytes]] = field(default_factory=dict)
    features: dict[RowId, list[bytes]] = field(default_factory=dict)
    images: dict[RowId, Image] = field(default_factory=dict)
    turns: list[set[str]] = field(default_factory=list)

    def turn(self) -> None:
        if parts := [(self.scheduler.job(row.job), [row.index]) for row in self.scheduler.admit()]:
            self.runner.start(parts, Stopwatch())
        rows = self.scheduler.next_rows()
        self.turns.append({row.job for row in rows})
        self._step(rows)
        done = list(filter(self.runner.done, rows))
        for row in rows:
            self.tokens.setdefault(row, []).append(self.runner.rows[row].tokens.numpy().tobytes())
        for row, image in zip(
            done, self.runner.decode("random", done).images() if done else [], strict=True
        ):
            self.images[row] = image
            self.scheduler.finish(row)
        self.runner.drop(done)

    def _step(self, rows: list[RowId]) -> None:
        def draw(
            drawn: Sequence[Row], features: torch.Tensor, drawing: SamplingInputs
        ) -> torch.Tensor:
            for row, own in zip(rows, features, strict=True):
                self.features.setdefault(row, []).append(own.numpy().tobytes())
            return type(pipeline)._sample(pipeline, drawn, features, drawing)

        pipeline = self.runner.pipelines["random"]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pipeline, "_sample", draw)
            self.runner.step("random", rows)

    def cancel(self, id: str) -> None:
        self.runner.drop(self.scheduler.remove(id))

    def run(self) -> None:
        while self.scheduler.rows_running or self.scheduler.rows_waiting:
            self.turn()

    def outcome(self, id: str, index: int = 0) -> tuple[list[bytes], list[bytes], bytes]:
        """Tokens and features of every step, and the PNG."""
        row = RowId(id, index)
        return self.tokens[row], self.features[row], encode(self.images[row], "png", 90, {})


@pytest.fixture
def loop(runner: Runner) -> Loop:
    return Loop(emptied(runner))


@pytest.fixture(scope="module")
def alone(
    runner: Runner, random_settings: Settings
) -> Callable[..., tuple[list[bytes], list[bytes], bytes]]:
    """What a job comes to in a worker that has never done anything else; asked the same again,
    it remembers. With `again`, the worker has weights of its own.
    """
    known: dict[Job, tuple[list[bytes], list[bytes], bytes]] = {}

    def draw(wanted: Job, again: bool = False) -> tuple[list[bytes], list[bytes], bytes]:
        key = replace(wanted, id="", deadline=0.0)
        if key not in known or again:
            loop = Loop(Runner(random_settings) if again else emptied(runner))
            loop.scheduler.add(wanted)
            loop.run()
            known[key] = loop.outcome(wanted.id)
        return known[key]

    return draw


def test_two_workers_agree(alone):
    assert alone(job("a")) == alone(job("a"), again=True)


def test_the_comparison_sees_another_seed(alone):
    tokens, _, png = alone(job("a"))
    others, _, other_png = alone(job("a", seeds=(8,)))
    assert all(one != other for one, other in zip(tokens, others, strict=True))
    assert png != other_png


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("others", [1, 2, 7])
def test_in_company_of_any_size(loop, alone, seed, others):
    wanted = job("a", seeds=(seed,))
    loop.scheduler.add(wanted)
    for i in range(others):
        loop.scheduler.add(neighbour(i))
    loop.run()
    assert loop.outcome("a") == alone(wanted)
    # It was in company indeed: others stepped before its last step, and together.
    last = max(i for i, turn in enumerate(loop.turns) if turn == {"a"})
    assert any("neighbour0" in turn for turn in loop.turns[:last])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("turns", range(STEPS))
@pytest.mark.parametrize("deadline", [10.0, 90.0])
def test_joining_late(loop, alone, seed, turns, deadline):
    loop.scheduler.add(neighbour(0))
    loop.scheduler.add(neighbour(1))
    for _ in range(turns):
        loop.turn()
    loop.scheduler.add(job("a", seeds=(seed,), deadline=deadline))
    loop.run()
    assert loop.outcome("a") == alone(job("a", seeds=(seed,)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("turns", range(STEPS))
def test_neighbours_that_leave(loop, alone, seed, turns):
    loop.scheduler.add(job("a", seeds=(seed,), deadline=52.0))
    for i in range(3):
        loop.scheduler.add(neighbour(i))
    for _ in range(turns):
        loop.turn()
    loop.cancel("neighbour1")
    loop.cancel("neighbour0")
    loop.run()
    assert loop.outcome("a") == alone(job("a", seeds=(seed,)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("operation", ["repaint", "edit", "regions"])
def test_neighbours_of_other_operations(loop, alone, monkeypatch, seed, operation):
    start, pipeline = loop.runner.start, loop.runner.pipelines["random"]
    picture = torch.randint(64, pipeline.grid(32, 32), generator=torch.Generator().manual_seed(1))

    def start_operations(parts, watch):
        truncated = start(parts, watch)
        for row in (
            loop.runner.rows[RowId(job.id, i)]
            for job, indices in parts
            for i in indices
            if job.id != "a"
        ):
            if operation == "repaint":
                operations.repaint(row, PinnedTokens(picture, picture > 30))
            elif operation == "edit":
                operations.edit(row, picture, 0.6)
            else:
                row.regions = (RegionBranch(row.conditional, (picture > 30).float()),)
        return truncated

    monkeypatch.setattr(loop.runner, "start", start_operations)
    loop.scheduler.add(neighbour(0))
    loop.scheduler.add(job("a", seeds=(seed,)))
    loop.scheduler.add(neighbour(1))
    loop.run()
    assert loop.outcome("a") == alone(job("a", seeds=(seed,)))


@pytest.mark.parametrize("size", [(16, 16), (48, 16), (64, 64)])
def test_neighbours_of_other_sizes_and_a_row_of_any_size(loop, alone, size):
    width, height = size
    loop.scheduler.add(job("a", width=width, height=height))
    loop.scheduler.add(neighbour(0, width=64, height=32))
    loop.scheduler.add(neighbour(1, width=width, height=height))
    loop.run()
    assert loop.outcome("a") == alone(job("a", width=width, height=height))


@pytest.mark.parametrize("prompt", ["", "red apple", "the red apple " * 4])
@pytest.mark.parametrize("negative", ["", "an apple " * 5])
def test_prompts_of_any_length_whatever_was_encoded_before(loop, alone, prompt, negative):
    wanted = job("a", prompt, negative_prompt=negative)
    # The very same texts, encoded in one batch for somebody who did not ask for this.
    loop.scheduler.add(
        neighbour(0, prompt=prompt, negative_prompt="the red apple " * 3, deadline=1.0)
    )
    loop.scheduler.add(neighbour(1, prompt="apple", negative_prompt=negative, deadline=1.0))
    loop.scheduler.add(wanted)
    loop.run()
    assert loop.outcome("a") == alone(wanted)


@pytest.mark.parametrize("sampler", ["multinomial", "argmax", "typical", "quant"])
def test_every_sampler_among_others(loop, alone, sampler):
    wanted = job("a", sampling=replace(FIXED, sampler=sampler))
    loop.scheduler.add(wanted)
    for i, other in enumerate(("multinomial", "argmax", "typical", "quant")):
        loop.scheduler.add(neighbour(i, sampling=replace(LOOSE, sampler=other)))
    loop.run()
    assert loop.outcome("a") == alone(wanted)


@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_every_order_of_renoising_among_others(loop, alone, order):
    wanted = job("a", sampling=replace(FIXED, renoise_order=order, guidance_start=1))
    loop.scheduler.add(wanted)
    for i, other in enumerate(("random", "halton", "confidence")):
        loop.scheduler.add(neighbour(i, sampling=replace(LOOSE, renoise_order=other)))
    loop.run()
    assert loop.outcome("a") == alone(wanted)
    assert alone(wanted)[0] != alone(job("a"))[0]


def test_image_i_of_a_seed_is_the_first_image_of_seed_plus_i(loop, alone):
    loop.scheduler.add(job("many", seeds=(7, 8, 9)))
    loop.run()
    for i, seed in enumerate((7, 8, 9)):
        assert loop.outcome("many", i) == alone(job("a", seeds=(seed,)))


def test_the_images_of_one_job_are_started_together_to_the_same_end(runner, loop):
    loop.runner.start([(job("many", seeds=(7, 8, 9)), range(3)), (neighbour(0), [0])], Stopwatch())
    for i, seed in enumerate((7, 8, 9)):
        single = emptied(runner)
        single.start([(job("a", seeds=(seed,)), [0])], Stopwatch())
        rows = loop.runner.rows[RowId("many", i)], single.rows[RowId("a", 0)]
        assert all(torch.equal(x, y) for x, y in zip(*map(tensors_in, rows), strict=True))


@pytest.mark.parametrize("capacity", [0, 2**30])
def test_what_is_remembered_is_what_would_be_computed_again(runner, alone, capacity):
    loop = Loop(emptied(runner, capacity))
    for i in range(3):
        loop.scheduler.add(job(f"{i}"))
        loop.scheduler.add(neighbour(i, prompt="red apple", seeds=(7,)))
        loop.run()
    hits = loop.runner.counters["prompt_cache_hits", "prior"]
    assert [loop.outcome(f"{i}") for i in range(3)] == [alone(job("a"))] * 3
    assert hits == (4 if capacity else 0)
