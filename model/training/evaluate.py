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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from load_tests.report import Report
from model.config import BundleConfig, SamplingConfig, find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, prepare
from model.sampling import guidances
from model.training import benchmark, command, scene_samplers, scenes
from model.training.arguments import COUNT, NOT_NEGATIVE, POSITIVE
from model.training.art import atlas
from model.training.benchmark import Drawn, Figure, Rendered, Sheet, Source
from model.training.checker import Judge, check
from model.training.contact_sheet import contact_sheet
from model.training.detector import NATIVE, WEIGHTS, Detector
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.network_figures import HELD_OUT_SEED, networks
from model.training.options import add_device_arguments
from model.training.prompts import BenchPrompt
from model.training.recipe_text import RecipeError
from model.training.recipes import loaded
from model.training.repertoire import OPERATIONS, Stage
from model.training.scenes import SQUARE, Scene
from model.training.studio import Studio
from model.training.templates import Templates

JUDGES = ("detector", "templates")
_QUICK = 25  # prompts of a category
_ORACLE = 60  # prompts of a category whose true renders the second judge reads
_RESERVE = 0.2  # of the time: for renders, judges and kinds drawn again
_CONFUSIONS = 20


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
        _tell(f"{label}: {len(cases)} prompts, {len(seeds)} seeds, {seconds:.0f} s")
        return sheet


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ── PaellaBench ───────────────────────────────────────────────────────────────────────────────────


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
    _tell("oracle: true renders through the VQGAN")
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


# ── the judges themselves ─────────────────────────────────────────────────────────────────────────


def _lone_scenes(copies: int) -> list[BenchPrompt]:
    """Return scenes of every kind alone, shapes in turn in all colours."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    cases = []
    for _ in range(copies):
        for name in NAMES_OF_KINDS:
            scene = _alone(name, rng)
            while scene.aspect != SQUARE:
                scene = _alone(name, rng)
            cases.append(BenchPrompt(name, scene))
    return cases


def _alone(name: str, rng: np.random.Generator) -> Scene:
    if name not in SHAPES:
        return scene_samplers.lone(rng, scenes.object_named(name), 0.3)
    colour = scenes.pick(rng, scene_samplers.shape_colours(name))
    return scene_samplers.lone(rng, scenes.Thing(name, colour), 0.3)


def judge_judges(bench: Bench, copies: int = 2) -> dict[str, Any]:
    """Return what the judges read in single objects that are known, and what they confuse."""
    cases = _lone_scenes(copies)
    sources = {"renders": Rendered(bench.sprites), "reconstructions": None}
    sources["reconstructions"] = Rendered(bench.sprites, bench.pipeline)
    result: dict[str, Any] = {"n": len(cases)}
    for name, source in sources.items():
        assert source is not None
        sheet = benchmark.judged(source, cases, [0], bench.first, bench.second)
        _tell(f"judges: {name} read")
        for judge in JUDGES:
            found = [row[0] for row in sheet.readings[judge]]
            seen = [check(reading, case.scene) for reading, case in zip(found, cases, strict=True)]
            shares = {
                key: round(float(np.mean([getattr(verdict, key) for verdict in seen])), 4)
                for key in ("kinds", "colours", "background", "count", "positions", "all")
            }
            wrong = Counter(
                f"{case.scene.things[0].kind} → {_named(reading.things)}"
                for case, reading, verdict in zip(cases, found, seen, strict=True)
                if not verdict.kinds
            )
            confused = dict(wrong.most_common(_CONFUSIONS))
            result[f"{judge}, {name}"] = shares | {"confusions": confused}
    return result


def _named(things: Sequence[Any]) -> str:
    return things[0].kind if things else "nothing"


def judges_table(result: Mapping[str, Any]) -> Table:
    """Return the judges' shares, and the most frequent confusions below."""
    keys = ("kinds", "colours", "background", "count", "positions", "all")
    table = Table("judge, images", *keys, title=f"{result['n']} single things")
    for name, shares in result.items():
        if name != "n":
            table.add_row(name, *(f"{shares[key]:.1%}" for key in keys))
    return table


# ── operations ────────────────────────────────────────────────────────────────────────────────────


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
        _tell(f"operation {name}: {result[name]}")
    return result, table


# ── command line ──────────────────────────────────────────────────────────────────────────────────


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


def cost(sampling: SamplingConfig) -> Cost:
    """Return the steps and branches of one image."""
    guided = sum(guidance != 1 for guidance in guidances(sampling))
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
            sampling = each.config.recipe.sampling()
            measured[name] = bench_json(found) | asdict(cost(sampling))
            report.add(bench_table(found, f"{name}, {args.set} prompts, {sampling.steps} steps"))
        result |= {"networks": networks(pipeline, sprites)}
        if args.presets is None:
            result |= measured[args.bundle]
        else:
            result |= {"presets": measured, "fastest_near_the_best": fastest(measured)}
    result["seconds"] = round(time.monotonic() - began, 1)
    report.emit(result)


if __name__ == "__main__":
    command.run(main)
