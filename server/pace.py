"""Measure the pace of work, to tell rejected clients when to retry."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Pace:
    """Busy seconds per unit of work, averaged over about ten jobs; 0.2 before the first.

    Not for use from several threads.
    """

    seconds: float = 0.2
    units: float = 1.0
    last_finish: float = field(default_factory=lambda: time.monotonic())

    def record(self, units: float, began: float) -> None:
        """Record a finished job of so many units. began: monotonic seconds."""
        now = time.monotonic()
        self.seconds = 0.9 * self.seconds + now - max(self.last_finish, began)
        self.units = 0.9 * self.units + units
        self.last_finish = now

    @property
    def seconds_per_unit(self) -> float:
        """The average."""
        return self.seconds / self.units
