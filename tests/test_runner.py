"""What the runner remembers of prompts and priors, how it batches what it has to compute, and
what it decodes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, starmap

import numpy as np
import pytest
import torch

from model.image_request import Edit, InputImage
from model.pipeline import Pipeline
from server.engine.cpu_threads import ThreadTuner
from server.engine.cuda_streams import Mark, Streams
from server.engine.job import Job
from server.engine.prompt_cache import entry_bytes, leaves, tensor_bytes, tensors_in
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.settings import Settings
from tests.conftest import emptied
from tests.test_worker import SAMPLING, job


class Calls:
    """What the encoders and the prior were called with."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[Sequence[str]] = []
        self.priors: list[int] = []
        encode, prior_embeddings = pipeline.encode, pipeline.prior_embeddings
        monkeypatch.setattr(
            pipeline, "encode", lambda prompts: self.texts.append(prompts) or encode(prompts)
        )
        monkeypatch.setattr(
            pipeline,
            "prior_embeddings",
            lambda p, *rest: self.priors.append(len(p)) or prior_embeddings(p, *rest),
        )


@pytest.fixture(name="runner")
def _fresh(runner: Runner) -> Runner:
    return emptied(runner)


@pytest.fixture
def calls(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(runner.pipelines["random"], monkeypatch)


def started(runner: Runner, *jobs: Job) -> list[RowId]:
    runner.start([(each, range(len(each.seeds))) for each in jobs], Stopwatch())
    return [RowId(each.id, i) for each in jobs for i in range(len(each.seeds))]


def drawn(runner: Runner, *jobs: Job) -> list[torch.Tensor]:
    """Every image's tokens."""
    rows = started(runner, *jobs)
    for _ in range(SAMPLING.steps):
        runner.step("random", rows)
    return [runner.rows[row].tokens for row in rows]


def test_the_same_prompt_and_seed_are_neither_encoded_nor_drawn_again_and_answer_the_same_tokens(
    runner, calls
):
    first = drawn(runner, job("a"))
    assert (len(calls.texts), calls.priors) == (1, [1])
    again = drawn(runner, job("b"))
    assert (len(calls.texts), calls.priors) == (1, [1])
    assert torch.equal(first[0], again[0])


def test_the_same_prompt_with_another_seed_is_encoded_once(runner, calls):
    started(runner, job("a", seeds=(0,)))
    started(runner, job("b", seeds=(0, 1, 2)))
    assert (len(calls.texts), calls.priors) == (1, [1, 2])
    assert (
        runner.counters["prompt_cache_hits", "text"],
        runner.counters["prompt_cache_hits", "prior"],
    ) == (2, 1)


def test_a_seed_s_prior_at_another_size_is_another_one(runner, calls, pipeline):
    started(runner, job("a"))
    (row,) = started(runner, job("b", width=48))
    assert calls.priors == [1, 1]
    prompt, noise = pipeline.encode(["red apple"])[0], pipeline.noise(0, 48, 32, SAMPLING.steps)
    expected = pipeline.condition(prompt, *pipeline.prior_embeddings([prompt], [noise]))
    torch.testing.assert_close(
        list(tensors_in(runner.rows[row].conditional)), list(tensors_in(expected))
    )


def test_arrivals_are_encoded_together_but_for_other_lengths(runner, calls):
    long = "the red apple " * 3
    started(
        runner, job("a"), job("b", "apple", seeds=(1, 2)), job("c", long, negative_prompt="apple")
    )
    assert sorted(map(list, calls.texts), key=len) == [[long], ["red apple", "apple", "", "apple"]]
    assert calls.priors == [4]


def test_what_a_neighbour_s_length_would_pad_is_not_padded(runner):
    short, _ = started(runner, job("a", "apple"), job("b", "the red apple " * 3))
    beside = [tensor.shape for tensor in tensors_in(runner.rows[short].conditional)]
    alone = emptied(runner)
    (row,) = started(alone, job("a", "apple"))
    assert [tensor.shape for tensor in tensors_in(alone.rows[row].conditional)] == beside


def test_an_unguided_job_encodes_no_negative_prompt(runner, calls):
    started(runner, job("a", sampling=replace(SAMPLING, guidance=(1.0, 1.0))))
    assert [list(batch) for batch in calls.texts] == [["red apple"]]


def test_the_bound_on_bytes_holds_and_what_does_not_fit_is_computed_all_the_same(runner, calls):
    small = emptied(runner, capacity=10_000)
    rows = started(small, *(job(f"{i}", "apple " * (i % 5), seeds=(i,)) for i in range(12)))
    assert len(small.rows) == len(rows) == 12
    assert 0 < small.cache.held <= 10_000
    assert small.cache.held == sum(starmap(entry_bytes, small.cache.items()))


def test_the_prompts_of_cached_results_count_for_the_bound(runner):
    small = emptied(runner, capacity=1_000_000)
    started(small, *(job(f"{i}", chr(0x4E00 + i) * 100_000) for i in range(10)))
    held = {text for key, _ in small.cache.items() for text in leaves(key) if isinstance(text, str)}
    assert 0 < sum(map(sys.getsizeof, held)) <= 1_000_000


def test_what_is_remembered_holds_no_memory_of_its_batch(runner):
    started(runner, *(job(f"{i}", f"apple {i}", seeds=(i,)) for i in range(8)))
    for value in dict(runner.cache.items()).values():
        assert tensor_bytes(value) == sum(tensor.nbytes for tensor in tensors_in(value))


def test_an_unfinished_row_shows_what_its_last_step_drew(runner, pipeline):
    (row,) = started(runner, job("a"))
    runner.step("random", [row])
    decoding = runner.decode("random", [row])
    assert not torch.equal(runner.rows[row].drawn, runner.rows[row].tokens), (
        "start tokens were put back"
    )
    assert decoding.steps == (1,)
    (image,) = decoding.images()
    expected = pipeline.decode(runner.rows[row].drawn[None])
    assert np.array_equal(np.frombuffer(image.pixels, np.uint8), expected.numpy().ravel())


class Recalled(Streams):
    """What is read beside the steps, and that it is read there."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.reading: list[torch.Tensor] = []
        self.inside = False

    @contextmanager
    def beside(self, reading: Iterable[torch.Tensor] = ()) -> Iterator[None]:
        self.reading, self.inside = list(reading), True
        yield
        self.inside = False


def test_a_row_that_is_done_as_it_begins_is_read_in_the_stream_that_made_its_tokens(
    runner, monkeypatch
):
    streams, stack = Recalled(), torch.stack
    runner.streams = streams
    picture = InputImage(32, 32, bytes(32 * 32 * 3), "black")
    (row,) = started(runner, job("a", canvas=Edit(picture, strength=0.0)))
    assert runner.rows[row].done
    monkeypatch.setattr(
        torch,
        "stack",
        lambda tensors: (
            stack(tensors) if streams.inside else pytest.fail("stacked in another stream")
        ),
    )
    runner.decode("random", [row])
    assert [tensor is runner.rows[row].tokens for tensor in streams.reading] == [True]


class Event:
    """Stands in for the device's: what is before it is computed once `passed` is set."""

    def __init__(self) -> None:
        self.passed = self.waited = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waited = True


class Launched(Streams):
    """A stream whose work is not computed at once, with the tensors handed over to the steps."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[Event] = []
        self.handed: list[torch.Tensor] = []

    def mark(self) -> Mark:
        self.events.append(Event())
        return Mark(self.events[-1])  # type: ignore[arg-type]

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        self.handed += tensors


def test_a_row_is_stepped_once_its_beginning_is_computed_and_handed_over_once(runner):
    runner.streams = streams = Launched()
    (first,) = started(runner, job("a"))
    (second,) = started(runner, job("b"))
    streams.events[1].passed = True
    assert runner.started([first, second]) == [second]
    assert any(tensor is runner.rows[second].tokens for tensor in streams.handed)
    assert not streams.events[0].waited
    # Nothing else can be stepped.
    assert runner.started([first]) == [first]
    assert streams.events[0].waited
    handed = len(streams.handed)
    assert runner.started([first, second]) == [first, second]
    assert len(streams.handed) == handed


def test_bundles_of_both_families_draw_in_one_runner(random_bundle, random_v1_bundle):
    runner = Runner(
        Settings(weights=f"{random_bundle},{random_v1_bundle}", device="cpu", dtype="float32")
    )
    runner.warm_up()
    for model, pipeline in runner.pipelines.items():
        wanted = replace(
            job(model),
            model=model,
            sampling=pipeline.config.recipe.sampling(steps=2, renoise_mode="rand"),
        )
        rows = started(runner, wanted)
        for _ in range(2):
            runner.step(model, rows)
        assert all(map(runner.done, rows))
        (image,) = runner.decode(model, rows).images()
        assert (image.width, image.height) == (wanted.width, wanted.height)


def test_a_deterministic_job_is_computed_by_all_threads_and_others_by_those_that_are_chosen(
    runner, monkeypatch
):
    computing, used = [4], list[int]()
    seconds = count()  # every step takes as long as any other
    threads = ThreadTuner(4, computing.append, lambda: float(next(seconds)))
    threads.chosen = 1
    monkeypatch.setattr(runner, "threads", threads)
    pipeline = runner.pipelines["random"]

    def watched(compute: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: used.append(computing[-1]) or compute(*args)

    for name in ("encode", "advance", "decode_tokens"):
        monkeypatch.setattr(pipeline, name, watched(getattr(pipeline, name)))
    for deterministic, expected in ((True, 4), (False, 1)):
        one = job(f"{deterministic}", sampling=replace(SAMPLING, deterministic=deterministic))
        drawn(runner, one)
        runner.decode("random", [RowId(one.id, 0)])
        assert set(used) == {expected}
        used.clear()
    assert computing[-1] == 1


@pytest.mark.parametrize(("threads", "most"), [(0, 3), (2, 1)])
def test_threads_are_chosen_unless_the_settings_say_how_many(runner, monkeypatch, threads, most):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    chosen = Runner(
        Settings(device="cpu", dtype="float32", threads=threads), runner.pipelines.values()
    )
    chosen.choose_threads()
    assert chosen.threads.tuner.chosen == most
