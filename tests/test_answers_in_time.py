"""An answer's files are made before its deadline, and for nobody who has left."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from server.api.images.encode import animate, encode
from server.engine.messages import Image
from server.settings import Settings
from tests.conftest import wait_until
from tests.support.native_api import error_of, post
from tests.support.servers import served

pytestmark = pytest.mark.process

Configure = Callable[..., Settings]
FRAMES = {"keyframes": [{"prompt": "a ball"}, {"prompt": "a box"}], "frames": 8}


class Slow:
    """Files that wait for an event; the frames that were taken for an animation."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.taken: list[int] = []
        self.begun = self.ended = 0

    def encode(self, *arguments: Any, **options: Any) -> bytes:
        self.begun += 1
        assert self.go_on.wait(30)
        return encode(*arguments, **options)

    def animate(self, images: Iterable[Image], *arguments: Any, **options: Any) -> bytes:
        def one_by_one() -> Iterator[Image]:
            for image in images:
                self.taken.append(image.index)
                yield image
                assert self.go_on.wait(30)

        self.begun += 1
        try:
            return animate(one_by_one(), *arguments, **options)
        finally:
            self.ended += 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow()
    monkeypatch.setattr("server.api.responses.encode", made.encode)
    monkeypatch.setattr("server.api.responses.animate", made.animate)
    yield made
    made.go_on.set()


def test_files_that_take_too_long_are_504_at_the_deadline(
    fake_settings: Configure, slow: Slow
) -> None:
    with served(fake_settings()) as client:
        for fields in ({}, {"n": 2}, {"response_format": "json"}):
            answer = post(client, timeout_s=0.3, **fields)
            assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")
        slow.go_on.set()
        assert post(client).status_code == 200


def test_an_animation_ends_at_the_frame_at_which_nobody_waits_for_it_any_more(
    fake_settings: Configure, slow: Slow
) -> None:
    animation = {**FRAMES, "response_format": "gif"}
    doomed = {"X-Request-Id": "doomed"}
    with served(fake_settings()) as client, concurrent.futures.ThreadPoolExecutor() as threads:
        late = client.post("/interpolate", json={**animation, "timeout_s": 0.3})
        assert (late.status_code, error_of(late)["code"]) == (504, "deadline_exceeded")
        begun, taken = slow.begun, len(slow.taken)
        left = threads.submit(client.post, "/interpolate", json=animation, headers=doomed)
        wait_until(lambda: len(slow.taken) == taken + 1)
        assert client.delete("/requests/doomed").status_code == 204
        assert error_of(left.result())["code"] == "cancelled"
        slow.go_on.set()
        wait_until(lambda: slow.ended == begun + 1)
        assert slow.taken == [0] * (taken + 1), "no second frame of any"
        assert client.post("/interpolate", json=animation).status_code == 200


def test_requests_are_429_while_too_many_images_wait_for_their_files(
    fake_settings: Configure, slow: Slow
) -> None:
    with (
        served(fake_settings(queue_rows=4)) as client,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        held = threads.submit(post, client, n=4, response_format="json")
        wait_until(lambda: slow.begun > 0)
        # The engine is idle.
        answer = post(client)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
        slow.go_on.set()
        assert held.result().status_code == 200
        assert post(client).status_code == 200


def test_the_stream_of_files_that_take_too_long_ends_with_the_error(
    fake_settings: Configure, slow: Slow
) -> None:
    with served(fake_settings()) as client:
        answer = post(client, stream=True, timeout_s=0.3)
        assert answer.status_code == 200
        assert "deadline_exceeded" in answer.text.rpartition("event: error")[2]
