"""Make files of generated images in a bounded number of threads.

Requests are rejected while too many images wait for these threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from server.engine.errors import Draining, QueueFull
from server.engine.retry_slots import RetrySlots
from server.pace import Pace

Result = TypeVar("Result")

# Seconds per image before the first measurement.
FIRST_IMAGE_S = 0.02


class ImageEncoder:
    """Threads that make files of generated images, in order of arrival.

    A job's images leave the engine's queue when they are generated. If files take longer than
    generation, their images would fill the memory without this bound.
    """

    def __init__(self, queue_images: int = 256, threads: int | None = None) -> None:
        """Create the threads.

        Args:
            queue_images: images without a file, above which requests are rejected.
            threads: files made at once; default: one per CPU, at least two, because an animation
                takes a hundred times as long as an image.
        """
        self._queue_images = queue_images
        self._pool = ThreadPoolExecutor(threads or max(2, os.cpu_count() or 1), "encode")
        self._pace = Pace(seconds=FIRST_IMAGE_S)  # of images
        self._retry_slots = RetrySlots()
        self.images_unfinished = 0

    def close(self) -> None:
        """Refuse further work; do not wait for running work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_room(self, images: int) -> None:
        """Raise QueueFull if a request for so many images must not be generated now."""
        excess = self.images_unfinished + images - self._queue_images
        # A request larger than the queue is still answered, alone.
        if self.images_unfinished and excess > 0:
            pace = self._pace.seconds_per_unit
            now = time.monotonic()
            raise QueueFull(self._retry_slots.take(excess * pace, images * pace, now))

    async def run(
        self,
        work: Callable[[], Result],
        images: int = 1,
        elsewhere: Callable[[Callable[[], Result]], Coroutine[Any, Any, Result]] | None = None,
    ) -> Result:
        """Return the result of `work`, run in one of the threads.

        Cancelling the awaiting task cancels work that is not begun.

        Args:
            work: makes the file.
            images: images in it.
            elsewhere: runs the work in other threads, if it takes more memory than these may.

        Raises:
            Draining: the server is stopping.
        """
        future = asyncio.ensure_future(elsewhere(work)) if elsewhere else submit(self._pool, work)
        began = time.monotonic()
        self.images_unfinished += images

        def end(done: asyncio.Future[Result]) -> None:
            self.images_unfinished -= images
            if not (elsewhere or done.cancelled()):
                self._pace.record(images, began)

        future.add_done_callback(end)
        return await future


def submit(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run `work` in a thread of the pool. Raises Draining after the pool's shutdown."""
    try:
        return asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError:
        raise Draining("the server is stopping") from None
