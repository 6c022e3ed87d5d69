"""Generated RGB images to PNG, JPEG, WebP and GIF files, in a bounded number of threads.

Requests are rejected while too many images wait for these threads.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import struct
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo

from model.canvas import on_white
from server.api.images.marking import XMP_KEYWORD, Marking
from server.engine.errors import Draining, QueueFull
from server.engine.latency_model import Pace
from server.engine.messages import Image
from server.engine.retry_slots import RetrySlots

Result = TypeVar("Result")
Format = Literal["png", "jpeg", "webp"]
AnimationFormat = Literal["gif", "webp"]

FRAME_MS = 80
# Seconds per image before the first measurement.
FIRST_PACE_S = 0.02
MARKED = Marking()
# From this quality on, JPEG keeps colours at full resolution, as people who ask for it expect.
FULL_COLOUR_QUALITY = 95
# A frame of one transparent pixel: it shows what was there, for the time in its first block.
SAME_FRAME = (
    b"!\xf9\4\5" + struct.pack("<H", FRAME_MS // 10) + b"\0\0"
    b",\0\0\0\0\1\0\1\0\x80" + bytes(6) + b"\2\2\x44\1\0"
)


def encode(
    image: Image,
    format: Format,
    quality: int,
    parameters: dict[str, Any],
    text: str | None = None,
    marking: Marking = MARKED,
) -> bytes:
    """Return the image as a file; a PNG holds `parameters` in a text chunk, others in EXIF.

    Transparency is kept in PNG and WebP, and becomes white in JPEG.

    The same arguments give the same bytes, unless they are signed. quality: 1…100, for JPEG and
    WebP. text: takes the place of the parameters in a PNG's text chunk.
    """
    pillow_image = _pillow(image)
    file = io.BytesIO()
    match format:
        case "png":
            # Compression level 1 takes a quarter of the default's time for a file 20 % larger.
            chunks = png_text(parameters, text, marking)
            pillow_image.save(file, "PNG", compress_level=1, pnginfo=chunks)
        case "jpeg":
            if pillow_image.mode == "RGBA":
                pillow_image = PIL.Image.fromarray(on_white(np.asarray(pillow_image)))
            colours = "4:4:4" if quality >= FULL_COLOUR_QUALITY else "4:2:0"
            options = marking.jpeg_options(parameters)
            pillow_image.save(file, "JPEG", quality=quality, subsampling=colours, **options)
        case "webp":
            # Method 2 of 0…6 takes 0.6 of the default's time for nearly the same size.
            options = marking.webp_options(parameters)
            pillow_image.save(file, "WEBP", quality=quality, method=2, **options)
    return marking.signed(file.getvalue(), f"image/{format}")


def animate(
    images: Iterable[Image],
    format: AnimationFormat,
    quality: int,
    parameters: dict[str, Any],
    marking: Marking = MARKED,
) -> bytes:
    """Return the images as one animation that repeats endlessly. quality: 1…100, for WebP.

    A GIF has a frame for every image; WebP shows equal ones as one frame.

    Images are taken one by one, for GIF each when it is encoded.
    """
    others = (_pillow(image) for image in images)
    first = next(others)
    file = io.BytesIO()
    options: dict[str, Any] = {
        "save_all": True,
        "append_images": others,
        "duration": FRAME_MS,
        "loop": 0,
    }
    if format == "gif":
        first.save(file, "GIF", **options)
        content = marking.in_gif(_with_equal_frames(file.getvalue()), parameters)
    else:
        options |= marking.webp_options(parameters)
        first.save(file, "WEBP", quality=quality, method=2, **options)
        content = file.getvalue()
    return marking.signed(content, f"image/{format}")


def _with_equal_frames(gif: bytes) -> bytes:
    """Return a GIF of Pillow's, which shows equal frames as one, with as many frames as were sent.

    Programs that take an animation apart count its frames.
    """
    start = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 0x80 else 0)
    parts, repeats = [gif[:start]], 0
    while gif[start] != 0x3B:
        if gif[start] == 0x21:
            end = _after_blocks(gif, start + 2)
            block = gif[start:end]
            if gif[start + 1] == 0xF9:
                (delay,) = struct.unpack_from("<H", block, 4)
                repeats = max(0, delay * 10 // FRAME_MS - 1)
                block = block[:4] + struct.pack("<H", FRAME_MS // 10) + block[6:]
            parts.append(block)
        else:
            flags = gif[start + 9]
            end = _after_blocks(gif, start + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
            parts += [gif[start:end], SAME_FRAME * repeats]
        start = end
    return b"".join([*parts, b";"])


def _after_blocks(gif: bytes, start: int) -> int:
    """Return where a chain of length-prefixed blocks ends."""
    while length := gif[start]:
        start += 1 + length
    return start + 1


def _pillow(image: Image) -> PIL.Image.Image:
    """Return RGB, or RGBA for an image of four bytes a pixel."""
    transparent = len(image.pixels) == 4 * image.width * image.height
    mode = "RGBA" if transparent else "RGB"
    return PIL.Image.frombytes(mode, (image.width, image.height), image.pixels)


def png_text(
    parameters: dict[str, Any], text: str | None = None, marking: Marking = MARKED
) -> PngInfo:
    """Return the text chunks of a generated PNG: `parameters`, and the mark.

    text: in place of the parameters' JSON.
    """
    chunks = PngInfo()
    if (recorded := marking.text(parameters)) is not None:
        chunks.add_text("parameters", recorded if text is None else text)
    if (packet := marking.xmp()) is not None:
        chunks.add_itxt(XMP_KEYWORD, packet)
    return chunks


def read_parameters(png: bytes) -> dict[str, Any]:
    """Return the parameters in a PNG's text chunk. Raises ValueError if there are none."""
    try:
        with PIL.Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            parameters = json.loads(image.info["parameters"])
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        OSError,
        RecursionError,
        SyntaxError,
        PIL.Image.DecompressionBombError,
    ):
        raise ValueError("not a PNG with parameters in it") from None
    if not isinstance(parameters, dict):
        raise ValueError("not a PNG with parameters in it")
    return parameters


# ── threads ───────────────────────────────────────────────────────────────────────────────────────


def submit(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run `work` in a thread of the pool. Raises Draining after the pool's shutdown."""
    try:
        return asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError:
        raise Draining("the server is stopping") from None


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
        self._pace = Pace(seconds=FIRST_PACE_S)
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
            pace = self._pace.seconds_per_row
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
