"""Run a stage for the rows of several jobs, so that one job's error fails no other job."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from model.row_builder import group_by
from server.engine.messages import FailureCode
from server.engine.scheduler import RowId

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StageFailure:
    """A job that failed by itself. retryable: whether another attempt could succeed."""

    job: str
    code: FailureCode
    message: str
    retryable: bool


class IsolatedStage(Generic[Result]):
    """One stage for the rows of several jobs: for all together, then, if that raises, job by job.

        attempt = IsolatedStage(rows, stage)
        while batch := attempt.next_batch():
            if failure := attempt.run(batch):
                ...
        attempt.results

    A stage must change no row before all of its rows are computed, so that it can run again.
    """

    def __init__(self, rows: list[RowId], stage: Callable[[list[RowId]], list[Result]]) -> None:
        self.results: list[Result] = []
        self._stage = stage
        self._batches = deque([rows])

    def next_batch(self) -> list[RowId]:
        """Return the rows to run next; none when the stage is over."""
        return self._batches.popleft() if self._batches else []

    def run(self, batch: list[RowId]) -> StageFailure | None:
        """Run the stage for a batch; return the failure of a job that raised alone.

        Raises torch.AcceleratorError, after which this process can compute nothing.
        """
        try:
            self.results += self._stage(batch)
            return None
        except torch.AcceleratorError:
            raise
        except Exception as error:
            jobs = group_by(batch, lambda row: row.job)
            log.error("stage failed", exc_info=error, extra={"fields": {"jobs": len(jobs)}})
            out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # Only here, where the error and the tensors in its frames are gone.
        if out_of_memory:
            torch.cuda.empty_cache()
        if len(jobs) > 1:
            self._batches.extendleft(reversed(jobs))
            return None
        job = batch[0].job
        if out_of_memory:
            return StageFailure(
                job, "out_of_memory", "the device ran out of memory", retryable=True
            )
        return StageFailure(job, "internal", "the request could not be computed", retryable=False)
