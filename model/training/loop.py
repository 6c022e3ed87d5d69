"""The one training loop. A trainer brings a module and a loss; this brings the budget, the schedule, EMA, checkpoints and the progress bar.

The budget is time: `--minutes 20` means that on any machine, and the learning rate falls over the last 30 % of it. A checkpoint holds
everything about the networks, so `--resume` goes on where they stopped, with as many minutes more as asked and with new scenes.

Or it is steps: `--steps 10000` is the same training on any machine, and with `--resume` it is finished as if it had never been interrupted,
bit for bit where one process trains on the same machine.

Several processes, one a GPU or a core: `torchrun --nproc-per-node 2 -m model.training.denoiser …`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from model.training import checkpoint
from model.training.checkpoint import load
from model.training.optimizers import Optimizers
from model.training.options import Options, options, parser
from model.training.processes import average_over_processes, first_clock, rank, total, world
from model.training.report import Moment, Report, by_reason

__all__ = ["Data", "Loss", "Options", "ema", "fit", "load", "options", "parser", "rank"]

Loss = Callable[[], tuple[Tensor, dict[str, Tensor]]]
_DECAY_SHARE = 0.3
_SAVE_SECONDS = 120.0


class Data(Protocol):
    """Where a loss takes its batches from, if that has a position to keep."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many files could not be used, by reason."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def ema(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Moving average with at most this decay: a short run would else average in its first steps."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        n = float(count)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new, share)
            else:
                old.copy_(new)

    return update


class _Run:
    """Model, average, optimizer and data of one training, and their way into a checkpoint and out of it."""

    def __init__(self, module: nn.Module, o: Options, data: Data | None = None, matrices: Iterable[str] = ()) -> None:
        self.module, self.o, self.data = module.to(o.device), o, data
        self.average = AveragedModel(module, multi_avg_fn=ema(o.ema), use_buffers=True)
        self.optimizers = Optimizers(module, o.lr, matrices)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        if o.resume:
            self._restore(load(o.checkpoint, o.device))
        self.first_step = self.step
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.module.load_state_dict(saved["model"])
        self.average.module.load_state_dict(saved["ema"])
        self.average.n_averaged.fill_(saved.get("averaged", saved["step"]))
        self.optimizers.load_state_dict(saved["optimizers"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        if self.data is not None and "data" in saved:
            self.data.load_state_dict(saved["data"])
        if rank() == 0:  # the saved noise is the first process's; the others' must stay another
            torch.set_rng_state(saved["rng"].cpu())
            if "cuda_rng" in saved and self.o.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), self.o.device)

    def save(self) -> None:
        """Every process must ask; the first one writes."""
        self.optimizers.gather()
        if rank() != 0:
            return
        contents = {
            "model": self.module.state_dict(),
            "ema": self.average.module.state_dict(),
            "averaged": int(self.average.n_averaged),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
        }
        if self.o.device.type == "cuda":
            contents["cuda_rng"] = torch.cuda.get_rng_state(self.o.device)
        if self.data is not None:
            contents["data"] = self.data.state_dict()
        checkpoint.save(self.o.checkpoint, contents)

    def share(self, elapsed: float) -> float:
        """How much of the budget is spent, 0…1. elapsed: seconds of this call."""
        if self.o.steps is not None:
            return self.step / self.o.steps
        seconds = self.o.minutes * 60
        return first_clock(elapsed / seconds if seconds else 1.0)

    def rate(self, share: float) -> float:
        """The next step's learning rate."""
        return self.o.lr * min(1.0, (self.step + 1) / self.o.warmup) * max(0.02, min(1.0, (1 - share) / _DECAY_SHARE))

    def learn(self, loss: Loss, share: float) -> dict[str, Tensor]:
        """One step; returns the loss and its figures, or nothing if the step was skipped."""
        self.optimizers.lr = self.rate(share)
        figures = self.gradients(loss)
        average_over_processes([p.grad for p in self.parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.step += 1
        if not norm.isfinite():
            # One such step would make every weight NaN, and the next checkpoint with them.
            self.skipped += 1
            return {}
        self.optimizers.step()
        self.average.update_parameters(self.module)
        return figures

    def gradients(self, loss: Loss) -> dict[str, Tensor]:
        """Leaves the gradient of the mean of `accumulate` losses in the parameters; returns the means of loss and figures."""
        self.optimizers.zero_grad()
        means = defaultdict[str, Tensor](lambda: torch.zeros((), device=self.o.device))
        for _ in range(self.o.accumulate):
            with torch.autocast(self.o.device.type, self.o.dtype, enabled=self.o.dtype != torch.float32):
                value, figures = loss()
            value = value / self.o.accumulate
            value.backward()
            means["loss"] += value.detach()
            for name, figure in figures.items():
                means[name] += figure / self.o.accumulate
        return means

    def moment(self, share: float) -> Moment:
        """After a step that was taken at this share of the budget."""
        return Moment(
            step=self.step,
            done=share if self.o.steps is None else self.step / self.o.steps,
            learning_rate=self.optimizers.lr,
            pictures=(self.step - self.first_step) * self.o.batch * self.o.accumulate * world(),
            skipped_steps=self.skipped,
            skipped_files=self.data.skipped if self.data is not None else {},
        )


def fit(module: nn.Module, loss: Loss, o: Options, data: Data | None = None, matrices: Iterable[str] = ()) -> nn.Module:
    """Trains `module` until the budget is spent and returns its averaged twin.

    loss: draws its own batch; returns the scalar to minimise and figures to show. data: where it draws from, to be kept in checkpoints.
    matrices: names of the parameters that Muon steps.
    """
    run = _Run(module, o, data, matrices)
    start = saved = time.monotonic()
    earlier = run.seconds
    budget, unit = (o.minutes * 60, "s") if o.steps is None else (o.steps, "steps")
    with Report(budget, unit, o.log_dir, run.step + 1) as report:
        while (share := run.share(time.monotonic() - start)) < 1:
            figures = run.learn(loss, share)
            run.seconds = earlier + time.monotonic() - start
            report.update(figures, run.moment(share))
            if first_clock(time.monotonic() - saved) > _SAVE_SECONDS:
                run.save()
                saved = time.monotonic()
    run.save()
    left_out = total(data.skipped if data is not None else {})
    if left_out and rank() == 0:
        print(f"pictures left out: {by_reason(left_out)}")
    return run.average.module
