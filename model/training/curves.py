"""Measure curves of quality, as Imagen's article draws them: `evaluate --curves docs/plots`.

256 fixed prompts of the tune set, drawn at many strengths of guidance and numbers of steps. Quality
is the share of images that fulfil their category's criterion; the distance of feature statistics is
KID on the first judge's features, against true renders of the same scenes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import SamplingConfig
from model.pipeline import Pipeline
from model.training import benchmark
from model.training.benchmark import CRITERIA, Drawn, Featured, Rendered
from model.training.prompts import BenchPrompt
from model.training.scenes import SQUARE

GUIDANCES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16)
COUNT = 256
_TIMED = 5  # single images whose median is a recipe's time


@dataclass(frozen=True)
class Point:
    """One recipe's quality. milliseconds: of a single image, from prompt to pixels."""

    guidance: float
    steps: int
    score: float
    low: float
    high: float
    kid: float
    milliseconds: float


def fixed_prompts(count: int = COUNT, set_name: str = "tune") -> dict[str, list[BenchPrompt]]:
    """Return square prompts of a set, about as many of every category."""
    found = {
        name: [case for case in cases if case.scene.aspect == SQUARE]
        for name, cases in benchmark.categories(set_name).items()
        if name != benchmark.CONTROL
    }
    found = {name: cases for name, cases in found.items() if cases}
    chosen: dict[str, list[BenchPrompt]] = {name: [] for name in found}
    turn = 0
    while sum(map(len, chosen.values())) < min(count, sum(map(len, found.values()))):
        for name, cases in found.items():
            stride = max(1, len(cases) * len(found) // count)
            at = turn * stride % len(cases) + turn * stride // len(cases)
            if at < len(cases) and sum(map(len, chosen.values())) < count:
                chosen[name].append(cases[at])
        turn += 1
    return {name: cases for name, cases in chosen.items() if cases}


def measure(
    pipeline: Pipeline, judge: Featured, sprites: Tensor, folder: Path, count: int = COUNT
) -> dict[str, Any]:
    """Measure all points, write the plots to a folder and return the points as plain values."""
    cases = fixed_prompts(count)
    truth = torch.cat([true_features(sprites, some, judge) for some in cases.values()])
    recipe = pipeline.config.recipe
    by_guidance = [
        point(pipeline, recipe.sampling(guidance=(g, g)), judge, cases, truth) for g in GUIDANCES
    ]
    by_steps = [point(pipeline, recipe.sampling(steps=n), judge, cases, truth) for n in STEPS]
    unguided = [
        point(pipeline, recipe.sampling(steps=n, guidance=(1.0, 1.0)), judge, cases, truth)
        for n in STEPS
    ]
    plot(by_guidance, by_steps, unguided, folder)
    return {
        "prompts": sum(map(len, cases.values())),
        "guidance": [asdict(p) for p in by_guidance],
        "steps": [asdict(p) for p in by_steps],
        "unguided": [asdict(p) for p in unguided],
    }


def true_features(sprites: Tensor, cases: Sequence[BenchPrompt], judge: Featured) -> Tensor:
    """Return features [N, P] of true renders of the prompts' scenes."""
    return benchmark.judged(Rendered(sprites), cases, [0], judge).features


def point(
    pipeline: Pipeline,
    sampling: SamplingConfig,
    judge: Featured,
    cases: dict[str, list[BenchPrompt]],
    truth: Tensor,
) -> Point:
    """Draw the prompts by one recipe and judge them."""
    source = Drawn(pipeline, sampling)
    sheets = {name: benchmark.judged(source, some, [0], judge) for name, some in cases.items()}
    hits = [benchmark.hits(sheet, "detector", CRITERIA[name]) for name, sheet in sheets.items()]
    flat = np.concatenate(hits).mean(1)
    low, high = benchmark.bootstrap(flat)
    drawn = torch.cat([sheet.features for sheet in sheets.values()])
    result = Point(
        guidance=sampling.guidance[0],
        steps=sampling.steps,
        score=round(float(flat.mean()), 4),
        low=round(low, 4),
        high=round(high, 4),
        kid=round(benchmark.kid(drawn, truth)[0], 3),
        milliseconds=round(milliseconds(source, next(iter(cases.values()))), 1),
    )
    print(result, file=sys.stderr, flush=True)
    return result


def milliseconds(source: Drawn, cases: Sequence[BenchPrompt]) -> float:
    """Return the median time of single images, after one that warms up."""
    times = []
    for i in range(_TIMED + 1):
        began = time.perf_counter()
        source.images([cases[i % len(cases)]], [i])
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times[1:]))


def plot(
    by_guidance: Sequence[Point],
    by_steps: Sequence[Point],
    unguided: Sequence[Point],
    folder: Path,
) -> None:
    """Write guidance.svg, alignment_kid.svg and steps.svg.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": "paellera", "font.size": 9, "svg.fonttype": "none"}):
        _draw(folder / "guidance.svg", "guidance", [_Line([(p.guidance, p) for p in by_guidance])])
        guided = f"guidance {by_steps[0].guidance:g}"
        _draw(
            folder / "steps.svg",
            "milliseconds of one image",
            [
                _Line([(p.milliseconds, p) for p in points], [p.steps for p in points], name)
                for name, points in ((guided, by_steps), ("no guidance", unguided))
            ],
        )
        _draw(
            folder / "alignment_kid.svg",
            "1,000 KID against true renders, lower is better",
            [_Line([(p.kid, p) for p in by_guidance], [p.guidance for p in by_guidance])],
        )


@dataclass(frozen=True)
class _Line:
    """Points over some number of each. marks: beside the points. name: for the legend."""

    points: Sequence[tuple[float, Point]]
    marks: Sequence[float] = ()
    name: str | None = None


def _draw(path: Path, label: str, lines: Sequence[_Line]) -> None:
    """Draw scores with their intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 3.0), layout="constrained")
    for line in lines:
        x = [at for at, _ in line.points]
        score = [100 * p.score for _, p in line.points]
        below = [100 * (p.score - p.low) for _, p in line.points]
        above = [100 * (p.high - p.score) for _, p in line.points]
        style = {"marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1}
        axes.errorbar(x, score, yerr=[below, above], label=line.name, **style)
        for at, y, mark in zip(x, score, line.marks, strict=False):
            axes.annotate(f"{mark:g}", (at, y), xytext=(4, 4), textcoords="offset points")
    if any(line.name for line in lines):
        axes.legend(loc="lower right")
    axes.set_xlabel(label)
    axes.set_ylabel("prompts fulfilled, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
