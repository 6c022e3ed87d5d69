"""Which rows step next. Pure Python: no torch, no clock of its own, so it is tested without a model.

A row is one image of a job. Rows that can share a denoiser step form a pool (same weights, same token grid); a pool steps all of its
running rows together, so rows join and leave at every step. Pools take turns, the one that has waited longest first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from server.engine.protocol import Job


@dataclass(frozen=True, slots=True)
class RowId:
    """Image `index` of a job."""

    job: str
    index: int


@dataclass(frozen=True, slots=True)
class Pool:
    """What rows must have in common to share a step."""

    model: str
    width: int
    height: int


class Scheduler:
    """Admits rows to at most `max_rows` running slots, in order of arrival, and says which pool steps next."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[RowId] = deque()
        # The pool that stepped last is at the end.
        self._running: OrderedDict[Pool, list[RowId]] = OrderedDict()

    def add(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._waiting.extend(RowId(job.id, i) for i in range(len(job.seeds)))

    def job(self, id: str) -> Job:
        return self._jobs[id]

    @property
    def rows_running(self) -> int:
        return sum(map(len, self._running.values()))

    @property
    def rows_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._jobs

    def expired(self, now: float) -> list[str]:
        """Jobs whose deadline has passed: whatever they would still cost is worthless."""
        return [id for id, job in self._jobs.items() if job.deadline <= now]

    def admit(self) -> list[RowId]:
        """Moves waiting rows into free slots; returns those, to be started before the next step."""
        admitted = []
        while self._waiting and self.rows_running < self.max_rows:
            row = self._waiting.popleft()
            self._running.setdefault(self._pool(row), []).append(row)
            admitted.append(row)
        return admitted

    def next_rows(self) -> list[RowId]:
        """The rows of the pool whose turn it is, all to be stepped together; none if nothing runs."""
        if not self._running:
            return []
        pool = next(iter(self._running))
        self._running.move_to_end(pool)
        return list(self._running[pool])

    def finish(self, row: RowId) -> None:
        """Frees a row's slot."""
        pool = self._pool(row)
        self._running[pool].remove(row)
        if not self._running[pool]:
            del self._running[pool]

    def remove(self, id: str) -> list[RowId]:
        """Forgets a job, finished or not; returns its rows that were running. Unknown ids are no error: a cancel may come late."""
        if id not in self._jobs:
            return []
        self._waiting = deque(row for row in self._waiting if row.job != id)
        rows = [row for rows in self._running.values() for row in rows if row.job == id]
        for row in rows:
            self.finish(row)
        del self._jobs[id]
        return rows

    def _pool(self, row: RowId) -> Pool:
        job = self._jobs[row.job]
        return Pool(job.model, job.width, job.height)
