"""Measure what a denoiser loses without each of its blocks.

    python -m model.training.block_losses tiny --corpus runs/corpus.safetensors
    python -m load_tests.blocks tiny                     # what each of them costs

The figure is the training objective on scenes of a corpus, over the same images, times and noise
for every block: with all blocks, and with one left out at a time. A network trained with
--skip-blocks loses less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import nn

from load_tests.report import Report
from model.bundle import BundleV3, load_v3
from model.config import find_bundle
from model.networks.denoiser_v3 import Denoiser
from model.runtime import pick_device, prepare
from model.training import command
from model.training.arguments import COUNT
from model.training.block_skips import removable, without
from model.training.codes import quiet
from model.training.data import Scenes
from model.training.denoiser import EARLY, Encoding, token_loss
from model.training.distill import starting_network
from model.training.features import Pool
from model.training.objective import draw_times
from model.training.options import add_device_arguments

Floats = npt.NDArray[np.float64]
_BYTES = 24  # read of each caption


@dataclass(frozen=True)
class Lost:
    """A block, and how much larger the loss is without it, with the standard error over batches."""

    block: str
    weights: int
    more: float
    error: float


@torch.no_grad()
def losses(network: Denoiser, pool: Pool, batches: int, batch: int, seed: int = 0) -> Floats:
    """Return the objective of batches [n] from a pool; the seed determines them."""
    torch.manual_seed(seed)
    values = []
    for _ in range(batches):
        x = pool.draw(batch, _BYTES)
        t = draw_times(batch, x.tokens.device, EARLY)
        values.append(float(token_loss(network, x, t)[0]))
    return np.array(values)


def measure(network: Denoiser, pool: Pool, batches: int, batch: int) -> tuple[float, list[Lost]]:
    """Return the whole network's mean loss, and what is lost without each block."""
    whole = losses(network, pool, batches, batch)
    result = []
    for name, block in removable(network).items():
        with without(block):
            more = losses(network, pool, batches, batch) - whole
        error = float(more.std(ddof=1)) / batches**0.5 if batches > 1 else 0.0
        mean = round(float(more.mean()), 5)
        result.append(Lost(name, _weights(block), mean, round(error, 5)))
    return round(float(whole.mean()), 5), result


def _weights(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


@dataclass(frozen=True)
class Measuring:
    """A denoiser, the scenes that its losses are measured on, and how many of them."""

    bundle: BundleV3
    network: Denoiser
    pool: Pool
    batches: int
    batch: int

    @staticmethod
    def parser(description: str | None) -> argparse.ArgumentParser:
        """Return a parser of the arguments that `of` reads."""
        p = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        p.add_argument("bundle", help="name or path")
        p.add_argument(
            "--checkpoint", type=Path, help="a denoiser's checkpoint, instead of the bundle's own"
        )
        p.add_argument("--corpus", type=Path, help="what `python -m model.training.corpus` wrote")
        p.add_argument(
            "--batches", type=COUNT, default=16, help="batches to measure on (default %(default)s)"
        )
        p.add_argument(
            "--batch", type=COUNT, default=32, help="images of a batch (default %(default)s)"
        )
        add_device_arguments(p, dtype=None)
        return p

    @classmethod
    def of(cls, args: argparse.Namespace) -> Measuring:
        """Load what the parsed command line names, and encode the scenes."""
        device = pick_device(args.device)
        bundle = load_v3(find_bundle(args.bundle), device, torch.float32)
        network = starting_network(bundle, args.checkpoint, device).eval()
        quiet(network)
        scenes = Scenes.load(args.corpus, device, 0)
        images = args.batches * args.batch
        config, vqgan = bundle.config, bundle.vqgan
        encoding = Encoding.of(config, vqgan, scenes, args.batch, images, torch.float32)
        encoding.begin(args.batches)
        return cls(bundle, network, encoding.pools[0], args.batches, args.batch)

    @property
    def images(self) -> int:
        """The number of images that a loss is the mean of."""
        return self.batches * self.batch

    def loss(self, network: Denoiser) -> float:
        """Return a network's mean loss."""
        return round(float(losses(network, self.pool, self.batches, self.batch).mean()), 5)

    def losses(self, network: Denoiser) -> tuple[float, list[Lost]]:
        """Return the whole network's mean loss, and what is lost without each block."""
        return measure(network, self.pool, self.batches, self.batch)


def main() -> None:
    """Measure as the command line says, and print a table and one line of JSON."""
    args = Measuring.parser(__doc__).parse_args()
    command = shlex.join(["python", "-m", "model.training.block_losses", *sys.argv[1:]])
    report = Report("block_losses", command=command)
    prepare(args.threads)
    measuring = Measuring.of(args)
    whole, rows = measuring.losses(measuring.network)
    table = Table("block", "thousand weights", "more loss without it", "standard error")
    for row in rows:
        table.add_row(row.block, f"{row.weights / 1000:.0f}", f"{row.more:.4f}", f"{row.error:.4f}")
    report.add(table)
    report.emit(
        {
            "weights": measuring.bundle.config.name,
            "images": measuring.images,
            "loss": whole,
            "blocks": [asdict(row) for row in rows],
        }
    )


if __name__ == "__main__":
    command.run(main)
