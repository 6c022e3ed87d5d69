"""Measure medians by the device's own clock, and the device's limits.

The limits are its rate of matrix products and that of its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from load_tests.report import quantiles

Stage = Callable[[], object]

_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Budget:
    """The repeats of a stage.

    `runs` times, fewer if that takes more than `seconds`, but never fewer than `least`.
    """

    runs: int
    seconds: float = 4.0
    least: int = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The device's limits.

    flops: of a large matrix product, per second. bytes: read and written in a large copy, per
    second.
    """

    flops: float
    bytes: float

    def floor_ms(self, flops: float, read: float) -> float:
        """Return the least milliseconds: the longer of the arithmetic's and the memory's time."""
        return 1000 * max(flops / self.flops, read / self.bytes)


def measure(stage: Stage, device: torch.device, budget: Budget) -> dict[str, Any]:
    """Return count and quantiles of single runs in milliseconds.

    The device's queue is emptied between runs.
    """
    for _ in range(_WARM_UP):
        stage()
    synchronise(device)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < budget.least or (
        len(seconds) < budget.runs and time.perf_counter() - began < budget.seconds
    ):
        seconds.append(_seconds(stage, device))
    return quantiles(seconds)


def _seconds(stage: Stage, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        stage()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    stage()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(
    device: torch.device, dtype: torch.dtype, budget: Budget, *, side: int = 8192
) -> Ceilings:
    """Measure the limits on random values.

    A product of side × side matrices, and a copy of memory of four times its operands'.
    """
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, budget)["p50_ms"] / 1000
    source = torch.randn(16, side, side, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, budget)["p50_ms"] / 1000
    # A product so small that its time rounds to nothing says nothing, but must not divide by it.
    return Ceilings(2 * side**3 / max(product, 1e-6), 2 * source.nbytes / max(copy, 1e-6))
