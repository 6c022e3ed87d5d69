"""How a job ended, sent from one process to another."""

from __future__ import annotations

import pickle

import pytest

from server.engine.errors import DeadlineUnreachable, EngineError, JobFailed, QueueFull, WorkerLost


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
