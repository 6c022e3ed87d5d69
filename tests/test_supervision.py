"""Workers that are killed, break or hang are replaced; what they had is done all the same, and a
poison request harms only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from load_tests import faulty_runner
from model.config import SamplingConfig
from model.pipeline import Pipeline
from server.engine.client import MAX_SOLO_CRASHES, EngineClient
from server.engine.errors import JobFailed, WorkerLost
from server.engine.hooks import Hooks
from server.engine.job import Job
from server.engine.messages import Preview
from server.metrics import Metrics
from server.settings import Settings
from tests import fake_worker
from tests.test_client import figure, job, kill, running, until

STEPS = SamplingConfig(
    steps=6,
    renoise_steps=5,
    guidance=(4.0, 4.0),
    guidance_steps=6,
    temperature=(0.7, 0.3),
    sampler="multinomial",
)
PATIENCE_S = 240.0


async def holding(client: EngineClient, count: int) -> list[asyncio.Task[object]]:
    """Jobs that the worker has, together, and will not finish by itself."""
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(client.run(job("hold", seconds=PATIENCE_S))) for _ in range(count)
    ]
    await until(lambda: figure(client, "paella_rows_running") == count)
    return tasks


# ── against a fake worker ─────────────────────────────────────────────────────────────────────────


async def test_what_a_killed_worker_had_is_given_to_the_next_one() -> None:
    async with running() as client:
        tasks = await holding(client, 3)
        kill(client)
        await until(lambda: figure(client, "paella_worker_restarts_total") == 1)
        await until(lambda: figure(client, "paella_rows_running") == 3)
        assert figure(client, "paella_requests_replayed_total") == 3
        assert not any(task.done() for task in tasks)
        assert client.status().ready
        for task in tasks:
            task.cancel()


async def test_a_poison_request_fails_after_two_solo_crashes_and_no_other_fails() -> None:
    async with running() as client:
        tasks = await holding(client, 2)
        with pytest.raises(JobFailed) as failure:
            await client.run(job("die", seconds=PATIENCE_S))
        assert (failure.value.code, failure.value.retryable) == ("poison", False)
        await until(lambda: figure(client, "paella_rows_running") == 2)
        # Once in company, then as often alone as it takes.
        assert figure(client, "paella_worker_restarts_total") == 1 + MAX_SOLO_CRASHES
        assert not any(task.done() for task in tasks)
        await client.run(job())
        for task in tasks:
            task.cancel()


async def test_a_silent_worker_is_replaced_and_the_request_that_hangs_is_given_up() -> None:
    async with running(stall_timeout_s=2) as client:
        await client.run(job())
        with pytest.raises(JobFailed):
            await client.run(job("hang", seconds=PATIENCE_S))
        await client.run(job())
        assert figure(client, "paella_worker_restarts_total") == MAX_SOLO_CRASHES


async def test_a_worker_that_hangs_after_its_only_client_has_gone_is_replaced_too() -> None:
    async with running(stall_timeout_s=2) as client:
        await client.run(job())
        hanging = asyncio.create_task(client.run(job("hang", seconds=PATIENCE_S)))
        await until(lambda: client.workers[0].rows_owed == 1)
        hanging.cancel()
        await until(lambda: figure(client, "paella_worker_restarts_total") == 1)
        assert figure(client, "paella_requests_replayed_total") == 0


async def test_readiness_tells_why_and_how_many_requests_wait() -> None:
    async with running() as client:
        tasks = await holding(client, 2)
        kill(client)
        await until(lambda: not client.status().ready)
        assert (
            client.status().reason
            == "the worker exited with code -9; another is starting; requests waiting: 2"
        )
        await until(lambda: client.status().ready)
        assert client.status().reason == "ready"
        for task in tasks:
            task.cancel()


async def test_requests_of_a_lost_worker_wait_for_the_next_only_so_long() -> None:
    async with running(start_wait_s=0.05) as client:
        # The first worker, too, must be there within that time: a job of a worker that is there
        # does not wait.
        await until(lambda: client.status().ready)
        held = (await holding(client, 1))[0]
        kill(client)
        with pytest.raises(WorkerLost):
            await held


async def test_a_cancelled_request_is_not_repeated() -> None:
    async with running() as client:
        doomed, other = await holding(client, 2)
        doomed.cancel()
        kill(client)
        await until(lambda: figure(client, "paella_worker_restarts_total") == 1)
        await until(lambda: figure(client, "paella_rows_running") == 1)
        assert figure(client, "paella_requests_replayed_total") == 1
        other.cancel()


async def test_the_time_from_a_cancellation_until_the_rows_have_left_is_measured() -> None:
    async with running() as client:
        held = (await holding(client, 1))[0]
        held.cancel()
        await until(lambda: figure(client, "paella_cancel_duration_seconds_count") == 1)
        assert client.workers[0].rows_owed == 0


async def test_a_worker_that_dies_in_the_midst_of_an_answer_has_not_given_it() -> None:
    async with running() as client:
        answer = await client.run(job("half", rows=3, seconds=PATIENCE_S))
        assert [image.pixels for image in answer.images[::-1]] == [
            fake_worker.colour(i) * (32 * 16) for i in range(3)
        ]
        assert figure(client, "paella_requests_replayed_total") == 1


@pytest.mark.parametrize("word", ["show", "half-show"])
async def test_previews_are_handed_on_once_each_though_a_worker_began_again(word: str) -> None:
    previews: list[Preview] = []
    async with running() as client:
        shown = replace(job(word, seconds=PATIENCE_S), previews=2)
        await client.run(shown, Hooks(on_preview=previews.append))
        assert figure(client, "paella_requests_replayed_total") == (word == "half-show")
    assert [(preview.number, preview.image.pixels[:3]) for preview in previews] == [
        (i, fake_worker.colour(i)) for i in range(2)
    ]


# ── against real workers ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stall_timeout_s() -> float:
    return 15.0


@pytest_asyncio.fixture
async def client(random_bundle: Path, stall_timeout_s: float) -> AsyncIterator[EngineClient]:
    settings = Settings(
        weights=str(random_bundle),
        device="cpu",
        dtype="float32",
        drain_timeout_s=0,
        start_wait_s=PATIENCE_S,
        stall_timeout_s=stall_timeout_s,
        threads=1,
    )
    client = EngineClient(settings, Metrics(), faulty_runner.main)
    await client.start()
    yield client
    await client.stop()


def picture(prompt: str, seed: int) -> Job:
    return replace(
        job(prompt, seconds=PATIENCE_S),
        model="random",
        width=32,
        height=32,
        seeds=(seed,),
        sampling=STEPS,
    )


async def ask(client: EngineClient, *prompts: str) -> list[object]:
    """Answers or errors of jobs that are sent together; the seed is the place."""
    jobs = [picture(prompt, seed) for seed, prompt in enumerate(prompts)]
    return await asyncio.gather(*(client.run(each) for each in jobs), return_exceptions=True)


def same_picture(answer: object, pipeline: Pipeline, prompt: str, seed: int) -> bool:
    assert not isinstance(answer, BaseException), answer
    drawn = np.frombuffer(answer.images[0].pixels, np.uint8)  # type: ignore[attr-defined]
    # One token in sixty-four may fall to the other side of a rounding, and shows in its
    # surroundings.
    return bool(np.mean(drawn == pipeline.generate([prompt], [seed], STEPS).numpy().ravel()) >= 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "stall_timeout_s"),
    # A worker that hangs is waited for up to three times.
    [("accelerator", 15.0), ("kill", 15.0), ("hang", 4.0)],
)
async def test_neighbours_of_a_fatal_request_get_the_pictures_of_their_seeds(
    client: EngineClient, pipeline: Pipeline, fault: str
) -> None:
    first, poisoned, last = await ask(client, "red apple", f"{fault} apple", "the apple")
    assert same_picture(first, pipeline, "red apple", 0)
    assert same_picture(last, pipeline, "the apple", 2)
    assert isinstance(poisoned, JobFailed)
    assert (poisoned.code, poisoned.retryable) == ("poison", False)
    assert figure(client, "paella_worker_restarts_total") in (
        MAX_SOLO_CRASHES,
        MAX_SOLO_CRASHES + 1,
    )


@pytest.mark.parametrize(("fault", "code"), [("bug", "internal"), ("memory", "out_of_memory")])
async def test_what_can_be_survived_costs_no_worker(
    client: EngineClient, pipeline: Pipeline, fault: str, code: str
) -> None:
    first, guilty, last = await ask(client, "red apple", f"{fault} apple", "the apple")
    assert same_picture(first, pipeline, "red apple", 0)
    assert same_picture(last, pipeline, "the apple", 2)
    assert isinstance(guilty, JobFailed)
    assert guilty.code == code
    assert figure(client, "paella_worker_restarts_total") == 0


@pytest.mark.slow
async def test_a_worker_killed_at_work_is_replaced_and_the_picture_is_that_of_the_seed(
    client: EngineClient, pipeline: Pipeline
) -> None:
    await client.run(picture("red apple", 1))
    long = replace(picture("red apple", 7), sampling=replace(STEPS, steps=64))
    started = asyncio.Event()
    task = asyncio.create_task(client.run(long, Hooks(on_started=started.set)))
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    kill(client)
    answer = await task
    expected = pipeline.generate(["red apple"], [7], long.sampling).numpy().ravel()
    assert np.mean(np.frombuffer(answer.images[0].pixels, np.uint8) == expected) >= 0.9
    assert figure(client, "paella_requests_replayed_total") == 1
