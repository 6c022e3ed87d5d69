"""Predict a job's latency from measured step times, to reject a job that would be late at once."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.engine.messages import Job, Step, Timings
from server.engine.scheduler import Pool

# Older measurements reject no job: one slow step on an idle server would otherwise reject all that
# follow.
MEMORY_S = 60.0
# The weight of the latest value in an average.
WEIGHT = 0.2


@dataclass(slots=True)
class _Average:
    """A moving average of about five values. at: time of the latest, monotonic seconds."""

    value: float
    at: float

    def record(self, value: float, now: float) -> None:
        """Add a value."""
        self.value += WEIGHT * (value - self.value)
        self.at = now


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of an admitted job.

    position: rows that must be done before its first can start. seconds: until it should be done.
    """

    position: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Unfinished:
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
    """Averages of a step's seconds, by image size and branches, and of a row's other seconds.

    measured_at: time of the last step that was recorded, monotonic seconds.
    """

    measured_at: float = -math.inf
    _steps: dict[int, dict[int, _Average]] = field(default_factory=dict)
    _overhead: _Average | None = None

    def record_step(self, step: Step, now: float) -> None:
        """Record a finished step."""
        self.measured_at = now
        known = self._steps.setdefault(step.pixels, {})
        known.setdefault(step.branches, _Average(step.seconds, now)).record(step.seconds, now)

    def record_job(self, rows: int, timings: Timings, now: float) -> None:
        """Record the time of a finished job outside its steps."""
        seconds = (timings.encode + timings.prior + timings.decode) / rows
        if self._overhead is None:
            self._overhead = _Average(seconds, now)
        self._overhead.record(seconds, now)

    def predict(
        self,
        job: Job,
        others: Sequence[Job],
        slots: int,
        now: float,
        left: Mapping[str, int] | None = None,
    ) -> float | None:
        """Return the seconds from now until `job` is done while `others` are unfinished.

        Returns None while too little is known. left: of started jobs, the steps that all of their
        rows have yet to take.

        While the running rows take turns, a round costs one step of every pool. A row without a
        free slot waits until enough of the rows before it are done. A row with fewer steps to go
        than the job delays it in that share of its rounds.
        """
        unfinished = [
            _Unfinished(other, (left or {}).get(other.id, _steps(other))) for other in others
        ]
        unfinished = [each for each in unfinished if each.left]
        everything = [*unfinished, _Unfinished(job, _steps(job))]
        rows = sum(each.rows for each in everything)
        waiting = sum(each.left for each in everything) / rows * max(0, rows - slots) / slots
        rounds = job.sampling.steps + waiting
        seconds = self._seconds_per_round(everything, rounds, slots, now)
        recent = self._overhead is not None and now - self._overhead.at < MEMORY_S
        overhead = self._overhead.value if self._overhead and recent else 0.0
        return None if seconds is None else rounds * seconds + overhead * rows

    def _seconds_per_round(
        self, jobs: Sequence[_Unfinished], rounds: float, slots: int, now: float
    ) -> float | None:
        present: dict[Pool, float] = defaultdict(float)
        branches: dict[Pool, float] = defaultdict(float)
        for each in jobs:
            share = min(1.0, each.left / each.rows / rounds)
            for i in range(each.rows):
                pool = Pool.of(each.job, i)
                present[pool] += share
                branches[pool] += share * each.job.branches
        running = min(1.0, slots / sum(present.values()))
        seconds = [
            self._round(pool.width * pool.height, count * running, branches[pool] / count, now)
            for pool, count in present.items()
            if count
        ]
        return (
            None if any(each is None for each in seconds) else sum(each or 0.0 for each in seconds)
        )

    def _round(self, pixels: int, rows: float, branches: float, now: float) -> float | None:
        """Return the seconds of a step of so many rows; of less than one row, its share of a step.

        branches: of each row.
        """
        seconds = self.step(pixels, max(1.0, rows) * branches, now)
        return None if seconds is None else seconds * min(1.0, rows)

    def step(self, pixels: int, branches: float, now: float) -> float | None:
        """Return the seconds of a step of so many branches.

        Interpolated between measured numbers; in proportion beyond them and for other sizes.
        """
        recent = {
            size: {
                count: average.value
                for count, average in known.items()
                if now - average.at < MEMORY_S
            }
            for size, known in self._steps.items()
        }
        sizes = [size for size, known in recent.items() if known]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda size: abs(size - pixels))
        return _interpolate(recent[nearest], branches) * pixels / nearest


@dataclass(slots=True)
class Pace:
    """Seconds that workers take per row, averaged over about ten jobs; 0.2 before the first."""

    seconds: float = 0.2
    rows: float = 1.0
    last_finish: float = field(default_factory=lambda: time.monotonic())

    def record(self, rows: float, sent_at: float) -> None:
        """Record a finished job of so many rows. sent_at: monotonic seconds."""
        now = time.monotonic()
        self.seconds = 0.9 * self.seconds + now - max(self.last_finish, sent_at)
        self.rows = 0.9 * self.rows + rows
        self.last_finish = now

    @property
    def seconds_per_row(self) -> float:
        """The average."""
        return self.seconds / self.rows


def _interpolate(known: dict[int, float], branches: float) -> float:
    counts = sorted(known)
    i = bisect_left(counts, branches)
    if i == 0 or i == len(counts):
        closest = counts[min(i, len(counts) - 1)]
        return known[closest] * branches / closest
    low, high = counts[i - 1], counts[i]
    return known[low] + (known[high] - known[low]) * (branches - low) / (high - low)
