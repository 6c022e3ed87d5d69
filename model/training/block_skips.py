"""Leave out a denoiser's blocks at random in training, so that some can be removed afterwards.

After SnapFusion's robust training: a network that has met each block's absence loses less when a
block is taken out, and what it loses without each is worth comparing. Letters: B rows, H W grid, C
channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.networks.denoiser_v3 import Denoiser
from model.training.arguments import BELOW_ONE


def removable(denoiser: Denoiser) -> dict[str, nn.Module]:
    """Return the blocks that the network has and can do without, by name, in order."""
    config = denoiser.config
    left = (name for name in config.prunable_blocks if name not in config.pruned_blocks)
    return {name: denoiser.get_submodule(name) for name in left}


def add_argument(p: argparse.ArgumentParser) -> None:
    """Add `--skip-blocks` to a trainer's arguments."""
    p.add_argument(
        "--skip-blocks",
        type=BELOW_ONE,
        default=0.0,
        metavar="P",
        help="leave out each block of each image with this probability, so that blocks can be "
        "removed afterwards (0)",
    )


def skip_at_random(denoiser: Denoiser, probability: float) -> None:
    """Leave out each removable block of each row with a probability, in training mode.

    Each row's blocks are drawn anew in every pass, on the device, so that a step can be recorded.
    They are computed all the same. Does nothing at probability 0.
    """

    def skipped(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not module.training:
            return output
        x: Tensor = inputs[0]
        left_out = torch.rand(len(x), 1, 1, 1, device=x.device) < probability
        return torch.where(left_out, x, output)

    if probability:
        for block in removable(denoiser).values():
            block.register_forward_hook(skipped)


@contextmanager
def without(block: nn.Module) -> Iterator[None]:
    """Leave out one removable block, for this context."""
    handle = block.register_forward_hook(lambda _, inputs, output: inputs[0])
    try:
        yield
    finally:
        handle.remove()
