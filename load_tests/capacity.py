"""Compute the number of replicas that a load needs, from the time of a step by its rows.

    python -m load_tests.capacity --arrivals 40 --steps 12 --p95 0.5
    python -m load_tests.capacity --measure > load_tests/results/capacity.json

docs/scale.md describes the model. Times are seconds, rates images per second. The last line of
output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from load_tests.report import Report

COSTS = Path(__file__).parent / "results" / "capacity-2026-11-21.json"
ROWS = (1, 2, 4, 8, 16)
# By simulation: how far the p95 lies above an image's time alone, in units of that time ×
# √utilisation / (1 − utilisation), or less.
STRETCH = 2.4
# Of saturation, as much as is planned for.
NEARLY = 0.9


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of one replica.

    A step of b rows, at most `rows`, takes base_s + b × row_s. around_s: the worker's time around
    an image's steps.
    """

    base_s: float
    row_s: float
    around_s: float
    rows: int

    @classmethod
    def fitted(cls, step_s: Mapping[int, float], around_s: float) -> Costs:
        """Return the costs that fit measured steps.

        step_s: seconds of a step by its rows, for at least two numbers of rows; the largest is
        `rows`.
        """
        row_s, base_s = np.polyfit(list(step_s), list(step_s.values()), 1)
        return cls(max(0.0, float(base_s)), float(row_s), around_s, max(step_s))

    def step(self, rows: float) -> float:
        return self.base_s + rows * self.row_s

    def alone(self, steps: int) -> float:
        """Return the seconds of one image on an idle replica."""
        return self.around_s + steps * self.step(1)

    def saturated(self, steps: int) -> float:
        """Return the images per second of a replica that always steps all its rows."""
        return 1 / (self.around_s + steps * self.step(self.rows) / self.rows)

    def utilisation(self, rate: float, steps: int) -> float:
        """Return the share of time of the images' own work, without the steps' base."""
        return rate * (self.around_s + steps * self.row_s)

    def mean(self, rate: float, steps: int) -> float:
        """Return the mean seconds of an image.

        Images in flight stretch each other's time, as in any shared processor.
        """
        return self.alone(steps) / (1 - self.utilisation(rate, steps))

    def p95(self, rate: float, steps: int) -> float:
        """Return the 95th percentile of seconds at random arrivals; infinite beyond saturation.

        rate: arrivals per second.
        """
        if rate >= self.saturated(steps):
            return math.inf
        busy = self.utilisation(rate, steps)
        return self.alone(steps) * (1 + STRETCH * math.sqrt(busy) / (1 - busy))

    def rate(self, steps: int, p95: float) -> float:
        """Return the most images per second that keep to the p95.

        Raises ValueError if an idle replica does not keep to it.
        """
        beyond = p95 / self.alone(steps) - 1
        if beyond <= 0:
            raise ValueError(
                f"an image of {steps} steps takes {self.alone(steps):.3f} s on an idle "
                f"replica, which is not below {p95:g} s"
            )
        # beyond = STRETCH × √u / (1 − u), solved for √u.
        root = (math.sqrt(STRETCH**2 + 4 * beyond**2) - STRETCH) / (2 * beyond)
        return min(root**2 / self.utilisation(1, steps), NEARLY * self.saturated(steps))


