"""Admit uploaded images to decoding: bounded queue, summed pixels, deadline, cancellation.

Files wait here for a thread, and a client that has left or whose deadline has passed costs no more
than the image that is being decoded for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeVar

from model.canvas import Pixels
from server.api.errors import ApiError
from server.api.images import ImageFile
from server.api.images.decode import Fit, ImageLimits, checked_file, decode, jpeg_scale
from server.api.images.decoded_image import DecodedImage, MaskMode, mask_size_mismatch, repaint_mask
from server.api.images.encode_queue import submit
from server.engine.errors import DeadlineExceeded, Draining, QueueFull
from server.engine.retry_slots import RetrySlots
from server.pace import Pace
from server.settings import MIB, Settings

Result = TypeVar("Result")

# Seconds per Mi pixels before the first measurement.
FIRST_MIB_S = 0.05
# CLIP reads images of at most a few hundred pixels a side: no more than this crosses the pipe.
REFERENCE_SIDE = 512
# So many pixels of a JPEG cost as much as one decoded pixel, beside those that are decoded.
JPEG_CODES = 8
# Of the threads that decode, as `nice` counts: they get a tenth of a core that a worker wants.
DECODE_PRIORITY = 10


def image_limits(settings: Settings) -> ImageLimits:
    """Return the limits of uploaded images."""
    return ImageLimits(
        settings.max_image_bytes,
        settings.max_image_pixels,
        settings.max_request_pixels,
        settings.max_jpeg_pixels,
        max(settings.max_side, REFERENCE_SIDE),
    )


def decoding_cost(file: ImageFile, side: int) -> int:
    """Return how many pixels count for an image's decoding.

    A JPEG is decoded at an eighth, a quarter or half of its size if it is needed that much smaller;
    its codes, all of which are read, count as an eighth of its pixels. A shorter side is never
    needed longer than `side`, whatever part of the image is.

    Args:
        file: the image.
        side: the longest side at which an image is needed, in pixels.
    """
    if file.format != "JPEG":
        return file.pixels
    shorter = min(file.width, file.height)
    scale = jpeg_scale((shorter, shorter), (side, side))
    reduced = -(-file.width // scale) * -(-file.height // scale)
    return min(file.pixels, reduced + file.pixels // JPEG_CODES)


@dataclass(slots=True)
class Uploads:
    """The image files of one request: checked together, then decoded one after the other.

    Every method that reads a file raises the ApiErrors of `decode`.

    Attributes:
        limits: of the files.
        deadline: monotonic seconds.
    """

    limits: ImageLimits
    deadline: float = math.inf
    # (width, height) and cost by the identity of the content, which the request holds. What a
    # decoder reads is a copy, which would double the memory of requests that wait.
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    _costs: dict[int, int] = field(default_factory=dict)
    _stopped: bool = False

    @property
    def pixels(self) -> int:
        """Pixels of all files that were checked, by their headers, as `decoding_cost` counts."""
        return sum(self._costs.values())

    def stop(self) -> None:
        """Let the thread that decodes these files end with the present one."""
        self._stopped = True

    def check(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Read the headers of (param, content); raise ApiError 413 beyond the summed pixels."""
        for param, content in files:
            self.stored_size(content, param)
        if self.pixels > self.limits.max_request_pixels:
            allowed = f"the images of a request may have {self.limits.max_request_pixels} pixels"
            message = f"{files[-1][0]}: {allowed} together (sent: {self.pixels})"
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            raise ApiError(status, "image_too_large", message, files[-1][0])

    def stored_size(self, content: bytes, param: str = "image") -> tuple[int, int]:
        """Return (width, height) by the file's header, before any rotation."""
        self._check_time()
        if id(content) not in self._sizes:
            file = checked_file(content, self.limits, param)
            self._sizes[id(content)] = file.width, file.height
            self._costs[id(content)] = decoding_cost(file, self.limits.scaled_side)
        return self._sizes[id(content)]

    def decode(self, content: bytes, param: str = "image", fit: Fit | None = None) -> DecodedImage:
        """Decode one file as `decode` does. Raises DeadlineExceeded after the deadline."""
        self._check_time()
        return decode(content, self.limits, param, fit)

    def mask(
        self,
        content: bytes,
        mode: MaskMode | None,
        size: tuple[int, int],
        param: str = "mask",
        scaled: tuple[int, int] | None = None,
    ) -> Pixels:
        """Decode one file as a mask, as `repaint_mask` does; of another size, not at all.

        scaled: size to which a JPEG that is too large to be decoded as a whole is reduced.
        """
        stored = self.stored_size(content, param)
        if sorted(stored) != sorted(size):
            raise mask_size_mismatch(param, size, stored)
        if scaled is None or stored[0] * stored[1] <= self.limits.max_pixels:
            return repaint_mask(self.decode(content, param), mode, size, param)

        def fit(upright: tuple[int, int]) -> tuple[int, int]:
            if upright != size:
                raise mask_size_mismatch(param, size, upright)
            return scaled

        return repaint_mask(self.decode(content, param, fit), mode, scaled, param)

    def _check_time(self) -> None:
        if self._stopped or time.monotonic() > self.deadline:
            raise DeadlineExceeded("the deadline passed")


@dataclass(eq=False, slots=True)
class _Entry:
    """A request in the queue. running: whether a thread works for it, maybe after its client left.

    pixels: 0 until the headers are read.
    """

    bytes: int = 0
    pixels: int = 0
    running: bool = False
    left: bool = False


