"""Files are made by a bounded number of threads, and requests are refused while too many wait."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable

import pytest

from server.api.images.encode_queue import ImageEncoder
from server.engine.errors import Draining, QueueFull


class Files:
    """Files that wait for an event, and how many were made at once."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)
        self.made = 0

    def make(self) -> str:
        self.begun.release()
        assert self.go_on.wait(30)
        self.made += 1
        return "file"


async def test_no_more_files_are_made_at_once_than_there_are_threads() -> None:
    encoder, files = ImageEncoder(threads=2), Files()
    tasks = [asyncio.create_task(encoder.run(files.make)) for _ in range(5)]
    for _ in range(2):
        assert await asyncio.to_thread(files.begun.acquire, timeout=30)
    assert not files.begun.acquire(blocking=False)
    assert encoder.images_unfinished == 5
    for task in tasks[3:]:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert encoder.images_unfinished == 3
    files.go_on.set()
    assert await asyncio.gather(*tasks[:3]) == ["file"] * 3
    assert (files.made, encoder.images_unfinished) == (3, 0), "nobody waits for the others"
    encoder.close()


@pytest.mark.parametrize(("cpus", "threads"), [(None, 2), (1, 2), (2, 2), (5, 5)])
async def test_there_is_a_thread_for_every_cpu_and_at_least_two(
    monkeypatch: pytest.MonkeyPatch, cpus: int | None, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    encoder, files = ImageEncoder(), Files()
    tasks = [asyncio.create_task(encoder.run(files.make)) for _ in range(threads + 1)]
    for _ in range(threads):
        assert await asyncio.to_thread(files.begun.acquire, timeout=30)
    assert not await asyncio.to_thread(files.begun.acquire, timeout=0.05)
    files.go_on.set()
    await asyncio.gather(*tasks)
    encoder.close()


async def test_requests_are_refused_while_too_many_images_wait_for_their_files() -> None:
    encoder, files = ImageEncoder(queue_images=8, threads=1), Files()
    encoder.check_room(64)
    animation = asyncio.create_task(encoder.run(files.make, images=6))
    assert await asyncio.to_thread(files.begun.acquire, timeout=30)
    encoder.check_room(2)
    waits = []
    for _ in range(3):
        with pytest.raises(QueueFull) as full:
            encoder.check_room(3)
        waits.append(full.value.retry_after)
    assert 0 < waits[0] < waits[1] < waits[2]
    files.go_on.set()
    await animation
    encoder.check_room(64)
    encoder.close()


async def refusal(encoder: ImageEncoder, images: int) -> float:
    """Return the seconds a request for images is told to wait while six wait for their files."""
    files = Files()
    others = asyncio.create_task(encoder.run(files.make, images=6))
    assert await asyncio.to_thread(files.begun.acquire, timeout=30)
    with pytest.raises(QueueFull) as full:
        encoder.check_room(images)
    files.go_on.set()
    await others
    encoder.close()
    return full.value.retry_after


# Before anything is measured, an image takes 0.02 s.
@pytest.mark.parametrize(("images", "wait_s"), [(3, 0.02), (8, 0.12)])
async def test_a_refused_client_waits_for_the_images_that_are_too_many(
    images: int, wait_s: float
) -> None:
    encoder = ImageEncoder(queue_images=8, threads=1)
    assert await refusal(encoder, images) == pytest.approx(wait_s)


async def test_the_wait_is_measured_by_the_files_of_the_encoder_s_own_threads() -> None:
    async def elsewhere(work: Callable[[], str]) -> str:
        return work()

    quick = ImageEncoder(queue_images=8, threads=1)
    assert await quick.run(lambda: "file", images=1000) == "file"
    assert await refusal(quick, 3) < 0.01
    others = ImageEncoder(queue_images=8, threads=1)
    assert await others.run(lambda: "file", images=1000, elsewhere=elsewhere) == "file"
    assert await refusal(others, 3) == pytest.approx(0.02)


async def test_a_file_for_somebody_who_has_left_measures_nothing() -> None:
    encoder, files = ImageEncoder(queue_images=8, threads=1), Files()
    first = asyncio.create_task(encoder.run(files.make))
    assert await asyncio.to_thread(files.begun.acquire, timeout=30)
    left = asyncio.create_task(encoder.run(files.make, images=1000))
    await asyncio.sleep(0)
    left.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await left
    with pytest.raises(QueueFull) as full:
        encoder.check_room(8)
    assert full.value.retry_after == pytest.approx(0.02)
    files.go_on.set()
    await first
    encoder.close()


async def test_closing_waits_for_no_file_and_drops_those_that_are_not_begun() -> None:
    encoder, files = ImageEncoder(threads=1), Files()
    first, second = (asyncio.create_task(encoder.run(files.make)) for _ in range(2))
    assert await asyncio.to_thread(files.begun.acquire, timeout=30)
    encoder.close()
    files.go_on.set()
    assert await first == "file"
    with pytest.raises(asyncio.CancelledError):
        await second
    assert files.made == 1


async def test_a_closed_encoder_drains_and_a_failure_is_the_caller_s() -> None:
    encoder = ImageEncoder()
    with pytest.raises(ZeroDivisionError):
        await encoder.run(lambda: 1 // 0)
    encoder.close()
    with pytest.raises(Draining):
        await encoder.run(lambda: None)
    assert encoder.images_unfinished == 0
