"""Define a runner that breaks on the first word of a prompt, in the second step with such a row.

`accelerator` is torch's error after a failed kernel; `kill` is the kernel's out-of-memory killer;
`hang` never returns; `memory` is the error of a failed allocation; `bug` is any other exception.
They break every time, or with `-once` behind them (`hang-once`) until they are retried alone.
`memory-crowd` breaks whenever it shares the step with others.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from server.engine import worker
from server.engine.job import Job
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.settings import Settings

FAULTY_STEP = 2


class FaultyRunner(Runner):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._jobs: dict[RowId, Job] = {}

    def start(
        self, parts: Sequence[tuple[Job, Sequence[int]]], watch: Stopwatch
    ) -> list[tuple[str, ...]]:
        self._jobs |= {RowId(job.id, index): job for job, indices in parts for index in indices}
        return super().start(parts, watch)

    def drop(self, rows: Sequence[RowId]) -> None:
        super().drop(rows)
        for row in rows:
            self._jobs.pop(row, None)

    def step(self, model: str, rows: Sequence[RowId]) -> None:
        for row in rows:
            if self.rows[row].step == FAULTY_STEP - 1:
                self._meet(self._jobs[row], crowd=len(rows) > 1)
        super().step(model, rows)

    def _meet(self, job: Job, crowd: bool) -> None:
        fault, _, when = (job.prompt.split() or [""])[0].partition("-")
        if {"": True, "once": not job.alone, "crowd": crowd}.get(when, False):
            _break(fault)


def _break(fault: str) -> None:
    match fault:
        case "accelerator":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "bug":
            raise RuntimeError("shapes do not fit")


def main(connection: Connection, settings: Settings) -> None:
    worker.main(connection, settings, FaultyRunner)
