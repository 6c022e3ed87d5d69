"""Compare recipes, of one bundle or of several, on the same prompts and seeds.

    python -m model.training.recipes tiny tiny@steps=8 tiny@steps=8,renoise_order=halton
    python -m model.training.recipes tiny runs/student@steps=4 runs/student@steps=1 --count 1000

An argument is a bundle's name or path, and after an `@` a preset of it, changes of the recipe, or
both: `tiny@fast,steps=2`. The table has the share of images that fulfil their prompts, with a 95 %
interval, its difference to the first argument's with the interval of that difference over the same
prompts, KID and the time of one image. A second table has each category's share. The last line is
one JSON object. The prompts are those that recipes are searched on, never those of the report,
unless --set says so. Needs the art (`make art`) for KID's true renders.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from load_tests.report import Report
from model.bundle import load_bundle, of_preset
from model.config import QUALITY, SamplingConfig, find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, prepare
from model.training import benchmark, command, curves
from model.training.arguments import COUNT
from model.training.art import atlas
from model.training.benchmark import Bools, Drawn, Featured
from model.training.detector import WEIGHTS, Detector
from model.training.options import add_device_arguments
from model.training.prompts import BenchPrompt
from model.training.recipe_text import RecipeError, changed

Prompts = dict[str, list[BenchPrompt]]


@dataclass(frozen=True)
class Measured:
    """One recipe's figures: shares of images with 95 % intervals, KID, and a single image's time.

    difference, difference_low, difference_high: to the first recipe, paired by prompt. categories:
    the share of each.
    """

    recipe: str
    sampling: SamplingConfig
    images: int
    score: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    categories: dict[str, float]
    kid: float
    milliseconds: float


def loaded(name: str, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """Return the pipeline of `BUNDLE`, `BUNDLE@PRESET`, `BUNDLE@CHANGES`, or of both after the `@`.

    The preset, by default `quality`, is the only one that it has.

    Raises the errors of `Pipeline.load`, and RecipeError for an unknown preset and for changes that
    are none.
    """
    path, _, changes = name.partition("@")
    first, _, rest = changes.partition(",")
    preset, changes = (first, rest) if first and "=" not in first else (QUALITY, changes)
    loaded_bundle = load_bundle(find_bundle(path), device, dtype)
    try:
        bundle = of_preset(loaded_bundle, preset)
    except ValueError as error:
        raise RecipeError(f"{name!r}: {error}, and is no change NAME=VALUE") from None
    recipe = changed(bundle.config.recipe, changes)
    return Pipeline.of(replace(bundle, config=replace(bundle.config, recipe=recipe)))


def hits(
    pipeline: Pipeline, judge: Featured, cases: Prompts, seeds: Sequence[int]
) -> tuple[dict[str, Bools], Tensor]:
    """Draw and judge prompts by a pipeline's recipe.

    Returns which images of each category are right, [prompts, seeds], and features [prompts, P] of
    the first seed's, of all categories.
    """
    source = Drawn(pipeline, pipeline.config.recipe.sampling())
    sheets = {name: benchmark.judged(source, some, seeds, judge) for name, some in cases.items()}
    right = {
        name: benchmark.hits(sheet, "detector", benchmark.CRITERIA[name])
        for name, sheet in sheets.items()
    }
    return right, torch.cat([sheet.features for sheet in sheets.values()])


def compared(
    name: str, pipeline: Pipeline, right: Mapping[str, Bools], first: Mapping[str, Bools]
) -> Measured:
    """Return a recipe's figures beside the first recipe's hits; KID and time are still zero.

    right, first: which images of each category are right, [prompts, seeds].
    """
    own = np.concatenate(list(right.values()))
    low, high = benchmark.bootstrap(own.mean(1))
    change = own.mean(1) - np.concatenate(list(first.values())).mean(1)
    change_low, change_high = benchmark.bootstrap(change)
    return Measured(
        name,
        pipeline.config.recipe.sampling(),
        own.size,
        score=round(float(own.mean()), 4),
        low=round(low, 4),
        high=round(high, 4),
        difference=round(float(change.mean()), 4),
        difference_low=round(change_low, 4),
        difference_high=round(change_high, 4),
        categories={each: round(float(some.mean()), 4) for each, some in right.items()},
        kid=0.0,
        milliseconds=0.0,
    )


def table(rows: Sequence[Measured]) -> Table:
    """Return the figures as a table."""
    result = Table("recipe", "right, %", "95 %", "to the first", "95 %", "1,000 KID", "ms")
    for row in rows:
        result.add_row(
            row.recipe,
            f"{100 * row.score:.1f}",
            f"{100 * row.low:.1f} … {100 * row.high:.1f}",
            f"{100 * row.difference:+.1f}",
            f"{100 * row.difference_low:+.1f} … {100 * row.difference_high:+.1f}",
            f"{row.kid:.2f}",
            f"{row.milliseconds:.0f}",
        )
    return result


def category_table(rows: Sequence[Measured]) -> Table:
    """Return a table of each category's share of right images, a column for each recipe."""
    result = Table("category, right in %", *(row.recipe for row in rows))
    for name in rows[0].categories:
        result.add_row(
            name.replace("_", " "), *(f"{100 * row.categories[name]:.0f}" for row in rows)
        )
    return result


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "recipes", nargs="+", metavar="BUNDLE[@PRESET,CHANGES]", help="what to compare, see above"
    )
    p.add_argument(
        "--set",
        choices=("tune", "reward", "report"),
        default="tune",
        help="which prompts (default %(default)s)",
    )
    p.add_argument(
        "--count",
        type=COUNT,
        default=curves.COUNT,
        help="prompts of all categories together (default %(default)s)",
    )
    p.add_argument(
        "--seeds", type=COUNT, default=1, help="images of each prompt (default %(default)s)"
    )
    p.add_argument("--judge", type=Path, default=WEIGHTS, help="the judge's weights, a file")
    add_device_arguments(p)
    return p


def main() -> None:
    """Compare as the command line says, and print a table and one line of JSON."""
    args = parser().parse_args()
    prepare(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    arguments = " ".join(["python -m model.training.recipes", *sys.argv[1:]])
    report = Report("recipes", command=arguments)
    began = time.monotonic()
    pipelines = [loaded(name, device, dtype) for name in args.recipes]
    judge, sprites = Detector.load(args.judge, device), atlas().to(device)
    cases = curves.fixed_prompts(args.count, args.set)
    truth = torch.cat([curves.true_features(sprites, some, judge) for some in cases.values()])
    rows: list[Measured] = []
    first: dict[str, Bools] | None = None
    for name, pipeline in zip(args.recipes, pipelines, strict=True):
        right, features = hits(pipeline, judge, cases, range(args.seeds))
        first = right if first is None else first
        source = Drawn(pipeline, pipeline.config.recipe.sampling())
        rows.append(
            replace(
                compared(name, pipeline, right, first),
                kid=round(benchmark.kid(features, truth)[0], 3),
                milliseconds=round(curves.milliseconds(source, next(iter(cases.values()))), 1),
            )
        )
        print(rows[-1], file=sys.stderr, flush=True)
    report.add(table(rows))
    report.add(category_table(rows))
    report.emit(
        {
            "set": args.set,
            "prompts": sum(map(len, cases.values())),
            "seeds": args.seeds,
            "recipes": [asdict(row) for row in rows],
            "seconds": round(time.monotonic() - began, 1),
        }
    )


if __name__ == "__main__":
    command.run(main)
