"""Run PaellaBench on a pipeline: draw and judge all categories, and report the figures.

    result = paella_bench(bench, "report", minutes=15, quick=False)
    bench_table(result, "title"), bench_json(result)

`benchmark.py` has the categories and how images are scored.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from model.pipeline import Pipeline
from model.training import benchmark
from model.training.benchmark import Figure, Rendered, Sheet, Source
from model.training.checker import Judge
from model.training.detector import Detector
from model.training.prompts import BenchPrompt

JUDGES = ("detector", "templates")
_QUICK = 25  # prompts of a category
_ORACLE = 60  # prompts of a category whose true renders the second judge reads
_RESERVE = 0.2  # of the time: for renders, judges and kinds drawn again


@dataclass(frozen=True)
class Bench:
    """The parts of an evaluation: a bundle, its recipe's images, sprites and the two judges."""

    pipeline: Pipeline
    source: Source
    sprites: Tensor
    first: Detector
    second: Judge

    def read(self, cases: Sequence[BenchPrompt], seeds: Sequence[int], label: str) -> Sheet:
        """Draw and judge a category's images, with a line about it on standard error."""
        began = time.monotonic()
        sheet = benchmark.judged(self.source, cases, seeds, self.first, self.second)
        seconds = time.monotonic() - began
        print_progress(f"{label}: {len(cases)} prompts, {len(seeds)} seeds, {seconds:.0f} s")
        return sheet


