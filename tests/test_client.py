"""The engine's client against a fake worker: answers, refusals, deadlines, cancellation,
starting and stopping.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from model.config import SamplingConfig
from server.engine.client import EngineClient
from server.engine.errors import DeadlineExceeded, Draining, JobFailed, QueueFull, Starting
from server.engine.job import Job
from server.engine.worker_process import WorkerMain
from server.metrics import Metrics
from server.settings import Settings
from tests import fake_worker

SAMPLING = SamplingConfig(
    steps=1,
    renoise_steps=0,
    guidance=(1.0, 1.0),
    guidance_steps=0,
    temperature=(1.0, 1.0),
    sampler="argmax",
)

ids = count()


def job(prompt: str = "a ball", *, rows: int = 1, seconds: float = 15.0) -> Job:
    deadline = time.monotonic() + seconds
    return Job(str(next(ids)), "fake", prompt, "", 32, 16, tuple(range(rows)), SAMPLING, deadline)


@asynccontextmanager
async def running(
    worker: WorkerMain = fake_worker.main, **settings: Any
) -> AsyncIterator[EngineClient]:
    client = EngineClient(Settings(**{"drain_timeout_s": 0, **settings}), Metrics(), worker)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):  # a busy machine takes long to start a process
        while not condition():  # noqa: ASYNC110 -- the figures polled have no event
            await asyncio.sleep(0.005)


def kill(client: EngineClient) -> None:
    """Kill the first worker as `kill -9` and the kernel's out-of-memory killer do."""
    pid = client.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def figure(client: EngineClient, name: str, **labels: str) -> float | None:
    return client.metrics.registry.get_sample_value(name, labels)


async def test_jobs_sent_before_the_worker_is_ready_are_answered_once_it_is() -> None:
    async with running() as client:
        assert not client.status().ready
        finished = await client.run(job(rows=3))
        assert sorted(image.index for image in finished.images) == [0, 1, 2]
        assert finished.images[-1].pixels == fake_worker.colour(0) * (32 * 16)
        assert finished.timings.queue > 0.001  # the wait for the worker is part of it
        assert (client.status().ready, client.status().device) == (True, "fake")
        assert client.rows_unfinished == 0


async def test_many_jobs_at_once_each_get_their_own_answer() -> None:
    async with running() as client:
        jobs = [job(rows=1 + i % 3) for i in range(40)]
        answers = await asyncio.gather(*(client.run(each) for each in jobs))
        assert [answer.id for answer in answers] == [each.id for each in jobs]
        assert [len(answer.images) for answer in answers] == [len(each.seeds) for each in jobs]


async def test_the_queue_is_bounded_in_rows_and_says_when_to_come_back() -> None:
    async with running(queue_rows=4) as client:
        held = asyncio.create_task(client.run(job("hold", rows=3)))
        await until(lambda: client.rows_unfinished == 3)
        with pytest.raises(QueueFull) as refusal:
            await client.run(job(rows=2))
        assert refusal.value.retry_after > 0
        assert len((await client.run(job(rows=1))).images) == 1
        held.cancel()


async def test_a_job_larger_than_the_queue_is_done_when_it_is_alone() -> None:
    async with running(queue_rows=2) as client:
        assert len((await client.run(job(rows=5))).images) == 5


async def test_retry_after_follows_the_measured_pace() -> None:
    async with running(queue_rows=8) as client:
        for _ in range(4):
            await client.run(job("slow", rows=8))
        held = asyncio.create_task(client.run(job("hold", rows=8)))
        await until(lambda: client.rows_unfinished == 8)
        with pytest.raises(QueueFull) as refusal:
            await client.run(job())
        assert 0.5 * fake_worker.SLOW_S < refusal.value.retry_after < 4 * fake_worker.SLOW_S
        held.cancel()


async def test_cancelling_the_caller_frees_the_worker() -> None:
    async with running() as client:
        held = asyncio.create_task(client.run(job("hold", rows=2)))
        await until(lambda: figure(client, "paella_rows_running") == 2)
        held.cancel()
        await until(lambda: figure(client, "paella_rows_running") == 0)
        assert figure(client, "paella_cancelled_total", stage="worker") == 1
        assert client.rows_unfinished == 0


