"""Errors of jobs, as they cross from process to process and as clients get them."""

from __future__ import annotations

import pickle

import pytest

from server.api.errors import ApiError, from_engine
from server.engine.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    Draining,
    EngineError,
    JobFailed,
    QueueFull,
    Starting,
    WorkerLost,
)

NO_RETRY = {"x-should-retry": "false"}


@pytest.mark.parametrize(
    "error",
    [
        QueueFull(1.5),
        DeadlineUnreachable(3.0, 1.0, retryable=True),
        JobFailed("poison", "why", retryable=False),
        WorkerLost("gone"),
    ],
)
def test_an_error_arrives_as_it_was_sent(error: EngineError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def retry_after(seconds: int, milliseconds: int) -> dict[str, str]:
    return {"Retry-After": str(seconds), "retry-after-ms": str(milliseconds)}


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (QueueFull(1.0005), 429, "queue_full", retry_after(2, 1001)),
        (
            DeadlineUnreachable(3.0, 1.0, retryable=True),
            429,
            "deadline_unreachable",
            retry_after(2, 2000),
        ),
        (
            DeadlineUnreachable(3.0, 1.0, retryable=False, retry_after=5.0),
            429,
            "deadline_unreachable",
            retry_after(5, 5000) | NO_RETRY,
        ),
        (Starting("loading"), 503, "starting", retry_after(5, 5000)),
        (Draining("stopping"), 503, "draining", retry_after(5, 5000)),
        (WorkerLost("gone"), 503, "worker_lost", retry_after(5, 5000)),
        (DeadlineExceeded("late"), 504, "deadline_exceeded", {}),
        (JobFailed("out_of_memory", "why", retryable=True), 500, "out_of_memory", {}),
        (JobFailed("poison", "why", retryable=False), 500, "poison", NO_RETRY),
        (EngineError("a bug"), 500, "internal", NO_RETRY),
    ],
)
def test_an_error_s_answer_says_whether_and_when_to_retry(
    error: EngineError, status: int, code: str, headers: dict[str, str]
) -> None:
    answer = from_engine(error)
    assert (answer.status, answer.code, answer.headers or {}) == (status, code, headers)


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [
        ("invalid_request_error", (400, 404, 422, 428, 430, 499)),
        ("rate_limit_error", (429,)),
        ("server_error", (500, 503, 504)),
    ],
)
def test_an_error_has_the_type_that_openai_s_clients_know(
    kind: str, statuses: tuple[int, ...]
) -> None:
    assert {ApiError(status, "code", "message").body["type"] for status in statuses} == {kind}
