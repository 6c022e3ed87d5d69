"""Real workers around runners that break when they meet a prompt's first word, every time.

`accelerator` raises what torch does after a failed kernel; `kill` is the kernel's out-of-memory killer; `hang` never returns; `memory` is
what an allocation raises; `bug` is any other exception.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from server.engine import worker
from server.engine.protocol import Job
from server.engine.runner import Runner, Stopwatch
from server.engine.scheduler import RowId
from server.settings import Settings

FAULTY_STEP = 2


class FaultyRunner(Runner):
    """Breaks in the second step of which a faulty prompt's row is part."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._words: dict[str, str] = {}

    def start(self, parts: Sequence[tuple[Job, Sequence[int]]], watch: Stopwatch) -> list[tuple[str, ...]]:
        self._words.update((job.id, job.prompt.split()[0]) for job, _ in parts)
        return super().start(parts, watch)

    def step(self, model: str, rows: Sequence[RowId]) -> list[RowId]:
        for row in rows:
            if self._rows[row].step == FAULTY_STEP - 1:
                self._break(self._words[row.job])
        return super().step(model, rows)

    def _break(self, word: str) -> None:
        match word:
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
