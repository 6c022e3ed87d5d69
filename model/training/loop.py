"""Run a training: budget, learning rate schedule, EMA, checkpoints and progress bar.

A trainer brings a module and a loss. The budget is time: `--minutes 20` means that on any machine,
and the learning rate falls over the last 30 % of it (`--fall`). A checkpoint holds the whole state
of the networks, so `--resume` continues from there, for as many minutes as given and with new
scenes.

Or the budget is steps: `--steps 10000` is the same training on any machine, and `--resume` finishes
it as if it had never been interrupted, bit for bit if one process trains on the same machine.

Ctrl-C or SIGTERM ends a training after its current step, with a checkpoint.

Several processes, one a GPU or a core: `torchrun --nproc-per-node 2 -m model.training.denoiser …`.

On CUDA nothing waits for the device: a step is recorded once as a graph and replayed. For that a
loss must take its batch from tensors that stay where they are, and read no number from the device.
A step with a gradient that is not finite is skipped on the device, and figures are read every 2
seconds.
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.training import checkpoint
from model.training.checkpoint import load
from model.training.interruption import Interruption
from model.training.optimizers import Optimizers
from model.training.options import Options, options, parser
from model.training.processes import average_over_processes, first_clock, rank, total, world
from model.training.report import Moment, Report, by_reason

__all__ = [
    "Average",
    "Data",
    "Loss",
    "Mixture",
    "Options",
    "fit",
    "load",
    "options",
    "parser",
    "prepared",
    "rank",
    "replace",
    "restore_noise",
]

Loss = Callable[[], tuple[Tensor, dict[str, Tensor]]]
_SAVE_SECONDS = 120.0
# On CUDA:
_REHEARSALS = 3  # steps before one is recorded
_UNDER_WAY = 4  # steps that the host may be ahead of the device
_LOOK_SECONDS = 2.0  # between two reads of the figures


class Data(Protocol):
    """The source of a loss's batches, if it has a position to save."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Return the number of unusable files, by reason."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""


@dataclass(frozen=True)
class Mixture:
    """Losses of different batches, each with a share of the steps.

    The number of a step determines its loss.
    """

    losses: tuple[Loss, ...]
    shares: tuple[float, ...]

    def of(self, step: int) -> Loss:
        """Return the loss of a step."""
        return random.Random(step).choices(self.losses, self.shares)[0]


class Average:
    """A module's twin, with the moving average of its weights.

    The decay is at most `decay`, and lower in the first steps, which would else dominate the
    average of a short run. `advance` sets on the host the weight of the next `update`, which
    touches tensors alone.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = deepcopy(module).requires_grad_(False)
        self.decay = decay
        self.n_averaged = 0
        # A tensor outside the state dict is no weight, and a mask's infinities have no average.
        twins, originals = self.module.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
        once = {
            id(original): name for name, original in originals.items()
        }  # of a tensor with two names only one is averaged
        pairs = [(twins[name].detach(), originals[name].detach()) for name in once.values()]
        self._old = [old for old, _ in pairs if old.is_floating_point()]
        self._new = [new for old, new in pairs if old.is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._share = torch.ones((), device=next(module.parameters()).device)

    def advance(self) -> None:
        """Set the weight of the next `update`."""
        n = self.n_averaged
        if n == 0:  # the twins of several processes are one from here on, to the last bit
            torch._foreach_copy_(self._old, self._new)
        self._share.fill_(1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0)
        self.n_averaged += 1

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's weights."""
        for old, new in self._counters:
            old.copy_(new)
        change = torch._foreach_sub(self._new, self._old)
        torch._foreach_mul_(change, self._share)
        torch._foreach_add_(self._old, change)


