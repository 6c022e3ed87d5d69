"""What the workers' time goes to, as measured, and from that how long a job would take."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.protocol import Job, Step, Timings
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


@dataclass(slots=True)
class Costs:
    """Averages of a step's seconds by picture size and rows, and of the seconds a row takes before and after its steps."""

    _steps: dict[int, dict[int, _Average]] = field(default_factory=dict)
    _around: _Average | None = None

    def record_step(self, step: Step, now: float) -> None:
        known = self._steps.setdefault(step.pixels, {})
        known.setdefault(step.rows, _Average(step.seconds, now)).record(step.seconds, now)

    def record_job(self, rows: int, timings: Timings, now: float) -> None:
        seconds = (timings.encode + timings.prior + timings.decode) / rows
        if self._around is None:
            self._around = _Average(seconds, now)
        self._around.record(seconds, now)

    def predict(self, job: Job, others: Sequence[Job], slots: int, now: float) -> float | None:
        """Seconds from now until `job` is done while `others` are unfinished, before it or beside it; None while too little is known.

        While the rows that run take turns, a round costs one step of every pool. A row that finds no free slot waits until enough of those
        before it are through, which at any time are on average half way.
        """
        jobs = [*others, job]
        pools = Counter(Pool.of(j, i) for j in jobs for i in range(len(j.seeds)))
        rows = pools.total()
        share = min(1.0, slots / rows)
        costs = [self._round(pool.width * pool.height, count * share, now) for pool, count in pools.items()]
        if any(cost is None for cost in costs):
            return None
        mean_steps = sum(len(j.seeds) * j.sampling.steps for j in jobs) / rows
        steps = job.sampling.steps + mean_steps * max(0, rows - slots) / slots
        around = self._around.value if self._around and now - self._around.at < MEMORY_S else 0.0
        return steps * sum(cost or 0.0 for cost in costs) + around * rows

    def _round(self, pixels: int, rows: float, now: float) -> float | None:
        """Seconds of a step of so many rows; of less than one row, its share of a step."""
        seconds = self.step(pixels, max(1.0, rows), now)
        return None if seconds is None else seconds * min(1.0, rows)

    def step(self, pixels: int, rows: float, now: float) -> float | None:
        """Between two row counts that were measured in a line, beyond them and for other sizes in proportion."""
        recent = {p: {r: a.value for r, a in known.items() if now - a.at < MEMORY_S} for p, known in self._steps.items()}
        sizes = [p for p, known in recent.items() if known]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda p: abs(p - pixels))
        return _interpolate(recent[nearest], rows) * pixels / nearest


@dataclass(slots=True)
class Pace:
    """Seconds the workers take per row, averaged over about the last ten jobs; a fifth of a second before anything is measured."""

    seconds: float = 0.2
    rows: float = 1.0
    last_finish: float = field(default_factory=time.monotonic)

    def record(self, rows: int, sent_at: float) -> None:
        now = time.monotonic()
        self.seconds = 0.9 * self.seconds + now - max(self.last_finish, sent_at)
        self.rows = 0.9 * self.rows + rows
        self.last_finish = now

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows


def _interpolate(known: dict[int, float], rows: float) -> float:
    counts = sorted(known)
    i = bisect_left(counts, rows)
    if i == 0 or i == len(counts):
        closest = counts[min(i, len(counts) - 1)]
        return known[closest] * rows / closest
    low, high = counts[i - 1], counts[i]
    return known[low] + (known[high] - known[low]) * (rows - low) / (high - low)
