"""Evaluate a bundle's images against their prompts: PaellaBench, read by two judges.

    python -m model.training.evaluate                          # the embedded weights, all of it
    python -m model.training.evaluate --bundle runs/tiny --quick    # 300 prompts, one seed
    python -m model.training.evaluate --bundle tiny@steps=4,guidance=1      # another recipe
    python -m model.training.evaluate --presets all            # every preset of the bundle
    python -m model.training.evaluate --contact-sheet docs/contact_sheet.webp
    python -m model.training.evaluate --operations             # inpainting, outpainting, …
    python -m model.training.evaluate --curves docs/plots      # guidance, steps, KID
    python -m model.training.evaluate --judges                 # the judges themselves

Fixed prompts, fixed seeds. The last line is one JSON object. Needs the art (`make art`) for the
second judge and the true renders.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from load_tests.report import Report
from model.config import BundleConfig, Recipe, find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, prepare
from model.sampling import guidances
from model.training import command
from model.training.arguments import COUNT, NOT_NEGATIVE, POSITIVE
from model.training.art import atlas
from model.training.bench_report import Bench, bench_json, bench_table, paella_bench, print_progress
from model.training.benchmark import Drawn
from model.training.checker import Judge
from model.training.contact_sheet import contact_sheet
from model.training.detector import NATIVE, WEIGHTS, Detector
from model.training.judge_accuracy import judge_judges, judges_table
from model.training.network_figures import networks
from model.training.options import add_device_arguments
from model.training.recipe_text import RecipeError
from model.training.recipes import loaded
from model.training.repertoire import OPERATIONS, Stage
from model.training.studio import Studio
from model.training.templates import Templates


def judge_operations(
    pipeline: Pipeline,
    judge: Detector,
    sprites: Tensor,
    cases: int,
    names: Sequence[str] = tuple(OPERATIONS),
) -> tuple[dict[str, dict[str, float]], Table]:
    """Return the operations' figures, and a table of them."""
    stage = Stage(Studio(pipeline), judge, sprites)
    table = Table("operation", "figure", "share", title=f"{cases} cases each")
    result = {}
    for name in names:
        result[name] = OPERATIONS[name](stage, cases)
        for figure, share in result[name].items():
            table.add_row(name, figure.replace("_", " "), f"{share:.1%}")
        print_progress(f"operation {name}: {result[name]}")
    return result, table


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--bundle", default="tiny", help="name or path; @CHANGES of its recipe may follow"
    )
    p.add_argument(
        "--presets",
        metavar="NAMES",
        help="presets of the bundle, separated by commas, or all: each in turn, for PaellaBench and"
        " --operations",
    )
    p.add_argument(
        "--set",
        choices=("tune", "reward", "report"),
        default="report",
        help="which prompts (default %(default)s)",
    )
    p.add_argument("--quick", action="store_true", help="25 prompts of a category, one seed")
    p.add_argument(
        "--minutes",
        type=POSITIVE,
        default=15,
        help="after this time no further seeds are drawn (default %(default)s)",
    )
    p.add_argument("--contact-sheet", type=Path, help="write 48 untuned prompts' images instead")
    p.add_argument("--operations", action="store_true", help="judge the image operations instead")
    p.add_argument(
        "--only", choices=OPERATIONS, action="append", help="with --operations: only this one"
    )
    p.add_argument(
        "--cases", type=COUNT, default=100, help="cases of every operation (default %(default)s)"
    )
    p.add_argument("--curves", type=Path, metavar="FOLDER", help="plot the curves there instead")
    p.add_argument("--judges", action="store_true", help="validate the judges instead")
    p.add_argument("--judge", type=Path, default=WEIGHTS, help="the first judge's weights, a file")
    p.add_argument("--steps", type=COUNT, help="steps of an image (default: the recipe's)")
    p.add_argument("--guidance", type=NOT_NEGATIVE, help="guidance (default: the recipe's)")
    add_device_arguments(p)
    return p


def unfit(pipeline: Pipeline) -> str | None:
    """Return why PaellaBench cannot judge a bundle, None if it can."""
    width, height = pipeline.config.native_size
    if min(width, height) >= NATIVE:
        return None
    name = pipeline.config.name
    return f"not evaluated: {name} draws {width} by {height} pixels, PaellaBench needs {NATIVE}"


@dataclass(frozen=True)
class Cost:
    """The cost of an image. guidance: at the first and the last step. branches: of all steps."""

    steps: int
    guidance: tuple[float, float]
    branches: int


def cost(recipe: Recipe) -> Cost:
    """Return the steps and branches of one image."""
    sampling = recipe.sampling()
    own = guidances(sampling)[recipe.averaged_start :]
    guided = sum(guidance != 1 for guidance in own)
    return Cost(sampling.steps, sampling.guidance, sampling.steps + guided)


