"""Answers as server-sent events: what is told and when, previews, heartbeats, readers who are
slow or go away.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from starlette.types import Scope

from server.api.errors import ClientStalledError
from server.api.send_timeout import SendTimeout
from server.api.sse import (
    MAX_PREVIEWS,
    DeferredEvent,
    Emit,
    Event,
    EventQueue,
    EventStream,
    stream_events,
)
from server.api.state import RequestState, add_request_state, request_state
from server.engine.errors import QueueFull
from server.settings import MIB, Settings
from tests import fake_worker
from tests.conftest import NATIVE_SIZE, wait_until
from tests.test_api import metric, served
from tests.test_image_operations import Array, fields_of, noise, png, white
from tests.test_state import request_of

Told = list[tuple[str, dict[str, Any]]]
Configure = Callable[..., Settings]
OPERATIONS = ("generate", "inpaint", "outpaint", "variations", "edit", "upscale", "interpolate")


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of a stream's lines, as a browser reads them; comments are no events."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def body_of(operation: str, **changes: Any) -> dict[str, Any]:
    fields = {"prompt": "a ball", "seed": 5} if operation == "generate" else fields_of(operation)
    fields = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in fields.items()
    }
    return fields | {"response_format": "png"} | changes


def told(
    client: httpx.Client, operation: str, headers: dict[str, str] | None = None, **changes: Any
) -> Told:
    with client.stream(
        "POST", f"/{operation}", json=body_of(operation, stream=True, **changes), headers=headers
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(events(answer.iter_lines()))


def pixels(entry: dict[str, Any]) -> Array:
    return np.asarray(
        PIL.Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))).convert("RGB")
    )


# ── what is told ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_tells_its_place_its_begin_and_the_json_answer(
    client: httpx.Client, operation: str
) -> None:
    story = told(client, operation, {"X-Request-Id": "mine"})
    assert [name for name, _ in story if name != "image"] == ["queued", "started", "completed"]
    queued, started, completed = (data for name, data in story if name != "image")
    assert (queued["id"], queued["position"]) == ("mine", 0)
    assert queued["predicted_s"] == round(queued["predicted_s"], 3), "in milliseconds"
    steps = {"edit": 7, "upscale": 4}.get(operation, 12)
    assert started == {"id": "mine", "steps": steps}
    listed = client.post(
        f"/{operation}",
        json=body_of(operation, response_format="json"),
        headers={"X-Request-Id": "mine"},
    ).json()
    streamed = [data for name, data in story if name == "image"] or completed["images"]
    assert sorted(image["b64_json"] for image in streamed) == sorted(
        image["b64_json"] for image in listed["images"]
    )
    assert {name: completed[name] for name in ("id", "model", "parameters")} == {
        name: listed[name] for name in ("id", "model", "parameters")
    }
    assert set(listed["timings"]) >= set(completed["timings"])


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_previews_come_before_the_answer_in_small_files_of_the_answers_size(
    client: httpx.Client, format: str
) -> None:
    story = told(client, "generate", prompt="show", partial_images=2, response_format=format)
    assert [name for name, _ in story] == ["queued", "started", "preview", "preview", "completed"]
    for number, (_, preview) in enumerate(story[2:4]):
        assert (preview["index"], preview["step"], preview["of"]) == (0, number + 1, 12)
        assert preview["format"] == ("jpeg" if format == "png" else format)
        assert (preview["width"], preview["height"]) == pixels(preview).shape[1::-1] == NATIVE_SIZE
    assert story[-1][1]["images"][0]["format"] == format


def test_a_preview_of_an_inpainting_keeps_what_the_answer_keeps(client: httpx.Client) -> None:
    image, mask = np.full_like(noise(70, 61), 200), white(70, 61, box=(16, 16, 56, 56))
    fields = {
        name: base64.b64encode(png(array)).decode()
        for name, array in (("image", image), ("mask", mask))
    }
    # Without a feather, nothing is corrected towards the kept pixels.
    story = told(client, "inpaint", prompt="show", partial_images=1, feather=0, **fields)
    preview = pixels(story[2][1]).astype(int)
    assert preview.shape == image.shape
    assert np.abs(preview[:8] - 200).mean() < 4
    assert np.abs(preview[32:40, 32:40] - list(fake_worker.colour(0))).mean() < 4


@pytest.mark.parametrize(
    "changes", [{"partial_images": 9}, {"partial_images": 9, "stream": True}, {"stream": "yes"}]
)
def test_too_many_previews_are_422_with_a_stream_and_without(
    client: httpx.Client, changes: dict[str, Any]
) -> None:
    answer = client.post("/generate", json=body_of("generate", **changes))
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, next(iter(changes)))


def test_a_failure_before_the_first_event_has_a_status_and_a_later_one_is_an_event(
    client: httpx.Client,
) -> None:
    refused = client.post("/generate", json=body_of("generate", stream=True, model="nothing"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    name, data = told(client, "generate", prompt="fail")[-1]
    assert (name, data["error"]["code"]) == ("error", "internal")


async def test_a_stream_that_ends_before_its_first_event_raises_its_error_or_is_empty() -> None:
    async def refused(_: Emit) -> None:
        raise QueueFull(1.0)

    async def silent(_: Emit) -> None:
        await asyncio.sleep(0)

    with pytest.raises(QueueFull):
        await stream_events(request_of(), refused)
    assert (await stream_events(request_of(), silent)).status_code == 204


@pytest.mark.process
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_new_server_predicts_a_time(fake_settings: Configure, operation: str) -> None:
    # The shared one has learnt that a fake worker takes no time.
    with served(fake_settings()) as client:
        (_, queued), *_ = told(client, operation)
    assert queued["predicted_s"] > 0


@pytest.mark.process
def test_a_request_in_line_is_told_how_many_rows_are_before_it(fake_settings: Configure) -> None:
    with served(fake_settings(max_batch_rows=2, drain_timeout_s=0)) as client:
        held = {"prompt": "hold", "n": 2, "stream": True}
        with (
            client.stream("POST", "/generate", json=held) as first,
            client.stream("POST", "/generate", json=held) as second,
        ):
            # Kept: httpx closes the connection of lines that nobody holds.
            told_first, told_second = events(first.iter_lines()), events(second.iter_lines())
            assert next(told_first)[1]["position"] == 0
            assert next(told_second)[1]["position"] == 1


# ── readers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
def test_a_quiet_stream_sends_comments_until_its_request_is_deleted(
    fake_settings: Configure,
) -> None:
    with served(fake_settings(heartbeat_s=0.05)) as client:
        headers = {"X-Request-Id": "held"}
        with client.stream(
            "POST", "/generate", json={"prompt": "hold", "stream": True}, headers=headers
        ) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith(":"))
            assert client.delete("/requests/held").status_code == 204
            assert [(name, data["error"]["code"]) for name, data in events(lines)] == [
                ("error", "cancelled")
            ]
        wait_until(lambda: metric(client, "paella_rows_running") == 0)


@pytest.mark.process
def test_a_reader_that_goes_away_frees_its_rows(fake_settings: Configure) -> None:
    with served(fake_settings()) as client:
        with client.stream(
            "POST", "/generate", json={"prompt": "hold", "n": 3, "stream": True}
        ) as answer:
            # httpx closes the connection when nobody holds its lines any more.
            told = events(answer.iter_lines())
            assert next(told)[0] == "queued"
            wait_until(lambda: metric(client, "paella_rows_running") == 3)
        wait_until(lambda: metric(client, "paella_rows_running") == 0)
        assert metric(client, "paella_cancelled_total", stage="worker") == 1


async def test_a_slow_reader_gets_the_latest_preview_of_each_image_and_every_other_event() -> None:
    queue = EventQueue()
    queue.put(Event("queued", {}))
    for number in range(20):
        for picture in range(3):
            queue.put(
                DeferredEvent(
                    lambda p=picture, n=number: Event("preview", {"picture": p, "number": n}),
                    picture,
                )
            )
    queue.put(Event("completed", {}))
    queue.close()
    taken = []
    while (item := await queue.get()) is not None:
        taken.append(item.make() if isinstance(item, DeferredEvent) else item)
    previews = [event.data for event in taken if event.name == "preview"]
    assert [event.name for event in (taken[0], taken[-1])] == ["queued", "completed"]
    assert len(previews) == MAX_PREVIEWS
    assert [preview for preview in previews if preview["number"] == 19] == [
        {"picture": p, "number": 19} for p in range(3)
    ]


async def test_a_preview_replaces_only_one_of_its_own_image_even_if_there_are_many() -> None:
    queue = EventQueue()
    previews = [(0, number) for number in range(MAX_PREVIEWS)]
    for image, number in (*previews, (1, 0), (0, MAX_PREVIEWS), (1, 1)):
        event = Event("preview", {"place": (image, number)})
        queue.put(DeferredEvent(lambda event=event: event, image))
    queue.close()
    taken = []
    while (item := await queue.get()) is not None:
        assert isinstance(item, DeferredEvent)
        taken.append(item.make().data["place"])
    assert taken == [*previews[1:], (0, MAX_PREVIEWS), (1, 1)]


@pytest.mark.process
async def test_a_reader_that_takes_nothing_is_let_go_and_its_work_cancelled(
    fake_settings: Configure,
) -> None:
    queue, work = EventQueue(), asyncio.create_task(asyncio.sleep(3600))
    queue.put(Event("queued", {}))
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 1:
            await asyncio.Event().wait()

    stream = SendTimeout(EventStream(queue, work, fake_settings(), "id"), 0.05, MIB)
    async with asyncio.timeout(15):
        with pytest.raises(ClientStalledError):
            await stream({"type": "http"}, None, send)  # type: ignore[arg-type]
        await asyncio.wait({work})
    assert work.cancelled()
    assert all(message.get("more_body", True) for message in sent), (
        "the answer has no end, so the server closes the connection"
    )


async def test_long_events_are_sent_in_pieces_so_that_a_reader_has_time_for_each(
    fake_settings: Configure,
) -> None:
    queue, work = EventQueue(), asyncio.create_task(asyncio.sleep(0))
    event = Event("completed", {"b64_json": "A" * 300_000})
    queue.put(event)
    queue.close()
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b""))

    stream = SendTimeout(EventStream(queue, work, fake_settings(), "id"), 1, MIB)
    await stream({"type": "http"}, None, send)  # type: ignore[arg-type]
    assert b"".join(bodies) == event.encode()
    assert max(map(len, bodies)) <= 2**16


async def test_what_nobody_foresaw_ends_the_stream_with_an_error_that_tells_nothing(
    fake_settings: Configure,
) -> None:
    def broken() -> Event:
        raise RuntimeError("/secret/path")

    queue, work = EventQueue(), asyncio.create_task(asyncio.sleep(3600))
    queue.put(DeferredEvent(broken))
    bodies: list[bytes] = []
    scope: Scope = {"type": "http"}
    add_request_state(scope, RequestState("id"))

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b""))

    await EventStream(queue, work, fake_settings(), "id")(scope, None, send)  # type: ignore[arg-type]
    ((name, data),) = events(iter(b"".join(bodies).decode().splitlines()))
    assert (name, data["error"]["code"]) == ("error", "internal")
    assert "secret" not in str(data)
    # For the access log and the trace.
    assert request_state(scope).error_code == "internal"


# ── with the embedded weights ─────────────────────────────────────────────────────────────────────


@pytest.mark.judges_weights
def test_previews_come_to_look_like_the_picture(live_server: str) -> None:
    with httpx.Client(base_url=live_server, timeout=60) as client:
        story = told(
            client,
            "generate",
            prompt="a red apple on a white background",
            num_inference_steps=8,
            partial_images=3,
        )
    previews = [data for name, data in story if name == "preview"]
    answer = pixels(story[-1][1]["images"][0]).astype(int)
    distances = [np.abs(pixels(preview) - answer).mean() for preview in previews]
    assert distances[-1] < distances[0]


def test_previews_count_the_steps_of_an_image_and_those_that_an_edit_takes(
    live_server: str, native: tuple[int, int]
) -> None:
    image = png(noise(*native))
    with httpx.Client(base_url=live_server, timeout=60) as client:
        story = told(
            client,
            "generate",
            prompt="a red apple on a white background",
            num_inference_steps=8,
            partial_images=3,
        )
        assert [(data["step"], data["of"]) for name, data in story if name == "preview"] == [
            (2, 8),
            (4, 8),
            (6, 8),
        ]
        edited = told(
            client,
            "edit",
            image=base64.b64encode(image).decode(),
            strength=0.5,
            num_inference_steps=8,
            partial_images=1,
        )
        assert [(data["step"], data["of"]) for name, data in edited if name == "preview"] == [
            (2, 4)
        ]
        assert edited[1] == ("started", {"id": edited[0][1]["id"], "steps": 4})