def replicas(costs: Costs, arrivals: float, steps: int, p95: float, spare: int = 0) -> int:
    """Return the number of replicas for `arrivals` images per second, shared evenly by the router.

    spare: the number of replicas that may be lost. Raises the errors of `Costs.rate`.
    """
    return max(1, math.ceil(arrivals / costs.rate(steps, p95))) + spare


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute or measure, and print.

    Raises SystemExit for bad arguments, and for a p95 that no number of replicas reaches.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("capacity", command=shlex.join(["python", "-m", "load_tests.capacity", *sent]))
    if options.measure:
        report.emit(_measured(options.repeats), json_only=True)
        return
    costs = read_costs(options.costs)
    try:
        count = replicas(costs, options.arrivals, options.steps, options.p95, options.spare)
    except ValueError as error:
        sys.exit(str(error))
    answer = _answer(costs, options, count)
    report.add(_table(answer))
    report.emit({"costs": asdict(costs), **answer})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.capacity", description="How many replicas a load needs."
    )
    parser.add_argument(
        "--arrivals", type=float, default=10.0, help="images per second in all, 10 by default"
    )
    parser.add_argument(
        "--steps", type=int, default=12, help="denoising steps of each, 12 by default"
    )
    parser.add_argument(
        "--p95",
        type=float,
        default=0.5,
        help="seconds in which 95 %% are to be through, 0.5 by default",
    )
    parser.add_argument(
        "--spare",
        type=int,
        default=0,
        help="replicas that may be lost without it being exceeded, 0 by default",
    )
    parser.add_argument("--costs", type=Path, default=COSTS, help="what --measure printed")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure what a step costs on this machine, with the settings' weights",
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="rounds of measuring, 20 by default"
    )
    return parser.parse_args(arguments)


def read_costs(path: Path) -> Costs:
    """Return the costs in a file that --measure printed. Raises OSError or KeyError."""
    measured = json.loads(path.read_text().splitlines()[-1])
    step_s = {int(rows): milliseconds / 1000 for rows, milliseconds in measured["step_ms"].items()}
    return Costs.fitted(step_s, measured["around_ms"] / 1000)


def _answer(costs: Costs, options: argparse.Namespace, count: int) -> dict[str, Any]:
    each = options.arrivals / max(1, count - options.spare)
    return {
        "arrivals_per_s": options.arrivals,
        "steps": options.steps,
        "p95_target_s": options.p95,
        "replicas": count,
        "spare": options.spare,
        "alone_s": round(costs.alone(options.steps), 4),
        "saturated_per_s": round(costs.saturated(options.steps), 2),
        "utilisation": round(costs.utilisation(each, options.steps), 3),
        "p95_s": round(costs.p95(each, options.steps), 4),
    }


def _table(answer: Mapping[str, Any]) -> Table:
    table = Table("figure", "value", title="Replicas")
    for name, value in answer.items():
        table.add_row(name, f"{value:g}")
    return table


def _measured(repeats: int) -> dict[str, Any]:
    """Measure steps of 1 to 16 images and the work around them, on a CPU with one thread.

    The images have the native size of the first weights in the settings.
    """
    import torch

    from load_tests.stages import Workload, measure
    from model.config import find_bundle
    from model.pipeline import Pipeline, PipelineV3
    from model.runtime import pick_device, pick_dtype, prepare
    from server.settings import Settings

    settings = Settings()
    device = pick_device(settings.device)
    prepare(1 if device.type == "cpu" else settings.threads)
    pipeline = Pipeline.load(
        find_bundle(settings.bundles[0]), device, pick_dtype(settings.dtype, device)
    )
    if not isinstance(pipeline, PipelineV3):
        raise ValueError("only weights of the v3 family are measured")
    workload = Workload(pipeline)
    stages = {
        name: workload.engine_stages([12])[name]
        for name in ("encode", "prior", "condition", "decode")
    }
    steps = {str(rows): workload.step_of(rows) for rows in ROWS}
    # On a CPU what one thread computes, whoever else is there; a replica is to have its cores for
    # itself.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = measure(stages | steps, pipeline.device, warm_up=2, repeats=repeats, clock=clock)
    # Of the quarter of the rounds that was disturbed least, the middle one.
    figures = {
        name: round(1000 * float(np.quantile(taken, 0.125)), 3) for name, taken in seconds.items()
    }
    return {
        "weights": pipeline.config.name,
        "sha256": pipeline.config.sha256,
        "size": list(pipeline.config.native_size),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "step_ms": {rows: figures[rows] for rows in steps},
        "around_ms": round(sum(figures[name] for name in stages), 3),
    }


if __name__ == "__main__":
    main()
