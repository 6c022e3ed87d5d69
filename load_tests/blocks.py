"""Measure every block of the denoiser on this CPU, as the server computes it.

    python -m load_tests.blocks
    python -m load_tests.blocks tiny --branches 2 --passes 300 --threads 1

One row's step, with packed weights, of one branch (unguided) or more. Figures are medians over
passes, and tenth percentiles, which other programs disturb less; shares are of the latter. A clock
before and after each block costs time too: the JSON says how long a pass takes with and without
it. T blocks are no calls of their own; their time is that between their neighbours, and the last
one's is in the output's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from load_tests.report import Report
from model.config import find_bundle
from model.executor import SamplingInputs
from model.networks.blocks_v3 import AttentionBlock, ConvBlock, TimeBlock
from model.networks.denoiser_v3 import Condition, Denoiser
from model.pipeline import Pipeline
from model.runtime import pick_dtype, prepare

_WARM_UP = 10  # passes
_PROMPT = "a red apple on a white background"
_KINDS = {ConvBlock: "C", TimeBlock: "T", AttentionBlock: "A"}


@dataclass(frozen=True)
class Part:
    """A part of a step. kind: C, T or A of a block, or what else it is. weights: their number.

    median, low: milliseconds; the latter is the tenth percentile.
    """

    name: str
    kind: str
    weights: int
    median: float
    low: float

    @classmethod
    def of(
        cls, name: str, kind: str, modules: Sequence[nn.Module], seconds: Sequence[float]
    ) -> Part:
        """Return a part's figures, from the seconds of every pass."""
        weights = sum(p.numel() for module in modules for p in module.parameters())
        return cls(name, kind, weights, *figures(seconds))


@dataclass(frozen=True)
class Block:
    """A block in the order of computation, by its published name."""

    name: str
    module: nn.Module

    @property
    def kind(self) -> str:
        """Return C, T or A, or "scale" for a change of resolution."""
        return _KINDS.get(type(self.module), "scale")


def blocks_of(denoiser: Denoiser) -> list[Block]:
    """Return all blocks in the order in which they are computed."""
    sides = (("down_blocks", denoiser.down_blocks), ("up_blocks", denoiser.up_blocks))
    return [
        Block(f"{side}.{level}.{name}", module)
        for side, levels in sides
        for level, blocks in enumerate(levels)
        for name, module in blocks.named_children()
        if not isinstance(module, nn.Identity)  # the place of a pruned one
    ]


@contextmanager
def clocked(blocks: Sequence[Block], times: list[float]) -> Iterator[None]:
    """Append the seconds before and after each block but T to `times`, for this context."""
    handles = []
    for block in blocks:
        if block.kind != "T":
            handles += [
                block.module.register_forward_pre_hook(lambda *_: times.append(_now())),
                block.module.register_forward_hook(lambda *_: times.append(_now())),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_now = time.perf_counter


def durations(blocks: Sequence[Block], times: Sequence[float]) -> list[float]:
    """Return the seconds of input, every block and output.

    times: of the pass' start, before and after each block but T, and of its end. The time between
    two blocks is the T block's that lies there, or else the second one's.
    """
    calls = iter(zip(times[1:-1:2], times[2:-1:2], strict=True))
    own, boundary, before = [0.0] * len(blocks), times[0], 0.0
    place: int | None = None  # of the gap's time; None before the first block
    for i, block in enumerate(blocks):
        if block.kind == "T":
            place = i
            continue
        start, stop = next(calls)
        if boundary == times[0]:
            before = start - boundary
        else:
            own[i if place is None else place] += start - boundary
        own[i] += stop - start
        boundary, place = stop, None
    return [before, *own, times[-1] - boundary]


def denoiser_of(pipeline: Pipeline) -> Denoiser:
    """Return the pipeline's denoiser. Raises ValueError for another family's."""
    denoiser = pipeline.bundle.denoiser
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"{pipeline.config.name} holds no v3 denoiser")
    return denoiser


@dataclass(frozen=True)
class Step:
    """One row's step. condition: of its branches. row_of: zeros [N], None for one branch."""

    pipeline: Pipeline
    tokens: Tensor
    times: Tensor
    condition: Condition
    row_of: Tensor | None

    @classmethod
    @torch.inference_mode()
    def of(cls, pipeline: Pipeline, branches: int) -> Step:
        """Return a step of a row with so many branches, at the bundle's native size."""
        recipe = pipeline.config.recipe
        noise = pipeline.noise(0, *pipeline.config.native_size, recipe.num_inference_steps)
        (prompt,) = pipeline.encode([_PROMPT])
        (image,) = pipeline.prior_embeddings([prompt], [noise])
        condition = pipeline.condition(prompt, image)
        assert isinstance(condition, Condition)
        denoiser = denoiser_of(pipeline)
        row_of = None if branches == 1 else torch.zeros(branches, dtype=torch.long)
        several = condition if branches == 1 else Condition.stack([condition] * branches)
        return cls(
            pipeline, noise.start[None], denoiser.times(torch.tensor([0.5])), several, row_of
        )

    def features(self) -> Tensor:
        """Compute the network."""
        denoiser = denoiser_of(self.pipeline)
        return denoiser.features(self.tokens, self.times, self.condition, self.row_of)

    def draw(self, features: Tensor) -> Tensor:
        """Project a row's features to the codebook and draw tokens."""
        uniform, ones = torch.full(self.tokens.shape, 0.5), torch.ones(1)
        inputs = SamplingInputs(uniform, ones, ones)
        return self.pipeline.executor.sample("multinomial", features[:1], inputs)


