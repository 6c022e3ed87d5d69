"""Trainings of a few steps. Where the loop runs on time, a clock stands still until the last of
them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
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
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    module: nn.Module,
    loss: loop.Loss | loop.Mixture,
    o: loop.Options,
    **rest: Any,
) -> tuple[nn.Module, list[float]]:
    """`loop.fit` for a number of steps instead of minutes: (averaged module, losses)."""
    clock, losses = Clock(), []

    def look(value: float) -> None:
        losses.append(value)
        if len(losses) == steps:
            clock.end()

    with monkeypatch.context() as patched:
        patched.setattr(loop, "time", clock)
        return _FIT(module, watched(loss, look), o, **rest), losses


def watched(
    loss: loop.Loss | loop.Mixture, look: Callable[[float], None]
) -> loop.Loss | loop.Mixture:
    """The loss, or every one of a mixture, told to `look` as a number each time that it is
    computed."""
    if isinstance(loss, loop.Mixture):
        return replace(loss, losses=tuple(watched(own, look) for own in loss.losses))

    def counted() -> tuple[Tensor, dict[str, Tensor]]:
        value, figures = loss()
        look(value.item())
        return value, figures

    return counted


def run_main(
    monkeypatch: pytest.MonkeyPatch,
    trainer: ModuleType,
    checkpoint: Path,
    steps: int,
    *arguments: str,
) -> list[float]:
    """A trainer's command line, for a number of steps instead of minutes: its losses."""
    losses: list[float] = []

    def short(
        module: nn.Module, loss: loop.Loss | loop.Mixture, o: loop.Options, **rest: Any
    ) -> nn.Module:
        average, seen = fit(monkeypatch, steps, module, loss, o, **rest)
        losses.extend(seen)
        return average

    fixed = [
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--warmup",
        "3",
        "--batch",
        "16",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "fit", short)
        patched.setattr(sys, "argv", ["trainer", *arguments, *fixed])
        trainer.main()
    return losses


class Crash(Exception):  # noqa: N818, it is none of the program
    """What ends a training before its time."""


def run(
    monkeypatch: pytest.MonkeyPatch,
    trainer: ModuleType,
    checkpoint: Path,
    *arguments: object,
    crash_at: int | None = None,
    crash_in: Path | None = None,
) -> list[float]:
    """A trainer's command line with `--steps` among the arguments: its losses. With `crash_at`,
    raises Crash after that step and its checkpoint, in the middle of the next; with `crash_in`,
    only in the training with that checkpoint."""
    losses: list[float] = []

    def interrupted(
        module: nn.Module, loss: loop.Loss | loop.Mixture, o: loop.Options, **rest: Any
    ) -> nn.Module:
        def look(value: float) -> None:
            losses.append(value)
            if (
                o.checkpoint.exists()
                and crash_at is not None
                and crash_in in (None, o.checkpoint)
                and loop.load(o.checkpoint)["step"] == crash_at
            ):
                raise Crash

        return _FIT(module, watched(loss, look), o, **rest)

    fixed = ["--checkpoint", checkpoint, "--device", "cpu", "--dtype", "float32", "--warmup", "3"]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "fit", interrupted)
        patched.setattr(loop, "_SAVE_SECONDS", -1.0)
        patched.setattr(sys, "argv", ["trainer", *map(str, (*arguments, *fixed))])
        trainer.main()
    return losses
