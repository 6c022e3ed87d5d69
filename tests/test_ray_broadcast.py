"""What becomes of the answers of all replicas, if some or all are missing."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.supervisor import WorkerStatus
from server.ray_serve.broadcast import KEPT_S, TIMEOUT_S, Report, Reports, ask_all, best_answer
from tests.support.virtual_time import virtual_time


class Handle:
    """A deployment whose next answers the test sets. delay_s: until they come."""

    def __init__(self, *answers: object, delay_s: float = 0.0) -> None:
        self.answers: list[object] | Exception = [*answers]
        self.delay_s = delay_s

    def broadcast(self, method: str, *args: Any) -> SimpleNamespace:
        return SimpleNamespace(results_async=self._results)

    async def _results(self, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert (timeout_s, return_exceptions) == (TIMEOUT_S, True)
        await asyncio.sleep(self.delay_s)
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def report(name: str) -> Report:
    return Report(name, WorkerStatus(ready=True, reason="ready"), [])


@virtual_time
async def test_reports_outlive_a_poll_that_fails_but_not_for_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines, peers = Handle(one := report("one")), Handle(two := report("two"))
    reports = Reports(engines, peers)
    assert reports.recent == []
    await reports.poll()
    assert reports.recent == [one, two]
    engines.answers = TimeoutError("one replica is slow")
    await asyncio.sleep(KEPT_S)
    await reports.poll()
    assert reports.recent == [one, two]
    await asyncio.sleep(1)
    assert reports.recent == [two]
    assert "replica answers missing" in [record.msg for record in caplog.records]


@virtual_time
async def test_a_replica_that_is_gone_leaves_the_reports_at_once() -> None:
    engines = Handle(one := report("one"), report("two"))
    reports = Reports(engines)
    await reports.poll()
    engines.answers = [one, ConnectionError("the replica is gone")]
    await reports.poll()
    assert reports.recent == [one]


@virtual_time
async def test_deployments_are_asked_at_once() -> None:
    began = asyncio.get_running_loop().time()
    await Reports(Handle(delay_s=4), Handle(delay_s=4)).poll()
    assert asyncio.get_running_loop().time() == began + 4


def test_the_best_answer_is_the_one_with_the_lowest_status() -> None:
    answers = [(404, {}, b"absent"), ConnectionError(), (200, {"x-seed": "7"}, b"image")]
    answer = best_answer(answers)
    assert (answer.status_code, answer.headers["x-seed"], answer.body) == (200, "7", b"image")


@virtual_time
async def test_without_an_answer_the_client_is_told_to_try_again() -> None:
    silent = Handle()
    silent.answers = TimeoutError("nobody answers")
    for answers in (await ask_all(silent, "answer") or [], [ConnectionError("gone")]):
        answer = best_answer(answers)
        assert answer.status_code == 503
        assert json.loads(answer.body)["error"]["code"] == "worker_lost"
        assert answer.headers["retry-after"]
