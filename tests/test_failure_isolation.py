"""A stage that raises runs again job by job, and only jobs that raise by themselves fail."""

from __future__ import annotations

import logging

import pytest
import torch

from server.engine.failure_isolation import IsolatedStage, StageFailure
from server.engine.scheduler import RowId

ROWS = [RowId(job, index) for job in ("a", "bad", "c") for index in range(2)]


def run(rows: list[RowId], stage) -> tuple[list[RowId], list[StageFailure], list[set[str]]]:
    """Return the results, the failures, and the jobs of each batch."""
    attempt, failures, batches = IsolatedStage(rows, stage), list[StageFailure](), list[set[str]]()
    while batch := attempt.next_batch():
        batches.append({row.job for row in batch})
        if failure := attempt.run(batch):
            failures.append(failure)
    return attempt.results, failures, batches


def failing(error: Exception):
    def stage(rows: list[RowId]) -> list[RowId]:
        if any(row.job == "bad" for row in rows):
            raise error
        return rows

    return stage


def test_a_stage_without_an_error_runs_once_for_all() -> None:
    assert run(ROWS, lambda rows: rows) == (ROWS, [], [{"a", "bad", "c"}])


def test_no_rows_are_no_batch() -> None:
    assert run([], failing(RuntimeError())) == ([], [], [])


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (RuntimeError("/secret"), "internal", False),
        (MemoryError(), "out_of_memory", True),
        (torch.OutOfMemoryError(), "out_of_memory", True),
    ],
)
def test_after_an_error_each_job_runs_alone_in_order_and_one_fails(
    caplog: pytest.LogCaptureFixture, error: Exception, code: str, retryable: bool
) -> None:
    with caplog.at_level(logging.CRITICAL, logger="server"):
        results, failures, batches = run(ROWS, failing(error))
    assert batches == [{"a", "bad", "c"}, {"a"}, {"bad"}, {"c"}]
    assert results == [row for row in ROWS if row.job != "bad"]
    assert [(each.job, each.code, each.retryable) for each in failures] == [
        ("bad", code, retryable)
    ]
    assert "secret" not in failures[0].message


@pytest.mark.parametrize(
    ("error", "times"), [(RuntimeError(), 0), (MemoryError(), 2), (torch.OutOfMemoryError(), 2)]
)
def test_free_memory_is_given_back_each_time_that_there_was_too_little(
    monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    given_back = list[None]()
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: given_back.append(None))
    # The stage of all jobs, then the one job's.
    run(ROWS, failing(error))
    assert len(given_back) == times


def test_a_failed_device_is_nobody_s_failure() -> None:
    with pytest.raises(torch.AcceleratorError):
        run(ROWS, failing(torch.AcceleratorError("CUDA error")))
