"""Stages that raise: tried again for each job alone, so that only those fail that raise by themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from model.row_builder import group_by
from server.engine.messages import FailureCode
from server.engine.scheduler import RowId

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Fail(Protocol):
    """Ends a job without a picture."""

    def __call__(self, id: str, code: FailureCode, message: str, *, repeating: bool) -> None: ...


class Attempts:
    """announce: told the jobs of every stage before it begins."""

    def __init__(self, announce: Callable[[tuple[str, ...]], None], fail: Fail) -> None:
        self._announce, self._fail = announce, fail

    def __call__(self, rows: list[RowId], stage: Callable[[list[RowId]], list[Result]]) -> list[Result]:
        """Runs a stage for rows together or, should that raise, for one job after the other.

        A stage changes no row before all of its rows are computed, so running it again is harmless. Raises torch.AcceleratorError: after
        that nothing can be computed in this process.
        """
        parts = by_job(rows)
        self._announce(tuple(part[0].job for part in parts))
        try:
            return stage(rows)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.error("a stage raised", exc_info=error, extra={"fields": {"jobs": len(parts)}})
            out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # Only here, where the error and the tensors in its frames are gone.
        if out_of_memory:
            torch.cuda.empty_cache()
        if len(parts) > 1:
            return [result for part in parts for result in self(part, stage)]
        if out_of_memory:
            self._fail(rows[0].job, "out_of_memory", "the device ran out of memory", repeating=True)
        else:
            self._fail(rows[0].job, "internal", "the request could not be computed", repeating=False)
        return []


def by_job(rows: list[RowId]) -> list[list[RowId]]:
    return group_by(rows, lambda row: row.job)
