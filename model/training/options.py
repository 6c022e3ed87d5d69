"""Define the command line that all trainers share."""

from __future__ import annotations

import argparse
import atexit
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from model.runtime import pick_device, pick_dtype, prepare
from model.training import checkpoint
from model.training.arguments import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SOME_SHARE,
    at_least,
)
from model.training.processes import rank
from model.whole_file import check_place


@dataclass(frozen=True)
class Options:
    """A training's budget and settings.

    steps: the budget, counted from the very first step, or None for `minutes` from now on. batch:
    images of one pass; `accumulate` passes make a step. seed: for values that must be new after a
    resumption; data_seed: for data whose position is in the checkpoint. save_seconds: between two
    checkpoints, 0 for the usual two minutes. record: record steps on CUDA as graphs if possible.
    fall: the last share of the budget, over which the learning rate falls.
    """

    minutes: float
    steps: int | None
    checkpoint: Path
    log_dir: Path | None
    resume: bool
    batch: int
    accumulate: int
    lr: float
    warmup: int
    ema: float
    seed: int
    data_seed: int
    device: torch.device
    dtype: torch.dtype
    workers: int
    save_seconds: float = 0.0
    record: bool = True
    fall: float = 0.3


def parser(
    description: str | None,
    *,
    name: str,
    batch: int,
    lr: float,
    minutes: float,
    ema: float = 0.999,
    steps_option: str = "--steps",
) -> argparse.ArgumentParser:
    """Return a parser of the common arguments, with a trainer's own defaults.

    The trainer may add arguments before it calls `options`. steps_option: the name of the budget in
    steps, for a trainer that means sampling steps by `--steps`.
    """
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--minutes", type=POSITIVE, default=minutes, help=f"how long to train (default {minutes:g})"
    )
    p.add_argument(
        steps_option,
        dest="steps",
        type=COUNT,
        help="how long to train instead: this many steps, those before --resume among them",
    )
    p.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("runs") / f"{name}.pt",
        help=f"written every two minutes, at the end and after Ctrl-C (default runs/{name}.pt); "
        "without --resume it must not exist",
    )
    p.add_argument(
        "--log-dir", type=Path, help="where to write TensorBoard scalars (default nowhere)"
    )
    p.add_argument(
        "--corpus",
        type=Path,
        help="what `python -m model.training.corpus` wrote; without it, a small one is sampled",
    )
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    p.add_argument("--batch", type=COUNT, default=batch, help=f"images a pass (default {batch})")
    p.add_argument(
        "--accumulate",
        type=COUNT,
        default=1,
        help="passes a step (default 1): for batches that do not fit into memory",
    )
    p.add_argument(
        "--lr", type=NOT_NEGATIVE, default=lr, help=f"peak learning rate (default {lr:g})"
    )
    p.add_argument(
        "--warmup", type=COUNT, default=200, help="steps until the peak (default %(default)s)"
    )
    p.add_argument(
        "--fall",
        type=SOME_SHARE,
        default=0.3,
        help="the last share of the training, over which the rate falls (default 0.3)",
    )
    p.add_argument(
        "--ema",
        type=BELOW_ONE,
        default=ema,
        help="decay of the averaged weights, the ones that are kept (default %(default)s)",
    )
    p.add_argument(
        "--seed", type=at_least(0), default=0, help="of weights and data (default %(default)s)"
    )
    add_device_arguments(p, "number type of the products; weights are float32")
    p.add_argument(
        "--no-record", action="store_true", help="on CUDA, launch every operator of every step anew"
    )
    p.add_argument(
        "--workers",
        type=at_least(-1),
        default=-1,
        help="threads that decode images (default -1: none on a CPU, all cores beside a GPU)",
    )
    return p


def add_device_arguments(p: argparse.ArgumentParser, dtype: str | None = "number type") -> None:
    """Add --device, --threads and --dtype. dtype: its help, None for a command without it."""
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    if dtype is not None:
        types = ("auto", "float32", "float16", "bfloat16")
        p.add_argument("--dtype", choices=types, default="auto", help=f"{dtype} (default auto)")
    p.add_argument(
        "--threads", type=at_least(0), default=0, help="CPU threads (default 0: as torch chooses)"
    )


def options(args: argparse.Namespace) -> Options:
    """Turn parsed arguments into Options. Also prepares the process and seeds it.

    Raises ValueError or OSError where the checkpoint or the log cannot be written,
    FileNotFoundError or BundleError without a checkpoint to resume, and the errors of
    `pick_device`.
    """
    _check_places(args)
    saved = checkpoint.resumable(args.checkpoint) if args.resume else {}
    prepare(args.threads)
    device = _join_others(pick_device(args.device))
    dtype = pick_dtype(args.dtype, device)
    workers = (
        args.workers
        if args.workers >= 0
        else (os.cpu_count() or 1) - 1
        if device.type == "cuda"
        else 0
    )
    first = args.seed + 1_000_003 * rank()
    # A resumed run meets new scenes, not those it began with; so does every process of several.
    seed = first + saved.get("step", 0)
    torch.manual_seed(seed)
    return Options(
        minutes=args.minutes,
        steps=args.steps,
        checkpoint=args.checkpoint,
        log_dir=args.log_dir,
        resume=args.resume,
        batch=args.batch,
        accumulate=args.accumulate,
        lr=args.lr,
        warmup=args.warmup,
        ema=args.ema,
        seed=seed,
        data_seed=seed if saved and "data" not in saved else first,
        device=device,
        dtype=torch.bfloat16 if dtype == torch.float16 else dtype,  # bf16 needs no loss scaling
        workers=workers,
        record=not args.no_record,
        fall=args.fall,
    )


def _check_places(args: argparse.Namespace) -> None:
    """Check what will be written, before anything is computed. Raises ValueError and OSError."""
    check_place(args.checkpoint)
    if args.checkpoint.exists() and not args.resume:
        raise ValueError(
            f"{args.checkpoint} exists: go on from it with --resume, or name another --checkpoint"
        )
    if args.log_dir is not None and args.log_dir.exists() and not args.log_dir.is_dir():
        raise ValueError(f"--log-dir {args.log_dir} is a file; name a folder")


def _join_others(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if any, and return this process's device."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Before the group exists: these modules keep the group of their import as a default argument,
    # and then its threads never end.
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(_leave_others)
    return device


def _leave_others() -> None:
    """End the group's threads: one that frees a tensor while Python ends aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