def restore_noise(saved: Mapping[str, Any], device: torch.device) -> None:
    """Continue with the random numbers that a checkpoint's training would have drawn next."""
    if rank() != 0:  # the saved ones are the first process's; the others' must stay others
        return
    torch.set_rng_state(saved["rng"].cpu())
    if "cuda_rng" in saved and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"].cpu(), device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _Run:
    """Hold a training's model, average, optimizers and data, and save and restore them."""

    def __init__(
        self, module: nn.Module, o: Options, data: Data | None = None, matrices: Iterable[str] = ()
    ) -> None:
        self.module = module.to(o.device)
        self.o = o
        self.data = data
        self.average = Average(module, o.ema)
        self.optimizers = Optimizers(module, o.lr, matrices)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.recording = o.record and o.device.type == "cuda" and not dist.is_initialized()
        self._recorded: dict[Loss, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None  # of the recorded steps
        self._sums, self._summed = dict[str, Tensor](), 0
        self._under_way = deque[torch.cuda.Event]()
        if o.resume:
            self._restore(checkpoint.resumable(o.checkpoint, o.device))
        self.first_step = self.step
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.module.load_state_dict(saved["model"])
        self.average.module.load_state_dict(saved["ema"])
        self.average.n_averaged = saved.get("averaged", saved["step"])
        self.optimizers.load_state_dict(saved["optimizers"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        if self.data is not None and "data" in saved:
            self.data.load_state_dict(saved["data"])
        restore_noise(saved, self.o.device)

    def save(self) -> None:
        """Write the checkpoint. Every process must call this; the first one writes."""
        self.optimizers.gather()
        if rank() != 0:
            return
        contents = {
            "model": self.module.state_dict(),
            "ema": self.average.module.state_dict(),
            "averaged": self.average.n_averaged,
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
        """Return the share of the budget that is spent, 0 … 1.

        elapsed: seconds of this call of `fit`.
        """
        if self.o.steps is not None:
            return self.step / self.o.steps
        seconds = self.o.minutes * 60
        return first_clock(elapsed / seconds if seconds else 1.0)

    def rate(self, share: float) -> float:
        """Return the next step's learning rate. share: of the budget that is spent."""
        return (
            self.o.lr
            * min(1.0, (self.step + 1) / self.o.warmup)
            * max(0.02, min(1.0, (1 - share) / self.o.fall))
        )

    def learn(self, loss: Loss | Mixture, share: float) -> dict[str, Tensor]:
        """Take one step, and return its loss and figures.

        Returns nothing for a skipped step, and on CUDA, where `drain` returns the figures.
        """
        self.optimizers.lr = self.rate(share)
        own = loss.of(self.step) if isinstance(loss, Mixture) else loss
        self.step += 1
        if self.o.device.type == "cuda":
            self._launch(own)
            return {}
        figures = self.gradients(own)
        average_over_processes([p.grad for p in self.parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not norm.isfinite():
            # One such step would make every weight NaN, and the next checkpoint with them.
            self.skipped += 1
            return {}
        self.optimizers.step()
        self.average.advance()
        self.average.update()
        return figures

    def _launch(self, loss: Loss) -> None:
        """Take one step on CUDA, recorded if that is possible."""
        self.average.advance()
        if self.recording and loss not in self._recorded:
            self._record(loss)
        if loss in self._recorded:
            self._recorded[loss].replay()
        else:
            self._compute(loss)
        self._summed += 1
        done = torch.cuda.Event()
        done.record()
        self._under_way.append(done)
        if (
            len(self._under_way) > _UNDER_WAY
        ):  # the clock that the budget is read from must not run ahead of the device
            self._under_way.popleft().synchronize()

    def _compute(self, loss: Loss) -> None:
        """Compute a whole step without waiting for the device."""
        figures = self.gradients(loss)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        average_over_processes(gradients)
        whole = nn.utils.clip_grad_norm_(self.parameters, 1.0).isfinite()
        for gradient in gradients:
            gradient.masked_fill_(~whole, 0)
        self.optimizers.step()
        self.average.update()
        for name, figure in {**figures, "skipped": ~whole}.items():
            figure = figure.float().masked_fill(~whole, 0) if name != "skipped" else figure.float()
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(figure)
            self._sums[name].add_(figure)

    def _record(self, loss: Loss) -> None:
        """Take a few steps, then record one without taking it.

        In the first steps libraries choose kernels and allocate.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_REHEARSALS):
                self._compute(loss)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizers.zero_grad()
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            # Nothing of one step is read after another, so all may be in the same memory.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._compute(loss)
            self._memory = graph.pool()
        except RuntimeError as error:
            print(f"not recorded, computed step by step: {error}", file=sys.stderr, flush=True)
            torch.cuda.synchronize()
            self.recording = False
            return
        self._recorded[loss] = graph

    def rehearse(self, losses: Iterable[Loss]) -> None:
        """Record every loss's step beforehand, with whatever its batches hold now.

        Weights and optimizers are restored afterwards.
        """
        if not self.recording:
            return
        state = [*_tensors(self.module), *_tensors(self.average.module)]
        kept = [tensor.detach().clone() for tensor in state]
        self.optimizers.lr = 0.0
        self.average.advance()
        for loss in losses:
            if self.recording:
                self._record(loss)
        with torch.no_grad():
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
        self.optimizers.forget()
        self.average.n_averaged = 0
        for summed in self._sums.values():
            summed.zero_()

    def drain(self) -> dict[str, Tensor]:
        """Return the means of the figures since the last call, on CUDA. Waits for the device."""
        values = {name: float(summed) for name, summed in self._sums.items()}
        for summed in self._sums.values():
            summed.zero_()
        self.skipped += round(values.pop("skipped", 0))
        steps, self._summed = max(self._summed, 1), 0
        return {name: torch.tensor(value / steps) for name, value in values.items()}

    def gradients(self, loss: Loss) -> dict[str, Tensor]:
        """Compute the gradient of the mean of `accumulate` losses, and return the means.

        The means are those of the loss and of the figures.
        """
        self.optimizers.zero_grad()
        means = defaultdict[str, Tensor](lambda: torch.zeros((), device=self.o.device))
        for _ in range(self.o.accumulate):
            with torch.autocast(
                self.o.device.type, self.o.dtype, enabled=self.o.dtype != torch.float32
            ):
                value, figures = loss()
            value = value / self.o.accumulate
            value.backward()
            means["loss"] += value.detach()
            for name, figure in figures.items():
                means[name] += figure / self.o.accumulate
        return means

    def moment(self, share: float) -> Moment:
        """Return the state of the training after a step.

        share: of the budget that was spent before the step.
        """
        return Moment(
            step=self.step,
            done=share if self.o.steps is None else self.step / self.o.steps,
            learning_rate=self.optimizers.lr,
            images=(self.step - self.first_step) * self.o.batch * self.o.accumulate * world(),
            skipped_steps=self.skipped,
            skipped_files=self.data.skipped if self.data is not None else {},
        )


def prepared(
    module: nn.Module, losses: Iterable[Loss], o: Options, matrices: Iterable[str] = ()
) -> _Run:
    """Return a training that has not begun, with its steps recorded if that is possible.

    Recording takes long and needs no data yet.
    """
    run = _Run(module, o, None, matrices)
    run.rehearse(losses)
    return run


def fit(
    module: nn.Module,
    loss: Loss | Mixture,
    o: Options,
    data: Data | None = None,
    matrices: Iterable[str] = (),
    before: Callable[[], None] | None = None,
    saved: Callable[[nn.Module], None] | None = None,
    run: _Run | None = None,
) -> nn.Module:
    """Train `module` until the budget is spent, and return its averaged twin.

    loss: draws its own batch; returns the scalar to minimise and figures to show. data: its source
    of batches, to be saved in checkpoints. matrices: names of the parameters that Muon steps.
    before: called before every step, never recorded. saved: called with the averaged twin after
    every checkpoint but the last. run: the result of `prepared` for the same module, to continue
    with.

    Raises SystemExit with 130 after SIGINT and with 143 after SIGTERM, once the checkpoint is
    written.
    """
    if run is None:
        run = _Run(module, o, data, matrices)
    run.o, run.data = o, data
    on_cuda = o.device.type == "cuda"
    start = last_save = looked = time.monotonic()
    earlier = run.seconds
    budget, unit = (o.minutes * 60, "s") if o.steps is None else (o.steps, "steps")
    with Report(budget, unit, o.log_dir, run.step + 1) as report, Interruption() as interruption:
        stopped = 0
        while not stopped and (share := run.share(time.monotonic() - start)) < 1:
            if before is not None:
                before()
            figures = run.learn(loss, share)
            now = time.monotonic()
            run.seconds = earlier + now - start
            if not on_cuda:
                report.update(figures, run.moment(share))
            elif now - looked > _LOOK_SECONDS:
                report.update(run.drain(), run.moment(share))
                looked = now
            if first_clock(now - last_save) > (o.save_seconds or _SAVE_SECONDS):
                run.save()
                if saved is not None:
                    saved(run.average.module)
                last_save = time.monotonic()
            stopped = int(first_clock(interruption.signal))
        if on_cuda:
            report.update(run.drain(), run.moment(share))
        run.save()
        stopped = int(first_clock(interruption.signal))
    _tell_end(run, stopped)
    if stopped:
        raise SystemExit(128 + stopped)
    return run.average.module


def _tell_end(run: _Run, stopped: int) -> None:
    """Print what was left out, and whether a signal ended the training. Every process calls it."""
    left_out = total(run.data.skipped if run.data is not None else {})
    if left_out and rank() == 0:
        print(f"images left out: {by_reason(left_out)}")
    if stopped and rank() == 0:
        print(f"interrupted at step {run.step}; continue with --resume", file=sys.stderr)
