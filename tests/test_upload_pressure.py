"""More images than a real server can decode: it refuses, keeps to deadlines, and forgets those who
left.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.images import admission
from server.api.images.admission import ImageDecoder
from server.api.images.decode import decode
from server.engine import client as engine_client
from server.settings import Settings
from tests.conftest import wait_until
from tests.hostile import SIZE, plain_png
from tests.support.native_api import error_of, post
from tests.support.servers import metric, served

pytestmark = pytest.mark.process

Configure = Callable[..., Settings]
FILE = plain_png()
PIXELS = SIZE[0] * SIZE[1]


def huge_webp(side: int = 4096) -> bytes:
    """The head of an animation of so many pixels a side; T4's are 254 bytes long."""
    canvas = (side - 1).to_bytes(3, "little") * 2
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    frames = b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", 200) * 2
    body = b"WEBP" + extended + frames + bytes(180)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def variations(client: httpx.Client, count: int, content: bytes = FILE, **fields: Any) -> Any:
    parts = [("image", (f"{i}.png", content + bytes([i]))) for i in range(count)]
    return client.post("/variations", files=parts, data={k: str(v) for k, v in fields.items()})


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every image waits for it."""
    event = threading.Event()

    def wait(*arguments: Any) -> Any:
        assert event.wait(30)
        return decode(*arguments)

    monkeypatch.setattr(admission, "decode", wait)
    yield event
    event.set()


@pytest.fixture
def retry_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the time from which retries are counted: each wait is then longer than the last,
    however slowly the requests follow each other.
    """
    now = time.monotonic()
    stopped = SimpleNamespace(monotonic=lambda: now)
    for module in (admission, engine_client):
        monkeypatch.setattr(module, "time", stopped)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], ImageDecoder]]:
    """The decoder of the server that the test starts next."""
    made: list[ImageDecoder] = []

    def make(*arguments: Any) -> ImageDecoder:
        made.append(ImageDecoder(*arguments))
        return made[-1]

    monkeypatch.setattr("server.api.app.ImageDecoder", make)
    return lambda: made[-1]


def test_a_request_of_more_pixels_than_allowed_is_refused_before_one_is_decoded(
    fake_settings: Configure, gate: threading.Event
) -> None:
    with served(fake_settings()) as client:
        answer = variations(client, 8, huge_webp())
        assert (answer.status_code, error_of(answer)["code"]) == (413, "image_too_large")
        assert "pixels together" in error_of(answer)["message"]


@pytest.mark.usefixtures("retry_clock")
def test_a_full_queue_of_images_is_429_and_text_is_not_held_up(
    fake_settings: Configure, gate: threading.Event, decoder: Callable[[], ImageDecoder]
) -> None:
    settings = fake_settings(decode_queue_pixels=4 * PIXELS, decode_threads=1)
    with served(settings) as client, concurrent.futures.ThreadPoolExecutor() as threads:
        held = threads.submit(variations, client, 4)
        wait_until(lambda: decoder().pixels_unfinished == 4 * PIXELS)
        refused = [variations(client, 1) for _ in range(3)]
        assert [(answer.status_code, error_of(answer)["code"]) for answer in refused] == [
            (429, "queue_full")
        ] * 3
        waits = [int(answer.headers["retry-after-ms"]) for answer in refused]
        assert 0 < waits[0] < waits[1] < waits[2]
        assert metric(client, "paella_rejected_total", reason="queue_full") == 3
        assert post(client).status_code == 200
        gate.set()
        assert held.result().status_code == 200
        assert variations(client, 4).status_code == 200


@pytest.mark.usefixtures("retry_clock")
def test_images_are_not_decoded_for_an_engine_without_room(
    fake_settings: Configure, gate: threading.Event, decoder: Callable[[], ImageDecoder]
) -> None:
    with (
        served(fake_settings(queue_rows=2)) as client,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        body = {"prompt": "hold", "n": 2, "timeout_s": 20}
        client.headers["X-Request-Id"] = "held"
        held = threads.submit(client.post, "/generate", json=body)
        wait_until(lambda: metric(client, "paella_rows_running") == 2)
        # The gate is shut: an answer comes without it or not at all.
        refused = [variations(client, 1) for _ in range(2)]
        assert [(answer.status_code, error_of(answer)["code"]) for answer in refused] == [
            (429, "queue_full")
        ] * 2
        waits = [int(answer.headers["retry-after-ms"]) for answer in refused]
        assert 0 < waits[0] < waits[1]
        assert client.delete("/requests/held").status_code == 204
        assert held.result().status_code == 499
        gate.set()
        assert variations(client, 1).status_code == 200


def test_a_deadline_is_kept_while_images_wait_and_while_they_are_decoded(
    fake_settings: Configure, gate: threading.Event
) -> None:
    with (
        served(fake_settings(decode_threads=1)) as client,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        began = time.monotonic()
        answers = [threads.submit(variations, client, 2, timeout_s=0.3) for _ in range(3)]
        for answer in answers:
            assert (answer.result().status_code, error_of(answer.result())["code"]) == (
                504,
                "deadline_exceeded",
            )
        assert time.monotonic() - began < 25, "the gate is shut for longer"


def test_clients_that_leave_take_their_images_out_of_the_queue(
    fake_settings: Configure, gate: threading.Event, decoder: Callable[[], ImageDecoder]
) -> None:
    with served(fake_settings(decode_threads=1)) as client:
        host, port = client.base_url.host, client.base_url.port
        request = client.build_request(
            "POST", "/variations", files=[("image", ("a.png", FILE))] * 3
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        sent = f"POST /variations HTTP/1.1\r\n{head}\r\n".encode() + request.read()
        with contextlib.ExitStack() as connections:
            for _ in range(4):
                connection = connections.enter_context(socket.create_connection((host, port)))
                connection.sendall(sent)
            wait_until(lambda: decoder().pixels_unfinished == 12 * PIXELS)
        # The first request's image is with the thread.
        wait_until(lambda: decoder().pixels_unfinished == 3 * PIXELS)
        wait_until(lambda: metric(client, "paella_cancelled_total", stage="upload") == 4)
        gate.set()
        wait_until(lambda: decoder().pixels_unfinished == 0)
        assert variations(client, 1).status_code == 200


def test_a_request_with_images_can_be_deleted_before_they_are_decoded(
    fake_settings: Configure, gate: threading.Event, decoder: Callable[[], ImageDecoder]
) -> None:
    with served(fake_settings()) as client, concurrent.futures.ThreadPoolExecutor() as threads:
        client.headers["X-Request-Id"] = "doomed"
        doomed = threads.submit(variations, client, 1)
        wait_until(lambda: decoder().pixels_unfinished == PIXELS)
        assert client.delete("/requests/doomed").status_code == 204
        assert error_of(doomed.result())["code"] == "cancelled"


def test_decoded_images_that_wait_are_bounded_in_bytes(fake_settings: Configure) -> None:
    # Two bytes a pixel: of each image the square that is drawn is kept, in three channels.
    with served(fake_settings(queue_bytes=5 * PIXELS)) as client:
        holder = threading.Thread(
            target=variations, args=(client, 2), kwargs={"prompt": "hold", "timeout_s": 1.0}
        )
        holder.start()
        wait_until(lambda: metric(client, "paella_rows_running") == 1)
        answer = variations(client, 1)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
        assert post(client).status_code == 200
        holder.join()
        assert variations(client, 1).status_code == 200
