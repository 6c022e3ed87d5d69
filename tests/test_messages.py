"""Messages over a real pipe: pixels arrive as they were sent, and half a message is none."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from multiprocessing import Pipe

import numpy as np
import pytest

from model.image_request import (
    Edit,
    Enlarge,
    InputImage,
    Keyframe,
    Reference,
    Region,
    Repaint,
)
from model.tiles import Tiling
from server.engine.messages import (
    Dropped,
    Finished,
    Heartbeat,
    Image,
    Preview,
    Timings,
    receive_message,
    send_message,
)
from tests.support.scheduling import SAMPLING, job


def pictures(*sides: int) -> Finished:
    """Square pictures of noise, their pixels in an array's memory."""
    rng = np.random.default_rng(0)
    pixels = [
        memoryview(rng.integers(256, size=(side, side, 3), dtype=np.uint8)).cast("B")
        for side in sides
    ]
    return Finished(
        "a",
        tuple(
            Image(i, side, side, p) for i, (side, p) in enumerate(zip(sides, pixels, strict=True))
        ),
        Timings(),
    )


@pytest.mark.parametrize("sides", [(1024,), (1024, 1, 64), ()])
def test_pixels_arrive_as_they_were_and_the_next_message_after_them(sides):
    near, far = Pipe()
    sent = pictures(*sides)
    thread = threading.Thread(
        target=lambda: [
            send_message(near, message)
            for message in (sent, Dropped("b"), Preview("c", 0, 1, pictures(8).images[0]))
        ]
    )
    thread.start()
    received = receive_message(far)
    assert [image.width for image in received.images] == list(sides)
    assert all(
        bytes(x.pixels) == bytes(y.pixels)
        for x, y in zip(received.images, sent.images, strict=True)
    )
    assert all(isinstance(image.pixels, bytes) for image in received.images)
    assert receive_message(far) == Dropped("b")
    assert bytes(receive_message(far).image.pixels) == bytes(pictures(8).images[0].pixels)
    thread.join()
    near.close()
    far.close()


def test_pixels_are_left_out_of_the_pickle():
    sent = pictures(256, 256)
    assert len(pickle.dumps(sent, protocol=5, buffer_callback=lambda _: None)) < 1000


def test_a_message_that_breaks_off_is_not_received():
    near, far = Pipe()
    send_message(near, Dropped("whole"))
    header = pickle.dumps(sent := pictures(8), protocol=5, buffer_callback=lambda _: None)
    near.send((header, len(sent.images)))
    near.close()
    assert receive_message(far) == Dropped("whole")
    with pytest.raises((EOFError, OSError)):
        receive_message(far)
    far.close()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_image_can_be_pickled_as_anything_else(protocol):
    (image,) = pictures(4).images
    copied = pickle.loads(pickle.dumps(image, protocol))
    assert (copied.index, copied.width, copied.height, bytes(copied.pixels)) == (
        0,
        4,
        4,
        bytes(image.pixels),
    )


# ── jobs ──────────────────────────────────────────────────────────────────────────────────────────


def sent(size: int) -> InputImage:
    return InputImage(1, size, bytes(size), "")


REGIONS = (Region("a", sent(1)), Region("b", sent(20)))
ENLARGE = Enlarge(Tiling.of((32, 32), (32, 32), 4), (32, 32), 0.5, SAMPLING)


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        ({}, 0),
        ({"held_bytes": 7}, 7),
        ({"canvas": Edit(sent(1), 0.5)}, 1),
        ({"canvas": Repaint(sent(1), sent(20))}, 21),
        ({"references": (Reference(sent(1), 1.0), Reference(sent(20), 1.0))}, 21),
        ({"keyframes": (Keyframe("a", sent(1)), Keyframe("b"), Keyframe("", sent(20)))}, 21),
        ({"regions": REGIONS}, 21),
        ({"enlarge": ENLARGE}, 0),
        ({"enlarge": replace(ENLARGE, regions=REGIONS)}, 21),
        ({"enlarge": replace(ENLARGE, image=sent(300))}, 300),
        (
            {
                "canvas": Repaint(sent(4000), sent(50_000)),
                "regions": REGIONS,
                "enlarge": replace(ENLARGE, regions=REGIONS, image=sent(300)),
                "held_bytes": 600_000,
            },
            654_342,
        ),
    ],
)
def test_a_job_counts_the_bytes_of_every_image_mask_and_weight(parts, count):
    assert replace(job("a"), **parts).image_bytes == count


def test_what_a_message_does_not_say_is_nothing():
    plain, beat = job("a"), Heartbeat((), 0, 0)
    assert Timings() == Timings(queue=0, encode=0, prior=0, denoise=0, decode=0)
    assert (plain.arrived_at, plain.previews, plain.held_bytes, beat.cache_bytes) == (0, 0, 0, 0)
    assert not plain.alone
    assert not plain.early
    assert plain.step_work == 1