def _lower_priority() -> None:
    """Let the worker's steps go before this thread's images, where threads have priorities (Linux).

    A few threads that decode on all cores would otherwise make every step several times slower.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, max(own, DECODE_PRIORITY))


class _Threads:
    """A pool whose work waits here, where it can be cancelled, in order of arrival."""

    def __init__(
        self, count: int, name: str, initializer: Callable[[], None] | None = None
    ) -> None:
        self.pool = ThreadPoolExecutor(count, name, initializer)
        self._free = asyncio.Semaphore(count)

    async def run(
        self,
        work: Callable[[], Result],
        entry: _Entry,
        on_end: Callable[[_Entry], None],
        on_result: Callable[[float], None] = lambda began: None,
    ) -> Result:
        """Return the result of `work`. Cancelled, it is not begun, or ends unheard.

        on_end: called when the thread is free. on_result: before that unless `work` failed, with
        the time at which it began, monotonic seconds.
        """
        await self._free.acquire()
        began = time.monotonic()
        try:
            future = submit(self.pool, work)
        except Draining:
            self._free.release()
            raise
        entry.running = True

        def end(done: asyncio.Future[Result]) -> None:
            self._free.release()
            entry.running = False
            # The exception is read in any case, so that asyncio does not log it as unheard.
            if not done.cancelled() and not done.exception():
                on_result(began)
            on_end(entry)

        future.add_done_callback(end)
        return await asyncio.shield(future)


class ImageDecoder:
    """A queue of requests with images, and the threads that decode them.

    Attributes:
        limits: of one request's files.
    """

    def __init__(
        self,
        limits: ImageLimits | None = None,
        threads: int = 2,
        queue_pixels: int = 256 * MIB,
        queue_bytes: int = 128 * MIB,
    ) -> None:
        """Create the threads.

        Args:
            limits: of one request's files.
            threads: requests whose images are decoded at once.
            queue_pixels: pixels of all unfinished requests together.
            queue_bytes: file bytes of all unfinished requests together.
        """
        self.limits = limits or ImageLimits()
        self._queue_pixels, self._queue_bytes = queue_pixels, queue_bytes
        self._entries: set[_Entry] = set()
        # Reading headers takes milliseconds: a request need not wait for others' images to learn
        # that its own are too large, or that the queue is full.
        self._headers = _Threads(1, "sniff")
        self._images = _Threads(threads, "decode", _lower_priority)
        self._pace = Pace(seconds=FIRST_MIB_S)  # of Mi pixels
        self._retry_slots = RetrySlots()

    @property
    def pixels_unfinished(self) -> int:
        """Pixels that wait to be decoded or are being decoded, by their files' headers."""
        return sum(entry.pixels for entry in self._entries)

    @property
    def bytes_unfinished(self) -> int:
        """File bytes of the requests that wait to be decoded or are being decoded."""
        return sum(entry.bytes for entry in self._entries)

    def close(self) -> None:
        """Refuse further work; do not wait for running work."""
        for threads in (self._headers, self._images):
            threads.pool.shutdown(wait=False, cancel_futures=True)

    async def run(
        self,
        work: Callable[[Uploads], Result],
        files: Sequence[tuple[str, bytes]] = (),
        deadline: float = math.inf,
    ) -> Result:
        """Return the result of `work`, run in one of the threads.

        Cancelling the awaiting task ends the work before its next image.

        Args:
            work: decodes the files from the `Uploads` that it is given.
            files: (param, content) of each.
            deadline: monotonic seconds.

        Raises:
            ApiError: 413 and 422, a file that is refused by its header.
            DeadlineExceeded: the deadline passed first.
            Draining: the server is stopping.
            QueueFull: too much is unfinished. A request larger than the queue is decoded alone.
        """
        uploads = Uploads(self.limits, deadline)
        entry = _Entry()
        self._admit(entry, sum(len(content) for _, content in files), 0)
        left_s = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
        try:
            async with asyncio.timeout(left_s):
                if files:
                    await self._headers.run(lambda: uploads.check(files), entry, self._end)
                    self._admit(entry, entry.bytes, uploads.pixels)
                return await self._images.run(
                    lambda: work(uploads),
                    entry,
                    self._end,
                    lambda began: self._measure(uploads.pixels, began),
                )
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed") from None
        finally:
            uploads.stop()
            entry.left = True
            self._end(entry)

    async def run_large(self, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, which takes as much memory as decoding a large image.

        It waits for one of the threads, so that the sum of such memory stays bounded. Cancelling
        the awaiting task cancels work that is not begun.

        Raises:
            Draining: the server is stopping.
        """
        return await self._images.run(work, _Entry(), self._end)

    def _admit(self, entry: _Entry, size: int, pixels: int) -> None:
        """Count these bytes and pixels for the entry. Raises QueueFull if others leave no room."""
        self._entries.discard(entry)
        before = self.pixels_unfinished
        is_full = (
            before + pixels > self._queue_pixels or self.bytes_unfinished + size > self._queue_bytes
        )
        if self._entries and is_full:
            pace = self._pace.seconds_per_unit / MIB
            earliest_s, spacing_s = max(before, MIB) * pace, max(pixels, MIB) * pace
            raise QueueFull(self._retry_slots.take(earliest_s, spacing_s, time.monotonic()))
        entry.bytes, entry.pixels = size, pixels
        self._entries.add(entry)

    def _end(self, entry: _Entry) -> None:
        """Forget a request that nobody waits for and no thread works for: its memory is free."""
        if entry.left and not entry.running:
            self._entries.discard(entry)

    def _measure(self, pixels: int, began: float) -> None:
        if pixels:
            self._pace.record(pixels / MIB, began)
