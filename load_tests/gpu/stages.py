"""Measure every stage and whole requests in one process, each beside its least time.

By families, sizes, rows and step counts.
"""

from __future__ import annotations

import gc

import torch

from load_tests.gpu.batch import Batch, Cost, costs
from load_tests.gpu.options import Options
from load_tests.gpu.results import Results, Row
from load_tests.gpu.timing import Ceilings, measure
from model.bundle import Bundle
from model.pipeline import Pipeline


def run(options: Options, results: Results) -> None:
    ceilings = options.ceilings()
    results.add(
        {
            "ceiling_tflops_per_s": round(ceilings.flops / 1e12, 3),
            "ceiling_gb_per_s": round(ceilings.bytes / 1e9, 3),
        }
    )
    for family in options.families:
        # Counted on plain ones: nobody counts what Triton's kernels do.
        plain = options.bundle(family, kernels="torch")
        least = {side: costs(plain, (side, side), options.steps) for side in options.sides}
        del plain
        bundle = options.bundle(family)
        for side in options.sides:
            for rows in options.rows:
                where = {"family": family, "side": side, "rows": rows}
                try:
                    _measure(
                        bundle, side, rows, _Judge(where, least[side], ceilings, results), options
                    )
                except torch.OutOfMemoryError as error:
                    results.add(
                        {**where, "stage": "does not fit", "why": str(error).splitlines()[0]}
                    )
                release(options.device)


class _Judge:
    """Show measurements beside the least possible values."""

    def __init__(
        self, where: Row, least: dict[str, Cost], ceilings: Ceilings, results: Results
    ) -> None:
        self.where, self.least = where, least
        self.ceilings, self.results = ceilings, results

    def add(self, executor: str, stage: str, figures: Row) -> None:
        rows, cost = self.where["rows"], self.least[stage]
        floor = cost.floor_ms(self.ceilings, rows)
        share = floor / max(figures["p50_ms"], 1e-9)
        judged = {
            "tflop": float(f"{cost.flops * rows / 1e12:.4g}"),
            "floor_ms": float(f"{floor:.4g}"),
            "of_floor": float(f"{share:.3g}"),
        }
        self.results.add({**self.where, "executor": executor, "stage": stage, **figures, **judged})


def _measure(bundle: Bundle, side: int, rows: int, judge: _Judge, options: Options) -> None:
    """Measure with graphs, and for one image eagerly too."""
    batch = Batch(Pipeline.of(bundle), rows, (side, side))
    if rows == 1:
        _measure_stages(batch, "eager", judge, options)
    batch.record()
    _measure_stages(batch, "graphs", judge, options)
    judge.results.add({**judge.where, "stage": "memory", **memory(options.device)})


def _measure_stages(batch: Batch, executor: str, judge: _Judge, options: Options) -> None:
    for name, stage in batch.stages(options.steps).items():
        judge.add(executor, name, measure(stage, options.device, options.budget))


def memory(device: torch.device) -> dict[str, float]:
    """Return the largest memory allocated since the last call, in GiB."""
    if device.type != "cuda":
        return {"peak_gib": 0.0}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_gib": round(peak, 2)}


def release(device: torch.device) -> None:
    """Free memory that is not used any more, that of graphs included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
