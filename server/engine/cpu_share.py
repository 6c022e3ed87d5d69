"""Divide a CPU's cores among the workers that compute on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

# Seconds for which the cores stay divided after workers have last computed at once. Under load a
# worker is alone for moments only, and would take all cores just before another one needs its own.
CALM_S = 0.5


class CPUWorker(Protocol):
    """A worker, as far as this module knows it."""

    @property
    def computes_on_cpu(self) -> bool:
        """Return whether it has something to compute, on the CPU."""

    def share_cpu(self, workers: int) -> None:
        """Tell it that so many workers compute on its CPU."""


class CPUShare:
    """The number of workers that share the CPU: as many as computed at once a moment ago."""

    def __init__(self, workers: Sequence[CPUWorker]) -> None:
        self._workers = workers
        self._sharing, self._since = 1, 0.0

    def update(self) -> None:
        """Tell the workers that compute, if their number or the time has changed anything.

        An idle one learns it with its next job.
        """
        busy = [worker for worker in self._workers if worker.computes_on_cpu]
        now = time.monotonic()
        if len(busy) >= self._sharing or now - self._since > CALM_S:
            self._sharing, self._since = max(1, len(busy)), now
        for worker in busy:
            worker.share_cpu(self._sharing)