def print_progress(line: str) -> None:
    """Print a line on standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def seeds_within(seconds: float, images_per_second: float, prompts: int) -> int:
    """Return for how many seeds of each prompt there is time, 1 … 4."""
    affordable = seconds * images_per_second / max(prompts, 1)
    return max(1, min(benchmark.SEEDS, int(affordable)))


def draw_bench(bench: Bench, set_name: str, minutes: float, quick: bool) -> dict[str, Sheet]:
    """Draw and judge all categories.

    On a slow machine others than single_object get fewer seeds, so that the time suffices.
    """
    cases = benchmark.categories(set_name, _QUICK if quick else None)
    began = time.monotonic()
    seeds = 1 if quick else benchmark.SEEDS
    single = bench.read(cases["single_object"], range(seeds), "single_object")
    sheets = {"single_object": single}
    spent = time.monotonic() - began
    if not quick:
        others = sum(len(some) for name, some in cases.items() if name not in sheets)
        rate = len(cases["single_object"]) * seeds / spent
        seeds = seeds_within(minutes * 60 * (1 - _RESERVE) - spent, rate, others)
    for name, some in cases.items():
        if name not in sheets:
            sheets[name] = bench.read(some, range(seeds), name)
    return sheets


def draw_again(bench: Bench, single: Sheet) -> dict[str, float]:
    """Return the share of right images of every weak kind, among 16 with fresh seeds."""
    weak = benchmark.weak_kinds(single)
    if not weak:
        return {}
    source = benchmark.judged(bench.source, weak, benchmark.FRESH, bench.first)
    shares = benchmark.hits(source, "detector", benchmark.CRITERIA["single_object"]).mean(1)
    names = [case.scene.things[0].kind for case in weak]
    return dict(sorted(zip(names, shares.tolist(), strict=True), key=lambda pair: pair[1]))


def oracle(bench: Bench, cases: Mapping[str, Sequence[BenchPrompt]]) -> dict[str, Sheet]:
    """Return the judges' readings of the true renders after a way through the VQGAN."""
    source = Rendered(bench.sprites, bench.pipeline)
    sheets = {}
    for name, some in cases.items():
        chosen = some[:: max(1, len(some) // _ORACLE)]
        sheets[name] = benchmark.judged(source, chosen, [0], bench.first, bench.second)
    print_progress("oracle: true renders through the VQGAN")
    return sheets


def true_features(bench: Bench, sheets: Mapping[str, Sheet]) -> Tensor:
    """Return the first judge's features of true renders of all prompts' scenes."""
    source = Rendered(bench.sprites)
    made = [benchmark.judged(source, sheet.cases, [0], bench.first) for sheet in sheets.values()]
    return torch.cat([sheet.features for sheet in made])


def paella_bench(bench: Bench, set_name: str, minutes: float, quick: bool) -> dict[str, Any]:
    """Return all figures of PaellaBench."""
    sheets = draw_bench(bench, set_name, minutes, quick)
    again = {} if quick else draw_again(bench, sheets["single_object"])
    truth = oracle(bench, {name: sheet.cases for name, sheet in sheets.items()})
    drawn = torch.cat([sheet.features for sheet in sheets.values()])
    distance, spread = benchmark.kid(drawn, true_features(bench, sheets))
    rows: dict[str, dict[str, Figure]] = {}
    for judge in JUDGES:
        rows[judge] = benchmark.figures(sheets, judge)
        rows[f"oracle, {judge}"] = benchmark.figures(truth, judge)
    rows["shuffled prompts"] = benchmark.figures(sheets, "detector", shift=1)
    return {
        "rows": rows,
        "more": benchmark.more_figures(sheets, "detector"),
        "drawn_again": again,
        "kid": (distance, spread),
        "agreement": agreement(sheets),
    }


def agreement(sheets: Mapping[str, Sheet]) -> float:
    """Return for which share of images both judges give the category's verdict alike."""
    same = []
    for name, sheet in sheets.items():
        one, other = (benchmark.hits(sheet, j, benchmark.CRITERIA[name]) for j in JUDGES)
        same.append((one[:, : other.shape[1]] == other).ravel())
    return float(np.concatenate(same).mean())


def bench_table(result: Mapping[str, Any], title: str) -> Table:
    """Return the table of categories: scores with intervals, best of the seeds, and other rows."""
    rows: dict[str, dict[str, Figure]] = result["rows"]
    table = Table("category", "n, seeds", "detector", "95 %", "best of", title=title)
    for heading in ("templates", "oracle", "oracle, t.", "shuffled"):
        table.add_column(heading, justify="right")
    keys = ("templates", "oracle, detector", "oracle, templates", "shuffled prompts")
    for name, figure in rows["detector"].items():
        others = [f"{rows[key][name].mean:.1%}" if name in rows[key] else "" for key in keys]
        table.add_row(name.replace("_", " "), *_cells(figure), *others)
    means = [f"{benchmark.mean(rows[key]):.1%}" for key in keys]
    first = rows["detector"]
    scores = (f"{benchmark.mean(first):.1%}", "", f"{benchmark.best_mean(first):.1%}")
    table.add_section()
    table.add_row("PaellaBench mean", "", *scores, *means)
    table.add_section()
    for name, figure in result["more"].items():
        table.add_row(name, *_cells(figure))
    return table


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    interval = f"{figure.low:.1%} … {figure.high:.1%}"
    return f"{figure.n}, {figure.seeds}", f"{figure.mean:.1%}", interval, f"{figure.best:.1%}"


def bench_json(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as plain values."""
    rows: dict[str, dict[str, Figure]] = result["rows"]
    distance, spread = result["kid"]
    again: dict[str, float] = result["drawn_again"]
    return {
        "paella_bench": {judge: round(benchmark.mean(rows[judge]), 4) for judge in JUDGES},
        "best_of_mean": round(benchmark.best_mean(rows["detector"]), 4),
        "rows": {key: {n: f.as_dict() for n, f in row.items()} for key, row in rows.items()},
        "more": {name: figure.as_dict() for name, figure in result["more"].items()},
        "weak_kinds_drawn_again": {name: round(share, 4) for name, share in again.items()},
        "kinds_below_half": [name for name, share in again.items() if share < 0.5],
        "kid_times_1000": {"mean": round(distance, 3), "std": round(spread, 3)},
        "judges_agree": round(result["agreement"], 4),
    }
