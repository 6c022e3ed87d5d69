"""Trainings of a few steps: the loop runs on time, so here a clock stands still until the last of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor, nn

from model.training import loop

_FIT = loop.fit


class Clock:
    """Stands in for `time` in the loop: no time passes until it is over."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def end(self) -> None:
        self.now = 1e9


def fit(
    monkeypatch: pytest.MonkeyPatch, steps: int, module: nn.Module, loss: loop.Loss, o: loop.Options, **rest: Any
) -> tuple[nn.Module, list[float]]:
    """`loop.fit` for a number of steps instead of minutes: (averaged module, losses)."""
    clock, losses = Clock(), []

    def counted() -> tuple[Tensor, dict[str, Tensor]]:
        value, figures = loss()
        losses.append(value.item())
        if len(losses) == steps:
            clock.end()
        return value, figures

    with monkeypatch.context() as patched:
        patched.setattr(loop, "time", clock)
        return _FIT(module, counted, o, **rest), losses


def run_main(monkeypatch: pytest.MonkeyPatch, trainer: ModuleType, checkpoint: Path, steps: int, *arguments: str) -> list[float]:
    """A trainer's command line, for a number of steps instead of minutes: its losses."""
    losses: list[float] = []

    def short(module: nn.Module, loss: loop.Loss, o: loop.Options, **rest: Any) -> nn.Module:
        average, seen = fit(monkeypatch, steps, module, loss, o, **rest)
        losses.extend(seen)
        return average

    fixed = ["--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--warmup", "3", "--batch", "16"]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "fit", short)
        patched.setattr(sys, "argv", ["trainer", *arguments, *fixed])
        trainer.main()
    return losses
