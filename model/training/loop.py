"""The one training loop. A trainer brings a module and a loss; this brings the clock, the schedule, EMA, checkpoints and the progress bar.

Time is the budget, not steps: `--minutes 20` means that on any machine, and the learning rate falls over the last 30 % of it. A checkpoint
holds everything about the networks, so `--resume` goes on where they stopped, with as many minutes more as asked and with new scenes.

Several processes, one a GPU or a core: `torchrun --nproc-per-node 2 -m model.training.denoiser …`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from model.runtime import pick_device, pick_dtype, prepare

Loss = Callable[[], tuple[Tensor, dict[str, Tensor]]]
_DECAY_SHARE = 0.3
_SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Options:
    """What every trainer takes from its command line."""

    minutes: float
    checkpoint: Path
    resume: bool
    batch: int
    lr: float
    warmup: int
    ema: float
    seed: int
    device: torch.device
    dtype: torch.dtype
    workers: int


def parser(description: str | None, *, name: str, batch: int, lr: float, minutes: float, ema: float = 0.999) -> argparse.ArgumentParser:
    """The common arguments, with a trainer's own defaults; it may add others before `options`."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=minutes, help=f"how long to train (default {minutes:g})")
    p.add_argument("--checkpoint", type=Path, default=Path("runs") / f"{name}.pt", help="written every two minutes and at the end")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    p.add_argument("--batch", type=int, default=batch, help=f"pictures a step (default {batch})")
    p.add_argument("--lr", type=float, default=lr, help=f"peak learning rate (default {lr:g})")
    p.add_argument("--warmup", type=int, default=200, help="steps until the peak")
    p.add_argument("--ema", type=float, default=ema, help="decay of the averaged weights, the ones that are kept")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", help="of the products; master weights are float32")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--workers", type=int, default=-1, help="processes that draw scenes; by default none on a CPU, all cores beside a GPU")
    return p


def options(args: argparse.Namespace) -> Options:
    """Parsed arguments → Options; also readies the process and seeds it."""
    prepare(args.threads)
    device = pick_device(args.device)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = pick_dtype(args.dtype, device)
    workers = args.workers if args.workers >= 0 else (os.cpu_count() or 1) - 1 if device.type == "cuda" else 0
    # A resumed run meets new scenes, not those it began with; so does every process of several.
    seed = args.seed + (load(args.checkpoint)["step"] if args.resume else 0) + 1_000_003 * rank()
    torch.manual_seed(seed)
    return Options(
        minutes=args.minutes,
        checkpoint=args.checkpoint,
        resume=args.resume,
        batch=args.batch,
        lr=args.lr,
        warmup=args.warmup,
        ema=args.ema,
        seed=seed,
        device=device,
        dtype=torch.bfloat16 if dtype == torch.float16 else dtype,  # bf16 needs no loss scaling
        workers=workers,
    )


def load(checkpoint: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's contents: `ema` (the weights to use), `model`, `optimizer`, `step`, `seconds`, `rng`."""
    return torch.load(checkpoint, map_location=device, weights_only=True)


def _save(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(contents, partial)
    partial.replace(path)


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


def rank() -> int:
    """This process's place among those that torchrun started; 0 for one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_over_processes(gradients: list[Tensor]) -> None:
    """Replaces every gradient by its mean over all processes, in one exchange."""
    if not dist.is_initialized():
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def first_clock(share: float) -> float:
    """The first process's share of the time: all must take the same number of steps at the same learning rates."""
    if not dist.is_initialized():
        return share
    shared = torch.tensor([share], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(shared, 0)
    return float(shared)


class _Run:
    """Model, average and optimizer of one training, and their way into a checkpoint and out of it."""

    def __init__(self, module: nn.Module, o: Options) -> None:
        self.module, self.o = module.to(o.device), o
        self.average = AveragedModel(module, multi_avg_fn=ema(o.ema), use_buffers=True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=o.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        self.parameters = parameters
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        if o.resume:
            self._restore(load(o.checkpoint, o.device))
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.module.load_state_dict(saved["model"])
        self.average.module.load_state_dict(saved["ema"])
        self.average.n_averaged.fill_(saved["step"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["rng"].cpu())

    def save(self) -> None:
        if rank() != 0:
            return
        contents = {
            "model": self.module.state_dict(),
            "ema": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),
        }
        _save(self.o.checkpoint, contents)

    def learn(self, loss: Loss, share: float) -> dict[str, Tensor]:
        """One step. share: how much of this call's time has passed, 0…1."""
        rate = self.o.lr * min(1.0, (self.step + 1) / self.o.warmup) * max(0.02, min(1.0, (1 - share) / _DECAY_SHARE))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.o.device.type, self.o.dtype, enabled=self.o.dtype != torch.float32):
            value, figures = loss()
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        average_over_processes([p.grad for p in self.parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.step += 1
        if not norm.isfinite():
            # One such step would make every weight NaN, and the next checkpoint with them.
            self.skipped += 1
            return {}
        self.optimizer.step()
        self.average.update_parameters(self.module)
        return {"loss": value.detach(), **figures}


def fit(
    module: nn.Module,
    loss: Loss,
    o: Options,
) -> nn.Module:
    """Trains `module` for `o.minutes` and returns its averaged twin.

    loss: draws its own batch; returns the scalar to minimise and figures to show.
    """
    run = _Run(module, o)
    start = saved = time.monotonic()
    earlier, total = run.seconds, o.minutes * 60
    shown: dict[str, float] = {}
    with tqdm(
        total=round(total), unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s{postfix}", mininterval=5, disable=rank() != 0
    ) as bar:
        while (share := first_clock((time.monotonic() - start) / total if total else 1.0)) < 1:
            for name, value in run.learn(loss, share).items():
                shown[name] = 0.98 * shown.get(name, float(value)) + 0.02 * float(value)
            run.seconds = earlier + time.monotonic() - start
            bar.n = share * total
            bar.set_postfix({"step": run.step, "skipped": run.skipped, **{k: f"{v:.4g}" for k, v in shown.items()}}, refresh=False)
            bar.update(0)
            if time.monotonic() - saved > _SAVE_SECONDS:
                run.save()
                saved = time.monotonic()
    run.save()
    return run.average.module
