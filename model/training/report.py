"""Show a training's progress: a bar, and on request scalars for TensorBoard."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor
from tqdm import tqdm

from model.training.processes import rank

_WRITE_EVERY = 10  # steps, of which the means are written


@dataclass(frozen=True)
class Moment:
    """The state of a training after a step.

    done: the share of its budget that is spent. images: trained on by this process so far.
    """

    step: int
    done: float
    learning_rate: float
    images: int
    skipped_steps: int
    skipped_files: Mapping[str, int]


class Report:
    """The progress bar and the scalars of a training; only the first process shows them.

    total: the budget, in `unit`. log_dir: the folder for scalars, or None. first_step: scalars from
    this step on replace those of an earlier run that got further. Raises ImportError with a log_dir
    but without TensorBoard.
    """

    def __init__(self, total: float, unit: str, log_dir: Path | None, first_step: int) -> None:
        bar_format = f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total}} {unit}{{postfix}}"
        self.bar = tqdm(
            total=round(total), bar_format=bar_format, mininterval=5, disable=rank() != 0
        )
        self.total, self.smooth = total, dict[str, float]()
        self._sums, self._steps = defaultdict[str, float](float), 0
        self._latest: Moment | None = None
        self._first = first_step - 1
        self._since, self._images = time.monotonic(), 0
        self._writer = None
        if log_dir is not None and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(log_dir), purge_step=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self._writer is not None:
            self._write()
            self._writer.close()

    def update(self, figures: Mapping[str, Tensor | float], now: Moment) -> None:
        """Record a step. figures: of this step; empty for a skipped step."""
        for name, figure in figures.items():
            value = float(figure)
            self.smooth[name] = 0.98 * self.smooth.get(name, value) + 0.02 * value
            self._sums[name] += value
        self._steps += bool(figures)
        due = now.step // _WRITE_EVERY != (
            self._latest.step // _WRITE_EVERY if self._latest else self._first // _WRITE_EVERY
        )
        self._latest = now
        self._show(now)
        if due:
            self._write()

    def _show(self, now: Moment) -> None:
        shown: dict[str, object] = {"step": now.step, "skipped": now.skipped_steps}
        if now.skipped_files:
            shown["left out"] = by_reason(now.skipped_files)
        self.bar.n = now.done * self.total
        self.bar.set_postfix(
            shown | {name: f"{value:.4g}" for name, value in self.smooth.items()}, refresh=False
        )
        self.bar.update(0)

    def _write(self) -> None:
        """Write everything since the last call, as means and rates."""
        now, clock = self._latest, time.monotonic()
        if self._writer is None or now is None or not self._steps:
            return
        scalars = {name: value / self._steps for name, value in self._sums.items()}
        scalars["learning_rate"] = now.learning_rate
        scalars["images_per_second"] = (now.images - self._images) / max(clock - self._since, 1e-9)
        scalars["skipped/steps"] = now.skipped_steps
        scalars["skipped/files"] = sum(now.skipped_files.values())
        scalars |= {
            f"skipped/{reason.replace(' ', '_')}": count
            for reason, count in now.skipped_files.items()
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, now.step)
        self._sums.clear()
        self._steps = 0
        self._since = clock
        self._images = now.images


def by_reason(counts: Mapping[str, int]) -> str:
    """Return counts as text, the most frequent first: "3 damaged, 1 no caption"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common())
