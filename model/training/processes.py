"""Share one training among processes that torchrun started; a single process is rank 0 of 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes that share the training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_over_processes(gradients: list[Tensor]) -> None:
    """Replace every gradient by its mean over all processes, in one exchange."""
    if not dist.is_initialized():
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def first_clock(reading: float) -> float:
    """Return the first process's reading.

    All processes must take the same number of steps at the same learning rates, and save after the
    same step. Every process must call this.
    """
    if not dist.is_initialized():
        return reading
    shared = torch.tensor([reading], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(shared, 0)
    return float(shared)


def total(counts: Mapping[str, int]) -> Counter[str]:
    """Return the sum of all processes' counts. Every process must call this."""
    if not dist.is_initialized():
        return Counter(counts)
    gathered: list[dict[str, int]] = [{} for _ in range(world())]
    dist.all_gather_object(gathered, dict(counts))
    return sum(map(Counter, gathered), Counter())