@torch.inference_mode()
def measure(step: Step, passes: int) -> tuple[list[Part], dict[str, float]]:
    """Return every part's time, and milliseconds of whole passes with and without the clock."""
    denoiser = denoiser_of(step.pipeline)
    blocks = blocks_of(denoiser)
    rows = []
    times: list[float] = []
    with clocked(blocks, times):
        for _ in range(_WARM_UP + passes):
            times.clear()
            times.append(_now())
            step.features()
            times.append(_now())
            rows.append(durations(blocks, times))
    first, *own, last = zip(*rows[_WARM_UP:], strict=True)
    features = step.features()
    drawing = _seconds(lambda: step.draw(features), passes)
    parts = [
        Part.of("in_mapper, embedding", "input", [denoiser.in_mapper, denoiser.embedding], first),
        *(
            Part.of(block.name, block.kind, [block.module], seconds)
            for block, seconds in zip(blocks, own, strict=True)
        ),
        Part.of("clf", "output", [denoiser.clf], last),
        Part.of("out_mapper, drawing", "draw", [denoiser.out_mapper], drawing),
    ]
    clock, clock_low = figures([sum(row) for row in rows[_WARM_UP:]])
    plain, plain_low = figures(_seconds(step.features, passes))
    return parts, {
        "pass_ms": plain,
        "pass_low_ms": plain_low,
        "pass_with_clock_ms": clock,
        "pass_with_clock_low_ms": clock_low,
    }


def figures(seconds: Sequence[float]) -> tuple[float, float]:
    """Return median and tenth percentile in milliseconds."""
    median, low = np.quantile(seconds, (0.5, 0.1)) * 1000
    return round(float(median), 4), round(float(low), 4)


def _seconds(compute: Callable[[], object], passes: int) -> list[float]:
    seconds = []
    for _ in range(_WARM_UP + passes):
        began = _now()
        compute()
        seconds.append(_now() - began)
    return seconds[_WARM_UP:]


def table(parts: Sequence[Part], branches: int) -> Table:
    """Return the parts as a table, with each one's share of them all."""
    total = sum(part.low for part in parts)
    headers = "block", "kind", "thousand weights", "ms", "tenth percentile", "%"
    result = Table(*headers, title=f"branches: {branches}")
    for part in parts:
        share = f"{100 * part.low / total:.1f}"
        weights = f"{part.weights / 1000:.0f}"
        result.add_row(
            part.name, part.kind, weights, f"{part.median:.3f}", f"{part.low:.3f}", share
        )
    return result


def by_kind(parts: Sequence[Part]) -> dict[str, float]:
    """Return the milliseconds of all blocks of each kind, of tenth percentiles."""
    kinds = dict.fromkeys(part.kind for part in parts)
    return {kind: round(sum(p.low for p in parts if p.kind == kind), 3) for kind in kinds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. Raises the errors of loading the bundle."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.blocks",
        description="Milliseconds of every block of the denoiser; the last line is JSON.",
    )
    parser.add_argument("bundle", nargs="?", default="tiny", help="name or path (default tiny)")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 2], help="1 2 by default")
    parser.add_argument("--passes", type=int, default=200, help="200 by default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(sent)
    command = shlex.join(["python", "-m", "load_tests.blocks", *sent])
    report = Report("blocks", command=command)
    prepare(options.threads)
    device = torch.device("cpu")
    dtype = pick_dtype(options.dtype, device)
    pipeline = Pipeline.load(find_bundle(options.bundle), device, dtype)
    try:
        denoiser_of(pipeline)
    except ValueError as error:
        parser.error(str(error))
    results: dict[str, Any] = {}
    for branches in options.branches:
        parts, whole = measure(Step.of(pipeline, branches), options.passes)
        report.add(table(parts, branches))
        results[str(branches)] = {
            "blocks": [asdict(part) for part in parts],
            "kinds": by_kind(parts),
            **whole,
        }
    report.emit(
        {
            "weights": pipeline.config.name,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "passes": options.passes,
            "branches": results,
        }
    )


if __name__ == "__main__":
    main()
