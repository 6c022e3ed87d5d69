"""A scheduler, its jobs and rows, and a machine that runs them without tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from model.config import SamplingConfig
from server.engine.job import Job
from server.engine.scheduler import (
    RowId,
    Scheduler,
)

SAMPLING = SamplingConfig(
    steps=1,
    renoise_steps=0,
    guidance=(1.0, 1.0),
    guidance_steps=0,
    temperature=(1.0, 1.0),
    sampler="argmax",
    typical_mass=0.2,
)


def job(
    id: str, rows: int = 1, width: int = 64, model: str = "tiny", deadline: float = 100.0
) -> Job:
    return Job(id, model, "", "", width, 64, tuple(range(rows)), SAMPLING, deadline)


def scheduler(max_rows: int, *jobs: Job) -> Scheduler:
    made = Scheduler(max_rows)
    for each in jobs:
        made.add(each)
    return made


def rows(id: str, *indices: int) -> list[RowId]:
    return [RowId(id, i) for i in indices]


class Machine:
    """A runner without tensors: a step costs what `cost` says of its rows, and time is the sum
    of the steps.
    """

    def __init__(
        self, scheduler: Scheduler, cost: Callable[[Sequence[RowId]], float] = lambda _: 1.0
    ) -> None:
        self.scheduler, self.cost = scheduler, cost
        self.now = 0.0
        self.admitted: set[RowId] = set()
        self.turns: list[list[RowId]] = []
        self.steps: Counter[RowId] = Counter()
        self.finished_at: dict[RowId, float] = {}

    def step(self) -> list[RowId]:
        self.admitted.update(self.scheduler.admit())
        turn = self.scheduler.next_rows()
        self.turns.append(turn)
        self.now += self.cost(turn)
        for row in turn:
            self.steps[row] += 1
            if self.steps[row] == self.scheduler.job(row.job).sampling.steps:
                self.scheduler.finish(row)
                self.finished_at[row] = self.now
        return turn

    def run(self) -> None:
        while self.scheduler.rows_running or self.scheduler.rows_waiting:
            self.step()


PRIORITIES = ["interactive", "batch"]
