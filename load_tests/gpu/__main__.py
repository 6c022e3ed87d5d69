"""Check and measure everything on a CUDA device, on random weights of the published sizes.

    python -m load_tests.gpu --budget-minutes 6 --out results  # by importance, in time
    python -m load_tests.gpu --out results  # everything: about forty minutes
    python -m load_tests.gpu --part checks --out results  # one part, within ten minutes
    python -m load_tests.gpu --part stages --families v3 --rows 1,8
    python -m load_tests.gpu --smoke  # the program itself, on micro sizes, anywhere
    python -m load_tests.gpu --smoke --budget-minutes 4 --out runs  # the same for the run by budget

No file is needed. checks: half precision beside fp32, graphs beside eager steps. kernels: Triton's
beside their plain twins. stages: every stage and whole requests. transcription: the published
sampler beside ours. profile: kernels and idle shares. served: the real server over HTTP. Results
are written to `--out` row by row. The last line of output is JSON. Exits with 1 if a check fails,
with 2 without CUDA.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from load_tests.batching import numbers
from load_tests.gpu import checks, kernels, profile, served, stages, transcription
from load_tests.gpu.budget import PLAN, SMOKE_PLAN, BudgetRun, choose, run_tasks
from load_tests.gpu.options import Options
from load_tests.gpu.results import Results
from load_tests.gpu.timing import Budget
from load_tests.gpu.weights import Family
from load_tests.report import Report
from model.config import Kernels
from model.runtime import prepare

PARTS: dict[str, Callable[[Options, Results], None]] = {
    "checks": checks.run,
    "kernels": kernels.run,
    "stages": stages.run,
    "transcription": transcription.run,
    "profile": profile.run,
    "served": served.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that the command line names, and return the exit status."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parse(sent)
    if not torch.cuda.is_available() and not parsed.smoke:
        print("there is no CUDA device here: nothing was measured", file=sys.stderr)
        return 2
    report = Report("gpu", command=shlex.join(["python", "-m", "load_tests.gpu", *sent]))
    if parsed.budget_minutes is not None or parsed.child is not None:
        return _run_plan(parsed, report)
    prepare()
    options, found = _options(parsed), dict[str, Any]()
    for part in parsed.part:
        results = Results(part, parsed.out)
        PARTS[part](options, results)
        report.add(results.table())
        found[part] = results.rows
    report.emit(
        {
            "device": _device_name(options.device),
            "dtype": str(options.dtype).removeprefix("torch."),
            **found,
        }
    )
    return int(not all(row.get("good", True) for rows in found.values() for row in rows))


def _run_plan(parsed: argparse.Namespace, report: Report) -> int:
    """Run the plan within a budget, as its parent or as the child that runs the tasks."""
    tasks = choose(SMOKE_PLAN if parsed.smoke else PLAN, parsed.tasks)
    if parsed.child is not None:
        return run_tasks(tasks, parsed.child, parsed.out, main, _device_works)
    return BudgetRun(tasks, parsed.budget_minutes, parsed.out, report).run()


def _device_works() -> bool:
    """Return whether CUDA still answers; after an illegal access it does not in this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m load_tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument(
        "--families", nargs="+", choices=get_args(Family), default=list(get_args(Family))
    )
    p.add_argument("--rows", type=numbers, help="pictures at once, 1,2,4,8,16,32 by default")
    p.add_argument("--sides", type=numbers, help="of the pictures in pixels, 256,512 by default")
    p.add_argument("--steps", type=numbers, help="step counts, 8,12 by default")
    p.add_argument("--dtype", choices=["float16", "bfloat16"], help="float16 by default")
    p.add_argument(
        "--kernels", choices=get_args(Kernels), default="auto", help="what computes the steps"
    )
    p.add_argument(
        "--runs",
        type=int,
        help=(
            "of every measurement, 50 by default; fewer where they would take more than four "
            "seconds"
        ),
    )
    p.add_argument("--out", type=Path, help="a directory for PART.json and profiles")
    p.add_argument(
        "--budget-minutes",
        type=float,
        help="run the plan of budget.py and end within so many minutes; needs --out",
    )
    p.add_argument(
        "--tasks", nargs="+", default=[], help="with --budget-minutes: only these tasks of the plan"
    )
    p.add_argument(
        "--child", type=float, help=argparse.SUPPRESS
    )  # seconds left, given by the parent of a budget run
    p.add_argument(
        "--quick",
        action="store_true",
        help=(
            "shorter loads in `served`, no bfloat16 in `checks`, no compiled models in "
            "`transcription`"
        ),
    )
    p.add_argument(
        "--room",
        type=Path,
        help="a directory for a bundle of 10 GB; default: the system's temporary one",
    )
    p.add_argument(
        "--smoke",
        action="store_true",
        help="micro sizes, on the CPU where there is no CUDA: tries the program, measures nothing",
    )
    parsed = p.parse_args(arguments)
    if (parsed.budget_minutes is not None or parsed.child is not None) and parsed.out is None:
        p.error("--budget-minutes needs --out")
    return parsed


def _options(parsed: argparse.Namespace) -> Options:
    smoke = parsed.smoke
    return Options(
        kernels=parsed.kernels,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=getattr(torch, parsed.dtype or ("float32" if smoke else "float16")),
        families=tuple(parsed.families),
        rows=parsed.rows or ((1, 2) if smoke else (1, 2, 4, 8, 16, 32)),
        sides=parsed.sides or ((32,) if smoke else (256, 512)),
        steps=parsed.steps or ((2,) if smoke else (8, 12)),
        budget=Budget(runs=parsed.runs or 1, seconds=0.1, least=1)
        if smoke
        else Budget(runs=parsed.runs or 50),
        micro=smoke,
        quick=parsed.quick,
        out=parsed.out,
        room=parsed.room,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, nothing to go by"


if __name__ == "__main__":
    sys.exit(main())
