"""Arrivals are the same for both servers, and what is made of the answers is what is said of it."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest

from load_tests.traffic import (
    Answer,
    Arrival,
    Kind,
    Load,
    Target,
    Window,
    kinds_of,
    poisson_trace,
    slowdowns,
)

KINDS = kinds_of((64, 128), (8, 12))
TARGET = Target("fake", "http://server/generate")


def test_kinds_are_all_sizes_with_all_step_counts() -> None:
    assert [Kind(64, 8), Kind(64, 12), Kind(128, 8), Kind(128, 12)] == KINDS


def test_a_trace_is_decided_by_its_arguments() -> None:
    assert poisson_trace(KINDS, 10, 20, seed=3) == poisson_trace(KINDS, 10, 20, seed=3)
    assert poisson_trace(KINDS, 10, 20, seed=3) != poisson_trace(KINDS, 10, 20, seed=4)


def test_arrivals_are_as_many_as_the_rate_says_with_the_gaps_of_a_poisson_process() -> None:
    times = [arrival.at for arrival in poisson_trace(KINDS, 10, 400, seed=0)]
    gaps = np.diff(times)
    assert times == sorted(times)
    assert times[-1] < 400
    assert len(times) == pytest.approx(4000, rel=0.05)
    # The standard deviation of exponential gaps is their mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_every_kind_arrives_as_often() -> None:
    trace = poisson_trace(KINDS, 10, 400, seed=0)
    for kind in KINDS:
        assert sum(arrival.kind == kind for arrival in trace) == pytest.approx(
            len(trace) / len(KINDS), rel=0.1
        )


def test_slowdown_is_the_latency_over_that_of_the_same_kind_alone() -> None:
    small, large = Kind(64, 8), Kind(128, 8)
    answers = [Answer(small, 200, 0.3), Answer(large, 200, 0.3), Answer(small, 200, 0.1)]
    assert slowdowns(answers, {small: 0.1, large: 0.2}) == pytest.approx([3.0, 1.5, 1.0])


@pytest.mark.parametrize(
    ("began", "ended", "share"),
    [
        (10, 12, 1.0),
        (9, 11, 0.5),
        (12, 16, 0.75),
        (8, 16, 0.625),
        (5, 9, 0.0),
        (16, 17, 0.0),
        (15, 17, 0.0),
    ],
)
def test_an_answer_counts_as_far_as_it_lies_within_the_window(
    began: float, ended: float, share: float
) -> None:
    assert Window(10, 5).share(began, ended) == share


class Replies(httpx.AsyncBaseTransport):
    """Answers 200 at once, or 503 to the smallest pictures, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(await request.aread())
        return httpx.Response(503 if b'"width":64' in self.asked[-1] else 200)


async def test_open_loop_answers_every_arrival_in_order_and_never_repeats_a_prompt() -> None:
    replies = Replies()
    trace = [Arrival(i / 1000, KINDS[i % 4], i) for i in range(8)]
    async with httpx.AsyncClient(transport=replies) as client:
        answers = await Load(client).open_loop(TARGET, trace)
    assert [(answer.kind, answer.status) for answer in answers] == [
        (a.kind, 503 if a.kind.side == 64 else 200) for a in trace
    ]
    assert len(set(replies.asked)) == len(trace)


async def test_a_saturated_server_is_counted_by_what_it_answers() -> None:
    async with httpx.AsyncClient(transport=Replies()) as client:
        load = Load(client)
        refused = await load.saturate(
            TARGET, [Kind(64, 8)], clients=2, warm_up=0, seconds=0.02, seed=0
        )
        answered = await load.saturate(
            TARGET, [Kind(128, 8)], clients=2, warm_up=0, seconds=0.02, seed=0
        )
    assert refused == 0
    assert answered > 0


async def test_a_broken_connection_is_an_answer_of_status_0() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse)) as client:
        (answer,) = await asyncio.gather(Load(client).one(TARGET, KINDS[0], seed=0))
    assert answer.status == 0
