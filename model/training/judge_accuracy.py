"""Measure the judges themselves, on single things that are known: `evaluate --judges`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from model.training import benchmark, scene_samplers, scenes
from model.training.bench_report import JUDGES, Bench, print_progress
from model.training.benchmark import Rendered
from model.training.checker import check
from model.training.kinds import NAMES_OF_KINDS, SHAPES
from model.training.network_figures import HELD_OUT_SEED
from model.training.prompts import BenchPrompt
from model.training.scenes import SQUARE, Scene

_CONFUSIONS = 20
_VERDICTS = ("kinds", "colours", "background", "count", "positions", "all")


def judge_judges(bench: Bench, copies: int = 2) -> dict[str, Any]:
    """Return what the judges read in single objects that are known, and what they confuse."""
    cases = _lone_scenes(copies)
    sources = {
        "renders": Rendered(bench.sprites),
        "reconstructions": Rendered(bench.sprites, bench.pipeline),
    }
    result: dict[str, Any] = {"n": len(cases)}
    for name, source in sources.items():
        sheet = benchmark.judged(source, cases, [0], bench.first, bench.second)
        print_progress(f"judges: {name} read")
        for judge in JUDGES:
            found = [row[0] for row in sheet.readings[judge]]
            seen = [check(reading, case.scene) for reading, case in zip(found, cases, strict=True)]
            shares = {
                key: round(float(np.mean([getattr(verdict, key) for verdict in seen])), 4)
                for key in _VERDICTS
            }
            wrong = Counter(
                f"{case.scene.things[0].kind} → {_named(reading.things)}"
                for case, reading, verdict in zip(cases, found, seen, strict=True)
                if not verdict.kinds
            )
            confused = dict(wrong.most_common(_CONFUSIONS))
            result[f"{judge}, {name}"] = shares | {"confusions": confused}
    return result


def judges_table(result: Mapping[str, Any]) -> Table:
    """Return a table of the judges' shares."""
    table = Table("judge, images", *_VERDICTS, title=f"{result['n']} single things")
    for name, shares in result.items():
        if name != "n":
            table.add_row(name, *(f"{shares[key]:.1%}" for key in _VERDICTS))
    return table


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


def _named(things: Sequence[Any]) -> str:
    return things[0].kind if things else "nothing"
