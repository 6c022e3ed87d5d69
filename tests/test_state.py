"""The state of a request: whose it is, what the log says of its job, and how it ends early."""

from __future__ import annotations

import asyncio

import pytest

from server.api.errors import ApiError
from server.api.state import (
    ANYBODY,
    app_state,
    cancel,
    log_job,
    owner_of,
    request_state,
    unless_cancelled,
)
from tests.conftest import raised
from tests.support.app_requests import Received, endless, request_of
from tests.support.fake_jobs import job
from tests.support.virtual_time import settle


async def test_finished_work_leaves_nothing_behind() -> None:
    request = request_of()

    async def work() -> int:
        return 5

    async with asyncio.timeout(5):
        assert await unless_cancelled(request, work()) == 5
    assert app_state(request).running == {}


async def test_a_client_that_leaves_ends_its_work_once_nobody_else_wants_the_answer() -> None:
    received, wanted, ended = Received(), asyncio.Event(), list[str]()
    request = request_of(received)

    async def abandoned() -> None:
        await wanted.wait()
        ended.append("wanted")

    request_state(request).abandoned = abandoned
    waiting = asyncio.create_task(unless_cancelled(request, endless(ended)))
    for kind in ("http.request", "http.disconnect"):
        received.put_nowait({"type": kind})
    await settle()
    assert not waiting.done()
    wanted.set()
    assert (await raised(waiting, ApiError)).code == "client_closed"
    assert ended == ["wanted", "work"]
    assert app_state(request).running == {}


async def test_all_requests_of_an_id_are_deleted_together_and_have_ended_when_they_answer() -> None:
    request, ended = request_of(client="a-key"), list[str]()
    waiting = [asyncio.create_task(unless_cancelled(request, endless(ended))) for _ in range(2)]
    await settle()
    assert not cancel(request, "other")
    assert cancel(request, "mine")
    assert cancel(request, "mine"), "they have not ended yet"
    for task in waiting:
        assert (await raised(task, ApiError)).code == "cancelled"
    assert ended == ["work"] * 2
    assert not cancel(request, "mine")
    assert app_state(request).running == {}


@pytest.mark.parametrize(
    ("client", "owner"),
    [(None, "address 192.0.2.7"), (ANYBODY, "address 192.0.2.7"), ("a-key", "a-key")],
)
def test_a_request_belongs_to_its_key_or_else_to_its_address(
    client: str | None, owner: str
) -> None:
    assert owner_of(request_of(client=client)) == owner


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_a_job_s_fields_and_its_prompts_only_if_switched_on(log_prompts: bool) -> None:
    request = request_of(log_prompts=log_prompts)
    wanted = job(rows=2, seeds=(7, 9), prompt="a wish", negative_prompt="a fear")
    log_job(request, wanted)
    prompts = {"prompts": ("a wish",), "negative_prompt": "a fear"}
    assert request_state(request).job_fields == {
        "job": wanted.id,
        "model": "fake",
        "images": 2,
        "seed": 7,
        "size": "32x16",
        "steps": 10,
        "preset": "quality",
        **(prompts if log_prompts else {}),
    }
