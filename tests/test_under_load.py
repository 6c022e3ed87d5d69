"""What counts as lost while requests keep arriving, and what the clients that misbehave wait
for.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace

import httpx
import pytest

from load_tests.misbehaving import Client, is_whole
from load_tests.traffic import refused_honestly
from load_tests.under_load import Outcome, _unread_pipe, measure

pytestmark = pytest.mark.process

GOOD = Outcome(
    "kill",
    sent=9,
    answered=8,
    refused=1,
    lost_of_its_own=0,
    restarts=1,
    replayed=3,
    files_left=0,
    unready_s=5.0,
    latency={"p50_ms": 100.0, "p99_ms": 5000.0},
)


def test_answers_and_honest_refusals_are_not_lost() -> None:
    assert GOOD.good
    assert GOOD.lost == 0


@pytest.mark.parametrize(
    "change", [{"answered": 7}, {"refused": 0}, {"lost_of_its_own": 1}, {"files_left": 1}]
)
def test_anything_else_is_not_good(change: dict[str, int]) -> None:
    assert not replace(GOOD, **change).good


@pytest.mark.parametrize(
    ("status", "headers", "honest"),
    [
        (429, {"retry-after": "1"}, True),
        (503, {"retry-after": "5"}, True),
        (503, {}, False),
        (500, {"retry-after": "1"}, False),
    ],
)
def test_a_refusal_is_honest_if_it_says_when_to_come_back(
    status: int, headers: dict[str, str], honest: bool
) -> None:
    assert refused_honestly(status, headers) is honest


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n1234", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n123", False),
        (b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 2\r\ncontent-length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}", False),
        (b"HTTP/1.1 200 OK\r\n", False),
        (b"", False),
    ],
)
def test_an_answer_is_whole_when_all_its_bytes_have_come(answer: bytes, whole: bool) -> None:
    assert is_whole(answer) is whole


def test_an_unread_pipe_takes_one_page_and_then_stalls_its_writer() -> None:
    with _unread_pipe() as path:
        writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        assert os.write(writer, bytes(2**20)) <= 2**16
        with pytest.raises(BlockingIOError):
            os.write(writer, b"more")
        os.close(writer)


def test_faults_are_chosen_by_a_part_of_their_name() -> None:
    with pytest.raises(ValueError, match="'volcano'"):
        asyncio.run(measure(argparse.Namespace(only="volcano")))


async def test_a_slow_reader_gets_its_whole_answer_and_nobody_is_hindered_by_silence_and_resets(
    fake_server: str,
) -> None:
    address = httpx.URL(fake_server)
    clients = [Client(address.host, address.port or 80, number) for number in range(4)]
    for client in clients:
        assert await client.stay_half_open(0)
        await client.leave_after(0)
    assert await clients[0].read_slowly(0)
