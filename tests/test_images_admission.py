"""Uploaded images wait for a thread in a bounded queue, and for nobody who has left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from server import pace
from server.api.errors import ApiError
from server.api.images import admission
from server.api.images.admission import ImageDecoder, Uploads, image_limits
from server.api.images.decode import ImageLimits, decode
from server.engine.errors import DeadlineExceeded, Draining, QueueFull
from server.settings import MIB, Settings
from tests.conftest import raised
from tests.hostile import GREY, SIZE, bomb_header, padded, plain_png, png
from tests.support.images import encoded

PIXELS = SIZE[0] * SIZE[1]
FILE = plain_png()


class Gate:
    """Stands in the way of every image; notes those that passed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Semaphore(0)
        self.passed: list[str] = []

    def decode(self, content: bytes, limits: ImageLimits, param: str, *rest: Any) -> Any:
        self.reached.release()
        assert self.open.wait(30)
        self.passed.append(param)
        return decode(content, limits, param, *rest)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.acquire, timeout=30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(admission, "decode", made.decode)
    yield made
    made.open.set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace the time, in monotonic seconds, that the queue and its measurements read."""
    made = SimpleNamespace(now=100.0)
    for module in (admission, pace):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def files(name: str, count: int = 1) -> list[tuple[str, bytes]]:
    return [(f"{name}{i}", FILE + bytes([i])) for i in range(count)]


def ask(decoder: ImageDecoder, name: str, count: int = 1, **more: Any) -> asyncio.Task[list[str]]:
    """Decode so many images, one after the other."""
    sent = files(name, count)

    def work(uploads: Uploads) -> list[str]:
        for param, content in sent:
            uploads.decode(content, param)
        return [param for param, _ in sent]

    return asyncio.create_task(decoder.run(work, sent, **more))


def hold(decoder: ImageDecoder, gate: Gate, *contents: bytes) -> asyncio.Task[bool]:
    """Occupy the queue with these files, none of which is decoded."""
    sent = [(f"{i}", content) for i, content in enumerate(contents)]
    return asyncio.create_task(decoder.run(lambda uploads: gate.open.wait(30), sent))


def head(rows: int) -> bytes:
    """The head of a PNG of 1024 pixels a row."""
    return bomb_header((1024, rows))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110, threads tell it nothing
            await asyncio.sleep(0.005)


# ── the queue ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_queue_is_bounded_in_pixels_and_each_refusal_names_a_later_time(
    gate: Gate,
) -> None:
    decoder = ImageDecoder(threads=1, queue_pixels=5 * PIXELS)
    first, second = ask(decoder, "a", 3), ask(decoder, "b", 2)
    await gate.until_reached()
    await until(lambda: decoder.pixels_unfinished == 5 * PIXELS)
    told = [(await raised(ask(decoder, "c"), QueueFull)).retry_after for _ in range(3)]
    assert 0 < told[0] < told[1] < told[2]
    gate.open.set()
    assert await first == ["a0", "a1", "a2"]
    assert await second == ["b0", "b1"]
    assert await ask(decoder, "d") == ["d0"], "there is room again"
    assert await ask(decoder, "e", 9) == [f"e{i}" for i in range(9)], "larger, but alone"
    assert (decoder.pixels_unfinished, decoder.bytes_unfinished) == (0, 0)
    decoder.close()


async def test_the_queue_is_bounded_in_bytes(gate: Gate) -> None:
    size = len(FILE) + 1
    decoder = ImageDecoder(threads=1, queue_bytes=3 * size)
    held = ask(decoder, "a", 2)
    await gate.until_reached()
    await raised(ask(decoder, "b", 2), QueueFull)
    fits = ask(decoder, "c")
    await until(lambda: decoder.bytes_unfinished == 3 * size)
    gate.open.set()
    await asyncio.gather(held, fits)
    decoder.close()


async def test_by_default_256_mebipixels_wait(gate: Gate) -> None:
    decoder = ImageDecoder()
    held = [hold(decoder, gate, *(head(2**14) + bytes([i]) for i in range(4))) for _ in range(4)]
    await until(lambda: decoder.pixels_unfinished == 256 * MIB)
    await raised(ask(decoder, "a"), QueueFull)
    gate.open.set()
    await asyncio.gather(*held)
    decoder.close()


async def test_by_default_128_mebibytes_wait(gate: Gate) -> None:
    decoder, content = ImageDecoder(), padded(16 * MIB)
    held = [hold(decoder, gate, *[content] * 4) for _ in range(2)]
    await until(lambda: decoder.bytes_unfinished == 128 * MIB)
    await raised(ask(decoder, "a"), QueueFull)
    gate.open.set()
    await asyncio.gather(*held)
    decoder.close()


async def test_by_default_the_images_of_two_requests_are_decoded_at_once(gate: Gate) -> None:
    others, decoder = set(threading.enumerate()), ImageDecoder()
    tasks = [ask(decoder, name) for name in "abc"]
    await until(lambda: decoder.pixels_unfinished == 3 * PIXELS)
    names = {thread.name for thread in set(threading.enumerate()) - others}
    assert {name for name in names if name.startswith("decode")} == {"decode_0", "decode_1"}
    gate.open.set()
    await asyncio.gather(*tasks)
    decoder.close()


@pytest.mark.parametrize(
    ("before", "asked", "told"),
    [
        (3072, (2048, 4096, 2048), [0.15, 0.35, 0.45]),
        # Nothing counts for less than a mebipixel.
        (4096, (512, 512), [0.2, 0.25]),
        (512, (4096, 4096), [0.05, 0.25]),
    ],
)
async def test_a_refusal_names_when_those_before_it_should_be_decoded(
    clock: SimpleNamespace, gate: Gate, before: int, asked: Sequence[int], told: list[float]
) -> None:
    """Until the first is, at 20 mebipixels a second."""
    decoder = ImageDecoder(threads=1, queue_pixels=4 * MIB)
    held = hold(decoder, gate, head(before))
    await until(lambda: decoder.pixels_unfinished == 1024 * before)
    refused = [await raised(hold(decoder, gate, head(rows)), QueueFull) for rows in asked]
    assert [error.retry_after for error in refused] == pytest.approx(told)
    gate.open.set()
    await held
    decoder.close()


async def test_a_refusal_s_time_follows_what_decoding_took(
    clock: SimpleNamespace, gate: Gate
) -> None:
    decoder = ImageDecoder(threads=1, queue_pixels=4 * MIB)

    def take_a_second(uploads: Uploads) -> None:
        clock.now += 1.0

    await decoder.run(take_a_second, [("image", head(2048))])
    held = hold(decoder, gate, head(3072))
    await until(lambda: decoder.pixels_unfinished == 3 * MIB)
    refused = await raised(hold(decoder, gate, head(2048)), QueueFull)
    # Two mebipixels in a second, beside nine tenths of the first guess.
    assert refused.retry_after == pytest.approx(3 * (1 + 0.9 * 0.05) / (2 + 0.9))
    gate.open.set()
    await held
    decoder.close()


async def test_the_pace_is_measured_in_the_thread_that_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(pace.Pace, "record", lambda *_: threads.append(threading.current_thread()))
    decoder = ImageDecoder(threads=2)
    await asyncio.gather(*(decoder.run(lambda _: None, files(name)) for name in ("a", "b")))
    await raised(decoder.run(lambda _: 1 // 0, files("c")), ZeroDivisionError)
    assert threads == [threading.current_thread()] * 2
    decoder.close()


async def test_requests_are_decoded_in_order_of_arrival(gate: Gate) -> None:
    decoder = ImageDecoder(threads=1)
    tasks = []
    for name in "abcd":
        tasks.append(ask(decoder, name))
        await until(lambda: decoder.pixels_unfinished == len(tasks) * PIXELS)
    gate.open.set()
    await asyncio.gather(*tasks)
    assert gate.passed == ["a0", "b0", "c0", "d0"]
    decoder.close()


# ── deadline and disconnect ───────────────────────────────────────────────────────────────────────


async def test_a_deadline_ends_the_wait_for_a_thread(gate: Gate) -> None:
    decoder = ImageDecoder(threads=1)
    first = ask(decoder, "a")
    await gate.until_reached()
    began = time.monotonic()
    late = ask(decoder, "b", deadline=began + 0.05)
    await raised(late, DeadlineExceeded)
    assert 0.05 <= time.monotonic() - began < 1
    assert decoder.pixels_unfinished == PIXELS, "its room is free at once"
    gate.open.set()
    await first
    assert gate.passed == ["a0"]
    await raised(ask(decoder, "c", deadline=time.monotonic() - 1), DeadlineExceeded)
    decoder.close()


async def test_a_deadline_is_checked_between_images_and_told_at_once(gate: Gate) -> None:
    decoder = ImageDecoder(threads=1)
    late = ask(decoder, "a", 3, deadline=time.monotonic() + 0.3)
    await gate.until_reached()
    await raised(late, DeadlineExceeded)
    assert gate.passed == []
    # The thread still holds the first image, and its memory.
    assert decoder.pixels_unfinished == 3 * PIXELS
    gate.open.set()
    await until(lambda: decoder.pixels_unfinished == 0)
    assert gate.passed == ["a0"]
    decoder.close()


@pytest.mark.filterwarnings("error")
async def test_a_client_that_leaves_costs_no_more_than_the_image_being_decoded(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = ImageDecoder(threads=1)
    running, waiting = ask(decoder, "a", 3), ask(decoder, "b", 3)
    await gate.until_reached()
    await until(lambda: decoder.pixels_unfinished == 6 * PIXELS)
    for task in (running, waiting):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert decoder.pixels_unfinished == 3 * PIXELS
    gate.open.set()
    await until(lambda: decoder.pixels_unfinished == 0)
    assert await ask(decoder, "c") == ["c0"]
    assert gate.passed == ["a0", "c0"]
    assert not caplog.records, "nobody waits for its error, so nobody is told"
    decoder.close()


async def test_a_closed_decoder_drains() -> None:
    decoder = ImageDecoder(threads=1)
    decoder.close()
    async with asyncio.timeout(30):
        for name in "ab":
            await raised(ask(decoder, name), Draining)
            await raised(decoder.run_large(list), Draining)
    assert decoder.bytes_unfinished == 0


async def test_a_decoder_that_closes_ends_its_image_and_refuses_all_who_wait(gate: Gate) -> None:
    decoder = ImageDecoder(threads=1)
    first, second, third = (ask(decoder, name) for name in "abc")
    await gate.until_reached()
    await until(lambda: decoder.pixels_unfinished == 3 * PIXELS)
    decoder.close()
    gate.open.set()
    assert await first == ["a0"]
    for waiting in (second, third):
        await raised(asyncio.wait_for(waiting, 30), Draining)


# ── one request ───────────────────────────────────────────────────────────────────────────────────


async def test_the_pixels_of_a_request_are_summed_before_any_is_decoded(gate: Gate) -> None:
    decoder = ImageDecoder(ImageLimits(max_request_pixels=3 * PIXELS))
    gate.open.set()
    with pytest.raises(ApiError, match=f"{3 * PIXELS} pixels together") as caught:
        await ask(decoder, "image", 4)
    assert (caught.value.status, caught.value.code) == (413, "image_too_large")
    assert caught.value.param == "image3"
    assert gate.passed == []
    assert len(await ask(decoder, "image", 3)) == 3
    decoder.close()


async def test_a_file_that_its_header_condemns_waits_for_no_thread(gate: Gate) -> None:
    decoder = ImageDecoder(threads=1)
    held = ask(decoder, "a")
    await gate.until_reached()
    with pytest.raises(ApiError, match="mask: must be a PNG"):
        await decoder.run(lambda uploads: None, [("image", FILE), ("mask", b"<svg>")])
    gate.open.set()
    await held
    decoder.close()


def test_a_mask_of_another_size_is_not_decoded(gate: Gate) -> None:
    uploads = Uploads(ImageLimits())
    with pytest.raises(ApiError) as caught:
        uploads.mask(png([b"\1\2\3" * 3], width=3), None, SIZE)
    assert caught.value.code == "mask_size_mismatch"
    gate.open.set()
    white = png([b"\xff" * SIZE[0]] * SIZE[1], colours=GREY)
    assert uploads.mask(white, None, SIZE).all()
    assert gate.passed == ["mask"]


def test_a_stopped_thread_reads_no_further_file() -> None:
    uploads = Uploads(ImageLimits())
    uploads.check([("image", FILE)])
    assert uploads.stored_size(FILE) == SIZE
    uploads.stop()
    with pytest.raises(DeadlineExceeded):
        uploads.decode(FILE)


def test_files_are_read_up_to_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: 5.0))
    in_time = Uploads(ImageLimits(), deadline=5.0)
    assert in_time.stored_size(FILE) == in_time.decode(FILE).size == SIZE
    late = Uploads(ImageLimits(), deadline=4.999)
    with pytest.raises(DeadlineExceeded):
        late.stored_size(FILE)
    with pytest.raises(DeadlineExceeded):
        late.decode(FILE)


def test_a_mask_too_large_to_be_decoded_whole_is_reduced() -> None:
    size, scaled = (400, 320), (50, 40)
    content = encoded(PIL.Image.new("L", size, 255), "JPEG")
    exactly, smaller = (ImageLimits(max_pixels=400 * 320 - less) for less in (0, 1))
    for limits, shown in ((exactly, size), (smaller, scaled)):
        mask = Uploads(limits).mask(content, None, size, scaled=scaled)
        assert mask.shape == shown[::-1]
        assert mask.all()
    with pytest.raises(ApiError) as turned:
        Uploads(smaller).mask(content, None, size[::-1], scaled=scaled[::-1])
    assert turned.value.code == "mask_size_mismatch"


def test_the_limits_of_files_are_the_settings() -> None:
    assert image_limits(Settings()) == ImageLimits()
    settings = Settings(
        max_image_bytes=1,
        max_image_pixels=2,
        max_request_pixels=3,
        max_jpeg_pixels=4,
        max_heic_pixels=5,
        max_side=600,
    )
    assert image_limits(settings) == ImageLimits(1, 2, 3, 4, 5, 600)
    # References have up to 512 pixels a side, however small the results are.
    assert image_limits(Settings(max_side=64)).scaled_side == 512


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities")
@pytest.mark.parametrize("less", [3, 0, -3])
async def test_images_are_decoded_at_no_higher_priority_than_steps(
    monkeypatch: pytest.MonkeyPatch, less: int
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    monkeypatch.setattr(admission, "DECODE_PRIORITY", min(own + less, 19))
    decoder = ImageDecoder(threads=1)

    def priority(uploads: Uploads) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await decoder.run(priority) == max(own, min(own + less, 19))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    decoder.close()
