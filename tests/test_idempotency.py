"""`Idempotency-Key` over the fake worker: answered again, joined, compared, bounded."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message, Scope

from server.api import create_app, idempotency
from server.api.errors import ClientStalledError
from server.api.idempotency import Idempotency, IdempotencyTable, Recorder, digest_of
from server.api.openapi import EXAMPLES
from server.api.schemas import EditRequest, GenerateRequest
from server.api.state import RequestState, add_request_state, request_state
from server.metrics import Metrics
from server.settings import Settings
from tests import fake_worker
from tests.conftest import serving, wait_until
from tests.support.servers import metric, served

KEY = "key-0123456789abcdef"
OTHER_KEY = "key-fedcba9876543210"
REPEATS = "paella_idempotent_repeats_total"
KEPT = "paella_idempotency_bytes"
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def server(fake_settings: Callable[..., Settings]) -> Iterator[httpx.Client]:
    """A server of its own: these tests leave answers in it."""
    with served(fake_settings()) as client:
        yield client


def post(
    client: httpx.Client,
    key: str,
    path: str = "/generate",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    sent = {"Idempotency-Key": key, **(headers or {})}
    return client.post(path, json={"prompt": "a ball", **fields}, headers=sent)


def leave(client: httpx.Client, key: str, **fields: Any) -> None:
    """Send a request and close the connection before the answer."""
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json=fields, headers={"Idempotency-Key": key}, timeout=0.05)


def drawn(client: httpx.Client) -> float:
    return metric(client, "paella_images_total", endpoint="/generate")


def repeats(client: httpx.Client, outcome: str) -> float:
    return metric(client, REPEATS, outcome=outcome)


# ── answered again ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/generate", {}),
        ("/generate", {"n": 3}),
        ("/generate", {"response_format": "json"}),
        ("/v1/images/generations", {}),
    ],
)
def test_a_repeat_gets_the_first_answer_without_a_second_drawing(
    server: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    key = f"again {path} {fields}"
    before = drawn(server), repeats(server, "answered")
    first = post(server, key, path, **fields)
    again = post(server, key, path, **fields)
    assert (first.status_code, "idempotent-replayed" in first.headers) == (200, False)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert again.content == first.content
    for name in ("content-type", "x-seed", "server-timing", "content-disposition"):
        assert again.headers[name] == first.headers[name]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert drawn(server) - before[0] == fields.get("n", 1)
    assert repeats(server, "answered") - before[1] == 1


@pytest.mark.parametrize("path", EXAMPLES)
def test_every_endpoint_that_draws_has_it(server: httpx.Client, path: str) -> None:
    sent = {"json": EXAMPLES[path], "headers": {"Idempotency-Key": f"every {path}"}}
    first, again = server.post(path, **sent), server.post(path, **sent)
    assert first.status_code == 200, first.text
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")


def test_without_a_key_and_with_another_one_it_is_drawn_again(server: httpx.Client) -> None:
    first = post(server, "one")
    assert post(server, "two").content != first.content
    assert server.post("/generate", json={"prompt": "a ball"}).content != first.content


def test_the_format_is_compared_however_the_request_asks_for_it(server: httpx.Client) -> None:
    first = post(server, "format", headers={"Accept": "image/png"})
    assert first.headers["content-type"] == "image/png"
    for headers, fields in [
        ({"Accept": "application/json"}, {}),
        ({"Accept": "image/webp"}, {}),
        ({"Accept": "image/png"}, {"response_format": "json"}),
    ]:
        other = post(server, "format", headers=headers, **fields)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    for headers, fields in [
        ({"Accept": "image/png, */*;q=0.5"}, {}),
        ({"Accept": "*/*"}, {}),
        ({"Accept": "image/webp"}, {"response_format": "png"}),
    ]:
        assert post(server, "format", headers=headers, **fields).content == first.content


def test_the_format_of_an_animation_is_compared(server: httpx.Client) -> None:
    fields = {"keyframes": [{"prompt": "a"}, {"prompt": "b"}], "frames": 2}
    for accept, status in [("image/gif", 200), ("application/json", 422), ("image/gif", 200)]:
        answer = post(server, "animation", "/interpolate", {"Accept": accept}, **fields, prompt="")
        assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "image/gif"


def test_fields_are_compared_and_not_bytes(server: httpx.Client) -> None:
    png = server.post("/generate", json={"prompt": "a ball", "seed": 1}).content
    fields = {"prompt": "a hat", "strength": 0.5}
    headers = {"Idempotency-Key": "compared"}
    first = server.post("/edit", data=fields, files={"image": png}, headers=headers)
    again = server.post("/edit", data=fields, files={"image": png}, headers=headers)
    encoded = {"image": base64.b64encode(png).decode(), "strength": 0.5, "prompt": "a hat"}
    as_json = server.post("/edit", json=encoded, headers=headers)
    assert first.status_code == 200, first.text
    assert again.content == as_json.content == first.content


def test_another_image_is_another_request(server: httpx.Client) -> None:
    pngs = [
        server.post("/generate", json={"prompt": "a ball", "seed": seed}).content for seed in (1, 2)
    ]
    answers = [
        server.post(
            "/edit",
            data={"prompt": "a hat"},
            files={"image": png},
            headers={"Idempotency-Key": "another image"},
        )
        for png in pngs
    ]
    assert [answer.status_code for answer in answers] == [200, 422]


@pytest.mark.parametrize(("path", "status"), [("/generate", 422), ("/v1/images/generations", 400)])
def test_other_fields_under_the_same_key_are_a_mismatch(
    server: httpx.Client, path: str, status: int
) -> None:
    before = repeats(server, "mismatch")
    post(server, f"mismatch {path}", path, seed=1)
    answer = post(server, f"mismatch {path}", path, seed=2)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, "idempotency_mismatch")
    assert (error["param"], "new key" in error["message"]) == ("Idempotency-Key", True)
    assert repeats(server, "mismatch") - before == 1


def test_another_endpoint_under_the_same_key_is_a_mismatch(server: httpx.Client) -> None:
    post(server, "endpoint")
    assert post(server, "endpoint", "/v1/images/generations").status_code == 400


@pytest.mark.parametrize("key", ["", "ä", "x" * 256])
def test_a_key_is_1_to_255_printable_characters(server: httpx.Client, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode())]
    answer = server.post("/generate", json={"prompt": "a ball"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_idempotency_key")


def test_a_key_that_is_too_long_is_shown_to_80_characters(server: httpx.Client) -> None:
    message = post(server, "k" * 256, prompt="a ball").json()["error"]["message"]
    assert f"(sent: '{'k' * 80}')" in message


def test_two_keys_in_one_request_are_refused(server: httpx.Client) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    answer = server.post("/generate", json={"prompt": "a ball"}, headers=headers)
    assert answer.json()["error"]["code"] == "invalid_idempotency_key"


def test_errors_that_would_come_again_are_kept_and_others_are_not(server: httpx.Client) -> None:
    unknown = [post(server, "unknown model", model="other") for _ in range(2)]
    assert [answer.status_code for answer in unknown] == [404, 404]
    assert "idempotent-replayed" in unknown[1].headers
    failed = [post(server, "failed", prompt="fail") for _ in range(2)]
    assert [answer.status_code for answer in failed] == [500, 500]
    assert "idempotent-replayed" not in failed[1].headers
    # An error that is kept does not use up its key for the corrected request.
    for wrong in ({"width": 250}, {"preset": "none"}, {"model": "other"}):
        key = f"corrected {wrong}"
        refused = [post(server, key, **wrong) for _ in range(2)]
        assert refused[0].status_code in (404, 422)
        assert "idempotent-replayed" in refused[1].headers
        assert post(server, key).status_code == 200
        assert post(server, key).headers["idempotent-replayed"] == "true"
        assert post(server, key, **wrong).json()["error"]["code"] == "idempotency_mismatch"
    # A body that fails validation says the same again, and does not use up its key.
    assert post(server, "invalid", n=17).status_code == 422
    assert post(server, "invalid", n=1).status_code == 200


def test_a_repeated_stream_gets_its_results(server: httpx.Client) -> None:
    fields = {"prompt": "show a ball", "stream": True, "partial_images": 2}
    first = post(server, "stream", **fields).text
    again = post(server, "stream", **fields)
    assert "event: preview" in first
    assert again.headers["content-type"].startswith("text/event-stream")
    assert again.text == first[first.index("event: completed") :]


def test_a_repeated_stream_of_frames_gets_them_all(server: httpx.Client) -> None:
    fields = {"keyframes": [{"prompt": "a"}, {"prompt": "b"}], "frames": 3, "stream": True}
    sent = {"json": fields, "headers": {"Idempotency-Key": "frames"}}
    first = server.post("/interpolate", **sent).text
    again = server.post("/interpolate", **sent).text
    assert again == first[first.index("event: image") :]
    assert again.count("event: image") == 3


def test_a_failed_stream_is_made_again(server: httpx.Client) -> None:
    answers = [post(server, "failed stream", prompt="fail", stream=True) for _ in range(2)]
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, False]


# ── joined ────────────────────────────────────────────────────────────────────────────────────────


def test_simultaneous_requests_are_one_drawing(server: httpx.Client) -> None:
    before = drawn(server), repeats(server, "joined") + repeats(server, "answered")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(post, server, "joined", prompt="slow ball") for _ in range(4)]
        answers = [future.result() for future in futures]
    assert len({answer.content for answer in answers}) == 1
    assert drawn(server) - before[0] == 1
    assert repeats(server, "joined") + repeats(server, "answered") - before[1] == 3


def test_a_repeat_has_the_answer_although_the_first_client_left(server: httpx.Client) -> None:
    before = drawn(server)
    leave(server, "left", prompt="slow ball", seed=9)
    again = post(server, "left", prompt="slow ball", seed=9)
    assert again.headers["idempotent-replayed"] == "true"
    assert drawn(server) - before == 1


def test_a_request_that_nobody_repeats_ends_a_moment_after_its_client_left(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "GRACE_S", 0.2)
    before = metric(server, "paella_cancelled_total", stage="worker")
    leave(server, "held", prompt="hold")
    wait_until(lambda: metric(server, "paella_cancelled_total", stage="worker") > before, 10)


def test_a_deleted_request_can_be_sent_again(server: httpx.Client) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, "deleted", headers={"X-Request-Id": "d1"}, prompt="hold")
        wait_until(lambda: server.delete("/requests/d1").status_code == 204)
        assert first.result().status_code == 499
    assert post(server, "deleted", prompt="hold", timeout_s=0.2).status_code == 504


def test_the_answer_is_kept_when_the_client_dies_before_it_reads_it(server: httpx.Client) -> None:
    """As the fault test does it: the answer is larger than the kernel takes."""
    fields = {"prompt": "noise", "width": 512, "height": 512, "n": 8, "response_format": "json"}
    body = json.dumps(fields).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nIdempotency-Key: died\r\n\r\n"
    before, bytes_before = drawn(server), metric(server, KEPT)
    with socket.create_connection((server.base_url.host, server.base_url.port or 0)) as dying:
        dying.sendall(head.encode() + body)
        wait_until(lambda: metric(server, KEPT) > bytes_before)
    again = post(server, "died", **fields)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert drawn(server) - before == 8


# ── owners and bounds ─────────────────────────────────────────────────────────────────────────────


def test_keys_of_others_are_not_seen(fake_settings: Callable[..., Settings]) -> None:
    settings = fake_settings(api_keys=f"{KEY},{OTHER_KEY}")
    with (
        serving(create_app(settings, worker=fake_worker.main)) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        answers = [
            post(client, "same", headers={"Authorization": f"Bearer {key}"}, seed=seed)
            for key, seed in ((KEY, 1), (OTHER_KEY, 2), (KEY, 1))
        ]
    assert [answer.headers["x-seed"] for answer in answers] == ["1", "2", "1"]
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, False, True]


def test_the_setting_turns_it_off(fake_settings: Callable[..., Settings]) -> None:
    app = create_app(fake_settings(idempotency_bytes=0), worker=fake_worker.main)
    with (
        serving(app) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        answers = [post(client, "off"), post(client, "off", n=2)]
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_digest_tells_requests_apart() -> None:
    fields = GenerateRequest(prompt="a")
    assert digest_of("/generate", fields) == digest_of("/generate", GenerateRequest(prompt="a"))
    others = [
        digest_of("/edit", fields),
        digest_of("/generate", GenerateRequest(prompt="b")),
        digest_of("/generate", GenerateRequest(prompt="a", seed=0)),
        *(digest_of("/edit", EditRequest(prompt="a", image=file)) for file in (b"x", b"y")),
    ]
    assert len({digest_of("/generate", fields), *others}) == 6


# ── the recorder alone ────────────────────────────────────────────────────────────────────────────


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
BODY: Message = {"type": "http.response.body", "body": b"12345"}
STREAM: Message = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}


def recorder(table: IdempotencyTable, send: Any) -> Recorder:
    scope: Scope = {"type": "http"}
    add_request_state(scope, RequestState("id"))
    return Recorder(table, scope, send)


async def taken(_: Message) -> None:
    """Send to a client that takes everything."""


async def stalled(_: Message) -> None:
    raise ClientStalledError


async def test_an_answer_is_made_to_its_end_although_its_client_stalls() -> None:
    table = IdempotencyTable(2**20, Metrics())
    record = recorder(table, stalled)
    attempt = record.begin(("one", "key"), b"digest")
    await record.send(STREAM)
    for event in (b"event: preview\n", b"event: completed\ndata: 1\n\n"):
        await record.send({**BODY, "body": event, "more_body": True})
    await record.send({**BODY, "body": b"", "more_body": False})
    assert isinstance(record.stalled, ClientStalledError)
    assert attempt.answer is not None
    assert attempt.answer.chunks == (b"event: completed\ndata: 1\n\n",)
    assert table.answers.get(("one", "key")) is not None
    assert not table.running


async def test_the_middleware_reports_a_client_that_stalled() -> None:
    table = IdempotencyTable(2**20, Metrics())
    scope: Scope = {
        "type": "http",
        "path": "/generate",
        "headers": [(b"idempotency-key", b"key")],
    }
    add_request_state(scope, RequestState("id", "one"))

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        fields = GenerateRequest(prompt="a ball")
        assert await request_state(scope).earlier_answer(Request(scope), fields) is None
        await send(START)
        await send(BODY)

    with pytest.raises(ClientStalledError):
        await Idempotency(app, table)(scope, taken, stalled)  # type: ignore[arg-type]
    assert table.answers.get(("one", "key")) is not None


async def test_an_answer_is_kept_for_the_ten_minutes_of_the_documentation() -> None:
    table = IdempotencyTable(1 << 20, Metrics())
    record = recorder(table, taken)
    record.begin(("one", "key"), b"digest")
    await record.send(START)
    await record.send(BODY)
    kept = table.answers.get(("one", "key"))
    assert kept is not None
    assert kept[1] == pytest.approx(600, abs=30)


async def test_an_answer_larger_than_the_table_is_for_those_who_wait_alone() -> None:
    table = IdempotencyTable(4, Metrics())
    record = recorder(table, taken)
    attempt = record.begin(("one", "key"), b"digest")
    waiting = asyncio.create_task(attempt.join())
    await asyncio.sleep(0)
    await record.send(START)
    await record.send(BODY)
    answer = await waiting
    assert answer is not None
    assert answer.chunks == (b"12345",)
    assert (table.answers.get(("one", "key")), table.answers.bytes) == (None, 0)


async def test_a_stream_larger_than_the_table_is_made_again_for_those_who_wait() -> None:
    table = IdempotencyTable(30, Metrics())
    record = recorder(table, taken)
    attempt = record.begin(("one", "key"), b"digest")
    await record.send(STREAM)
    for event in (b"event: image\ndata: 1\n\n", b"event: image\ndata: 2\n\n"):
        await record.send({**BODY, "body": event, "more_body": True})
    await record.send({**BODY, "body": b"", "more_body": False})
    assert await attempt.join() is None
    assert (table.answers.get(("one", "key")), table.answers.bytes) == (None, 0)


async def test_the_events_of_a_stream_count_while_it_runs_and_displace_answers() -> None:
    table = IdempotencyTable(idempotency.OVERHEAD_BYTES + 20, Metrics())
    finished = recorder(table, taken)
    finished.begin(("one", "finished"), b"digest")
    await finished.send(START)
    await finished.send(BODY)
    running = recorder(table, taken)
    running.begin(("one", "running"), b"digest")
    await running.send(STREAM)
    event = {**BODY, "body": b"event: image\ndata: {}\n\n", "more_body": True}
    await running.send(event)
    assert table.answers.get(("one", "finished")) is None
    assert table.answers.bytes == len(event["body"])
    running.end()
    assert table.answers.bytes == 0


@pytest.mark.parametrize("code", ["client_closed", "cancelled"])
async def test_a_repeat_starts_anew_when_the_first_request_ended_by_itself(code: str) -> None:
    table = IdempotencyTable(2**20, Metrics())
    scope: Scope = {"type": "http"}
    add_request_state(scope, RequestState("id", error_code=code))
    record = Recorder(table, scope, taken)
    attempt = record.begin(("one", "key"), b"digest")
    await record.send({**START, "status": 499})
    await record.send(BODY)
    assert await attempt.join() is None
    assert table.answers.get(("one", "key")) is None


async def test_work_goes_on_while_repeats_wait_and_a_moment_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idempotency, "GRACE_S", 0.02)
    attempt = idempotency.Attempt(b"digest")
    abandoned = asyncio.create_task(attempt.abandoned())
    for _ in range(2):  # one after the other
        repeat = asyncio.create_task(attempt.join())
        await asyncio.sleep(0.1)
        assert not abandoned.done()
        repeat.cancel()
    await asyncio.wait_for(abandoned, 5)
