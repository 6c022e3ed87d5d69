"""Choose the blocks that a denoiser can best do without: those that cost most for what they add.

    python -m model.training.prune tiny --corpus runs/corpus.safetensors --blocks 3
    python -m model.training.distill tiny --guidance --prune down_blocks.1.3,down_blocks.1.9

Blocks go one at a time. In every round the loss is measured without each block that is left, over
the same images, times and noise, and the block goes whose absence adds least to the loss for each
millisecond that it takes. Milliseconds are those of a step with packed weights on this CPU
(`load_tests.blocks`). What goes changes what the others are worth, so each round measures anew.

After SnapFusion's search for an efficient network. The network without these blocks is worse until
it has been trained: the second command distils the whole network into the smaller one. The last
line is JSON, with every round's figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from load_tests import blocks
from load_tests.report import Report
from model.config import find_bundle
from model.network_config import DenoiserConfig
from model.pipeline import Pipeline
from model.runtime import prepare
from model.training import command
from model.training.arguments import COUNT, number_in
from model.training.block_losses import Lost, Measuring
from model.training.pruning import pruned, pruned_config

_PASSES = 200


@dataclass(frozen=True)
class Round:
    """A block that goes. more: of the loss, to the whole network's. milliseconds: that it took.

    others: what the loss would have grown by without another block instead, from the loss before.
    """

    block: str
    more: float
    milliseconds: float
    others: dict[str, float]


def search(
    losses_without: Callable[[tuple[str, ...]], list[Lost]],
    milliseconds: Mapping[str, float],
    blocks: int,
    most: float,
) -> list[Round]:
    """Return the rounds of a search, one for each block that goes.

    Args:
        losses_without: for blocks that are gone, what is lost without each one more.
        milliseconds: of each block.
        blocks: the most that go.
        most: of the loss that may be added in all.
    """
    rounds: list[Round] = []
    added = 0.0
    for _ in range(blocks):
        gone = tuple(own.block for own in rounds)
        lost = {row.block: row.more for row in losses_without(gone)}
        if not lost:
            break
        # A block whose absence helps is first, the one that takes longest before the others.
        best = min(lost, key=lambda name: max(lost[name], 1e-4) / milliseconds[name])
        added += lost[best]
        if added > most:
            break
        others = {name: more for name, more in lost.items() if name != best}
        rounds.append(Round(best, round(added, 5), milliseconds[best], others))
    return rounds


def may_go(config: DenoiserConfig, block: str) -> bool:
    """Return whether a network can do without this block too: one attention block must stay."""
    try:
        pruned_config(config, [block])
    except ValueError:
        return False
    return True


def block_milliseconds(pipeline: Pipeline, branches: int, passes: int) -> dict[str, float]:
    """Return every block's tenth percentile in one row's step, by name."""
    parts, _ = blocks.measure(blocks.Step.of(pipeline, branches), passes)
    return {part.name: part.low for part in parts}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = Measuring.parser(__doc__)
    p.add_argument("--blocks", type=COUNT, default=3, help="at most so many blocks go (default 3)")
    p.add_argument(
        "--most",
        type=number_in("a number", lambda value: value == value),
        default=float("inf"),
        help="what may be added to the loss in all; without it, --blocks alone decides",
    )
    p.add_argument(
        "--branches", type=COUNT, default=2, help="branches of the step to time (default 2)"
    )
    p.add_argument(
        "--passes",
        type=COUNT,
        default=_PASSES,
        help="how often the step is timed (default %(default)s)",
    )
    return p


def table(rounds: Iterable[Round]) -> Table:
    """Return the rounds as a table."""
    result = Table("round", "block", "ms", "more loss in all", "next best, more loss")
    for number, own in enumerate(rounds, 1):
        cells = (str(number), own.block, f"{own.milliseconds:.3f}", f"{own.more:.4f}")
        least = min(own.others, key=lambda name: own.others[name], default="")
        result.add_row(*cells, f"{least} {own.others[least]:.4f}" if least else "")
    return result


def main() -> None:
    """Search as the command line says, and print a table and one line of JSON."""
    args = parser().parse_args()
    command = shlex.join(["python", "-m", "model.training.prune", *sys.argv[1:]])
    report = Report("prune", command=command)
    prepare(args.threads)
    pipeline = Pipeline.load(find_bundle(args.bundle), torch.device("cpu"))
    milliseconds = block_milliseconds(pipeline, args.branches, args.passes)
    measuring = Measuring.of(args)

    def losses_without(gone: tuple[str, ...]) -> list[Lost]:
        smaller = pruned(measuring.network, gone)
        rows = measuring.losses(smaller)[1]
        return [row for row in rows if may_go(smaller.config, row.block)]

    rounds = search(losses_without, milliseconds, args.blocks, args.most)
    report.add(table(rounds))
    chosen = [own.block for own in rounds]
    print("--prune", ",".join(chosen))
    report.emit(
        {
            "weights": pipeline.config.name,
            "branches": args.branches,
            "images": measuring.images,
            "loss": measuring.loss(measuring.network),
            "pruned": chosen,
            "rounds": [asdict(own) for own in rounds],
        }
    )


if __name__ == "__main__":
    command.run(main)