def presets_of(bundle: str, presets: str | None) -> list[str]:
    """Return the names of recipes, `BUNDLE@PRESET`, of presets separated by commas, or of all.

    Raises RecipeError for changes of the recipe beside presets.
    """
    if presets is None:
        return [bundle]
    if "@" in bundle:
        raise RecipeError(f"{bundle!r}: a recipe's changes and --presets exclude each other")
    names = presets.split(",")
    if presets == "all":
        names = list(BundleConfig.read(find_bundle(bundle)).preset_names)
    return [f"{bundle}@{name}" for name in names]


def fastest(measured: Mapping[str, Mapping[str, Any]], within: float = 0.02) -> str:
    """Return the preset with the fewest branches whose mean is within two points of the best."""
    means = {name: found["paella_bench"]["detector"] for name, found in measured.items()}
    near = [name for name in means if means[name] >= max(means.values()) - within]
    return min(near, key=lambda name: measured[name]["branches"])


def with_changes(name: str, steps: int | None, guidance: float | None) -> str:
    """Return the name to load of a recipe with other steps and guidance; None is the recipe's."""
    path, _, changes = name.partition("@")
    for field, value in (("steps", steps), ("guidance", guidance)):
        if value is not None:
            changes += f"{',' if changes else ''}{field}={value}"
    return f"{path}@{changes}" if changes else name


def second_judge(device: torch.device) -> Judge:
    """Return the judge that is never used for tuning or reward."""
    return Templates(atlas(128).to(device))


def bench_of(pipeline: Pipeline, sprites: Tensor, first: Detector, second: Judge) -> Bench:
    """Return the bench of a pipeline by its own recipe."""
    drawn = Drawn(pipeline, pipeline.config.recipe.sampling())
    return Bench(pipeline, drawn, sprites, first, second)


def _arguments() -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args()
    if args.presets and (args.contact_sheet or args.curves or args.judges):
        parser.error("--presets is for PaellaBench and --operations; or --bundle BUNDLE@PRESET")
    return args


def _pipelines(args: argparse.Namespace, device: torch.device) -> dict[str, Pipeline]:
    """Return the pipelines of all recipes to judge, by their names.

    Raises the errors of `loaded` and `presets_of`.
    """
    dtype = pick_dtype(args.dtype, device)
    return {
        name: loaded(with_changes(name, args.steps, args.guidance), device, dtype)
        for name in presets_of(args.bundle, args.presets)
    }


def main() -> None:
    """Evaluate as the command line says, and print a table and one line of JSON."""
    args = _arguments()
    prepare(args.threads)
    device = pick_device(args.device)
    report = Report(
        "evaluate", command=" ".join(["python -m model.training.evaluate", *sys.argv[1:]])
    )
    began = time.monotonic()
    pipelines = _pipelines(args, device)
    pipeline = next(iter(pipelines.values()))
    if reason := unfit(pipeline):
        raise SystemExit(reason)
    first = Detector.load(args.judge, device)
    sprites = atlas().to(device)
    result: dict[str, Any] = {"bundle": pipeline.config.name, "sha256": pipeline.config.sha256}
    if args.contact_sheet:
        contact_sheet(pipeline, args.contact_sheet)
    elif args.operations:
        measured = {}
        for name, each in pipelines.items():
            measured[name], table = judge_operations(
                each, first, sprites, args.cases, args.only or tuple(OPERATIONS)
            )
            table.title = f"{name}, {table.title}"
            report.add(table)
        shares = measured[args.bundle] if args.presets is None else measured
        result |= {"cases": args.cases, "operations": shares}
    elif args.curves:
        from model.training import curves  # which needs matplotlib

        result |= curves.measure(pipeline, first, sprites, args.curves)
    elif args.judges:
        result |= judge_judges(bench_of(pipeline, sprites, first, second_judge(device)))
        report.add(judges_table(result))
    else:
        measured, second = {}, second_judge(device)
        for name, each in pipelines.items():
            found = paella_bench(
                bench_of(each, sprites, first, second),
                args.set,
                args.minutes / len(pipelines),
                args.quick,
            )
            own = cost(each.config.recipe)
            measured[name] = bench_json(found) | asdict(own)
            report.add(bench_table(found, f"{name}, {args.set} prompts, {own.steps} steps"))
        result |= {"networks": networks(pipeline, sprites)}
        if args.presets is None:
            result |= measured[args.bundle]
        else:
            result |= {"presets": measured, "fastest_near_the_best": fastest(measured)}
    result["seconds"] = round(time.monotonic() - began, 1)
    report.emit(result)


if __name__ == "__main__":
    command.run(main)
