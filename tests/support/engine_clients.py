"""An engine client with workers of its own, its jobs and figures."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from model.config import SamplingConfig
from server.engine.client import EngineClient
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
