"""What the workers' time goes to, as measured, and from that how long a job would take."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.engine.messages import Job, Step, Timings
from server.engine.scheduler import Pool

# What was measured longer ago is no ground to refuse anybody: otherwise one slow step on an idle server could refuse all that follow.
MEMORY_S = 60.0
WEIGHT = 0.2


@dataclass(slots=True)
class _Average:
    """Of about the last five values. at: when the latest came, monotonic seconds."""

    value: float
    at: float

    def record(self, value: float, now: float) -> None:
        self.value += WEIGHT * (value - self.value)
        self.at = now


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a job that is admitted. position: rows that must be done before its first can begin. seconds: until it should be done."""

    position: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ahead:
    """An unfinished job. left: steps that all of its rows together have yet to take."""

    job: Job
    left: int

    @property
    def rows(self) -> int:
        return len(self.job.seeds)


def _steps(job: Job) -> int:
    return len(job.seeds) * job.sampling.steps


@dataclass(slots=True)
class LatencyModel:
    """Averages of a step's seconds by picture size and branches, and of the seconds a row takes before and after its steps.

    measured_at: when the last step was recorded, monotonic seconds.
    """

    measured_at: float = -math.inf
    _steps: dict[int, dict[int, _Average]] = field(default_factory=dict)
    _around: _Average | None = None

    def record_step(self, step: Step, now: float) -> None:
        self.measured_at = now
        known = self._steps.setdefault(step.pixels, {})
        known.setdefault(step.branches, _Average(step.seconds, now)).record(step.seconds, now)

    def record_job(self, rows: int, timings: Timings, now: float) -> None:
        seconds = (timings.encode + timings.prior + timings.decode) / rows
        if self._around is None:
            self._around = _Average(seconds, now)
        self._around.record(seconds, now)

    def predict(self, job: Job, others: Sequence[Job], slots: int, now: float, left: Mapping[str, int] | None = None) -> float | None:
        """Seconds from now until `job` is done while `others` are unfinished, before it or beside it; None while too little is known.

        left: of jobs that have begun, the steps that all of their rows have yet to take. While the rows that run take turns, a round costs
        one step of every pool. A row that finds no free slot waits until enough of those before it are through; one that has fewer steps to
        go than the job is in its way for that share of its rounds.
        """
        ahead = [_Ahead(other, (left or {}).get(other.id, _steps(other))) for other in others]
        ahead = [each for each in ahead if each.left]
        rows = sum(each.rows for each in ahead) + len(job.seeds)
        own = _Ahead(job, _steps(job))
        waiting = sum(each.left for each in [*ahead, own]) / rows * max(0, rows - slots) / slots
        rounds = job.sampling.steps + waiting
        seconds = self._seconds_per_round([*ahead, own], rounds, slots, now)
        around = self._around.value if self._around and now - self._around.at < MEMORY_S else 0.0
        return None if seconds is None else rounds * seconds + around * rows

    def _seconds_per_round(self, jobs: Sequence[_Ahead], rounds: float, slots: int, now: float) -> float | None:
        present: dict[Pool, float] = defaultdict(float)
        branches: dict[Pool, float] = {}
        for each in jobs:
            for i in range(each.rows):
                pool, share = Pool.of(each.job, i), min(1.0, each.left / each.rows / rounds)
                present[pool] += share
                branches[pool] = branches.get(pool, 0.0) + share * each.job.branches
        running = min(1.0, slots / sum(present.values()))
        costs = [
            self._round(pool.width * pool.height, count * running, branches[pool] / count, now) for pool, count in present.items() if count
        ]
        return None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs)

    def _round(self, pixels: int, rows: float, branches: float, now: float) -> float | None:
        """Seconds of a step of so many rows of so many branches; of less than one row, its share of a step."""
        seconds = self.step(pixels, max(1.0, rows) * branches, now)
        return None if seconds is None else seconds * min(1.0, rows)

    def step(self, pixels: int, branches: float, now: float) -> float | None:
        """Seconds of a step of so many lanes; in a line between numbers that were measured, beyond and for other sizes in proportion."""
        recent = {p: {r: a.value for r, a in known.items() if now - a.at < MEMORY_S} for p, known in self._steps.items()}
        sizes = [p for p, known in recent.items() if known]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda p: abs(p - pixels))
        return _interpolate(recent[nearest], branches) * pixels / nearest


@dataclass(slots=True)
class Pace:
    """Seconds the workers take per row, averaged over about the last ten jobs; a fifth of a second before anything is measured."""

    seconds: float = 0.2
    rows: float = 1.0
    last_finish: float = field(default_factory=lambda: time.monotonic())

    def record(self, rows: float, sent_at: float) -> None:
        now = time.monotonic()
        self.seconds = 0.9 * self.seconds + now - max(self.last_finish, sent_at)
        self.rows = 0.9 * self.rows + rows
        self.last_finish = now

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows


def _interpolate(known: dict[int, float], branches: float) -> float:
    counts = sorted(known)
    i = bisect_left(counts, branches)
    if i == 0 or i == len(counts):
        closest = counts[min(i, len(counts) - 1)]
        return known[closest] * branches / closest
    low, high = counts[i - 1], counts[i]
    return known[low] + (known[high] - known[low]) * (branches - low) / (high - low)