async def test_a_passed_deadline_ends_the_job_and_frees_the_worker() -> None:
    async with running() as client:
        await client.run(job())
        with pytest.raises(DeadlineExceeded):
            await client.run(job("hold", seconds=0.2))
        await until(lambda: figure(client, "paella_rows_running") == 0)


async def test_a_deadline_already_passed_is_never_sent() -> None:
    async with running() as client:
        with pytest.raises(DeadlineExceeded):
            await client.run(job("die", seconds=-1))
        await client.run(job())
        assert figure(client, "paella_worker_restarts_total") == 0


@pytest.mark.parametrize(
    ("prompt", "code", "retryable"), [("fail", "internal", False), ("oom", "out_of_memory", True)]
)
async def test_a_job_the_worker_cannot_do_fails_alone(
    prompt: str, code: str, retryable: bool
) -> None:
    async with running() as client:
        with pytest.raises(JobFailed) as failure:
            await client.run(job(prompt))
        assert (failure.value.code, failure.value.retryable) == (code, retryable)
        await client.run(job())


async def test_the_workers_own_view_of_the_deadline_counts() -> None:
    async with running() as client:
        with pytest.raises(DeadlineExceeded):
            await client.run(job("late"))


async def test_an_idle_worker_never_counts_as_silent() -> None:
    async with running(stall_timeout_s=0.2) as client:
        await client.run(job())
        with pytest.raises(DeadlineExceeded):
            await client.run(job("hold", seconds=0.05))
        await asyncio.sleep(0.5)
        assert client.status().ready
        assert figure(client, "paella_worker_restarts_total") == 0


async def test_requests_wait_for_a_starting_worker_only_so_long() -> None:
    async with running(fake_worker.slow_to_start, start_wait_s=0.05) as client:
        with pytest.raises(Starting, match="starting"):
            await client.run(job())


async def test_a_worker_that_cannot_start_is_retried_ever_more_slowly() -> None:
    async with running(fake_worker.dead_on_arrival) as client:
        await until(lambda: figure(client, "paella_worker_restarts_total") == 1)
        assert not client.status().ready


async def test_stopping_finishes_what_was_begun_and_refuses_the_rest() -> None:
    async with running(drain_timeout_s=10) as client:
        await client.run(job())
        begun = asyncio.create_task(client.run(job("slow")))
        await until(lambda: client.rows_unfinished == 1)
        stopping = asyncio.create_task(client.stop())
        await until(lambda: client.status().reason == "draining")
        with pytest.raises(Draining):
            await client.run(job())
        assert len((await begun).images) == 1
        await stopping


async def test_stopping_does_not_wait_for_what_cannot_finish() -> None:
    async with running(drain_timeout_s=0.05) as client:
        held = asyncio.create_task(client.run(job("hold")))
        await until(lambda: figure(client, "paella_rows_running") == 1)
        await client.stop()
        with pytest.raises(Draining):
            await held


async def test_several_workers_share_what_comes_and_one_takes_over_what_another_loses() -> None:
    async with running(devices="cpu,cpu") as client:
        await until(lambda: all(worker.accepting for worker in client.workers))
        tasks = [asyncio.create_task(client.run(job("hold", seconds=60))) for _ in range(4)]
        await until(lambda: figure(client, "paella_rows_running") == 4)
        assert [worker.rows_owed for worker in client.workers] == [2, 2]
        kill(client)
        await until(lambda: client.workers[1].rows_owed == 4)
        assert client.status().ready
        assert figure(client, "paella_requests_replayed_total") == 2
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()


async def test_what_is_unfinished_when_a_worker_dies_while_stopping_is_still_done() -> None:
    async with running(drain_timeout_s=60) as client:
        await client.run(job())
        begun = asyncio.create_task(client.run(job("slow", seconds=60)))
        await until(lambda: client.workers[0].rows_owed == 1)
        kill(client)
        await client.stop()
        assert len((await begun).images) == 1
