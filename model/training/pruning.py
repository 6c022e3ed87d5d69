"""A denoiser without some of its blocks; `model.training.prune` finds out which."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace

from model.network_config import DenoiserConfig
from model.networks.denoiser_v3 import Denoiser


def add_argument(p: argparse.ArgumentParser) -> None:
    """Add `--prune` to a trainer's arguments."""
    p.add_argument(
        "--prune",
        type=names,
        default=(),
        metavar="BLOCK[,BLOCK…]",
        help="blocks that the student does without, as `python -m model.training.prune` names them",
    )


def names(text: str) -> tuple[str, ...]:
    """Return the blocks of a list with commas."""
    return tuple(name for name in text.split(",") if name)


def pruned_config(config: DenoiserConfig, blocks: Iterable[str]) -> DenoiserConfig:
    """Return the configuration without these blocks and those it lacks already.

    Raises ValueError for a name that is not one of `config.prunable_blocks`.
    """
    gone = {*config.pruned_blocks, *blocks}
    order = {name: place for place, name in enumerate(config.prunable_blocks)}
    every = sorted(gone, key=lambda name: (order.get(name, len(order)), name))
    return replace(config, pruned_blocks=tuple(every))


def pruned(network: Denoiser, blocks: Iterable[str]) -> Denoiser:
    """Return a copy of a denoiser without these blocks. Raises the errors of `pruned_config`."""
    weight = network.in_mapper.get_parameter("0.weight")
    smaller = Denoiser(pruned_config(network.config, blocks)).to(weight.device, weight.dtype)
    kept = smaller.state_dict().keys()
    smaller.load_state_dict({k: v for k, v in network.state_dict().items() if k in kept})
    return smaller.train(network.training)
