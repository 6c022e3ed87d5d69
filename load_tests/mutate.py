"""Plant small faults in the code, one at a time, and count how many of them the tests catch.

    python -m load_tests.mutate
    python -m load_tests.mutate --kept outcomes.jsonl     # goes on after an interruption
    python -m load_tests.mutate --count 20 --seed 1 --modules server/engine/client.py model/rows.py

Each fault (a mutant) is planted in a temporary copy of the working tree, and the tests related to
its module run there: `tests/test_<module>.py` and those of `load_tests/related_tests.py`. A mutant
is caught if a test fails or the tests take longer than their timeout. Survivors that change no
behaviour are listed with a reason in `load_tests/equivalent_mutants.py`. Exits with 1 if the tests
fail without a fault; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Never

import pytest
from rich.table import Table

from load_tests.equivalent_mutants import EQUIVALENT
from load_tests.mutants import Mutant, find_mutants
from load_tests.related_tests import RELATED_TESTS
from load_tests.report import Report, wilson_interval

ROOT = Path(__file__).parents[1]
MODULES = (
    "server/engine",
    "server/api",
    "server/http_protocol.py",
    "model/sampling.py",
    "model/rows.py",
    "model/row_builder.py",
    "model/batch_encoder.py",
    "model/prompt_groups.py",
    "model/prompt_parts.py",
    "model/prompt_reading.py",
    "model/prompt_units.py",
    "model/vocabulary.py",
)
# Slow or machine-dependent tests prove nothing here that others do not.
MARKERS = "not slow and not browser and not ray and not observability and not gpu"
NICENESS = 10
POLL_S = 0.05
PACKAGES = ("load_tests", "model", "server", "tests")
PRELOADED = (
    "PIL.Image",
    "numpy",
    "prometheus_client",
    "pydantic",
    "safetensors.torch",
    "scipy.stats",
    "torch",
)
LEAST_TIMEOUT_S = 60.0
TIMEOUT_FACTOR = 5.0
BASELINE_TIMEOUT_S = 1200.0
FAILED, INTERRUPTED, USAGE_ERROR, NO_TESTS = 1, 2, 4, 5

Outcome = Literal["caught", "timeout", "survived", "equivalent"]


@dataclass(frozen=True)
class Result:
    """One mutant's outcome, and the seconds that its tests took."""

    mutant: Mutant
    outcome: Outcome
    seconds: float


class Copy:
    """A temporary copy of the working tree, in which one file at a time is mutated."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = (
            subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
            .stdout.decode()
            .split("\0")
        )
        for name in filter(None, names):
            source, target = ROOT / name, directory / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """Plant the mutant in the copy for this context."""
        path = self.directory / mutant.module
        original = path.read_text()
        path.write_text(mutant.source)
        try:
            yield
        finally:
            path.write_text(original)

    def run_tests(self, tests: Sequence[str], timeout_s: float) -> tuple[int | None, float]:
        """Run the test files until the first failure.

        Return pytest's exit code, None after a timeout, and seconds. The tests run in a fork of
        this process, which has imported what takes long to import.
        """
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._become_pytest(tests)
        code = None
        while code is None and time.monotonic() - began < timeout_s:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(POLL_S)
        # Workers that a failed test left behind are in the same group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if code is None:
            os.waitpid(pid, 0)
        return code, time.monotonic() - began

    def _become_pytest(self, tests: Sequence[str]) -> Never:
        """Run pytest in this forked process, on the copy's modules, and exit."""
        code = int(pytest.ExitCode.INTERNAL_ERROR)
        try:
            os.setsid()
            os.nice(NICENESS)
            os.chdir(self.directory)
            os.environ.update(PYTHONPATH=str(self.directory), PYTHONDONTWRITEBYTECODE="1")
            sys.dont_write_bytecode = True
            sys.path[:] = [
                str(self.directory),
                *(path for path in sys.path if Path(path or ".").resolve() != ROOT),
            ]
            for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
                del sys.modules[name]
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", MARKERS, *tests]))
        finally:
            os._exit(code)


def preload() -> None:
    """Import what takes long, so that every fork has it."""
    for name in PRELOADED:
        importlib.import_module(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Raise SystemExit with 1 if the tests fail without a mutant."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("mutate", command=shlex.join(["python", "-m", "load_tests.mutate", *sent]))
    mutants = sample(options.modules, options.count, options.seed)
    if options.list:
        print("\n".join(mutant.identity for mutant in mutants))
        return
    preload()
    with tempfile.TemporaryDirectory() as directory:
        results = list(_run_all(Copy(Path(directory)), mutants, Kept(options.kept)))
    report.add(_table(results))
    report.emit(summary(results))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.mutate", description="Mutation testing; the last line is JSON."
    )
    parser.add_argument(
        "--count",
        type=int,
        default=60,
        help="mutants drawn at random from all, 60 by default; 0: all",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw, 0 by default")
    parser.add_argument(
        "--modules",
        nargs="+",
        default=MODULES,
        help="files and folders, relative to the repository",
    )
    parser.add_argument(
        "--kept",
        type=Path,
        help="a file of JSON lines to add outcomes to; those caught in it are not run again",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the drawn mutants and run nothing"
    )
    return parser.parse_args(arguments)


def sample(modules: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Draw mutants without replacement, each with equal chance, and return them by module."""
    found = [
        mutant
        for path in _files(modules)
        for mutant in find_mutants(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    drawn = random.Random(seed).sample(found, min(count, len(found))) if count else found
    return sorted(drawn, key=lambda mutant: (mutant.module, mutant.line))


def _files(modules: Sequence[str]) -> list[Path]:
    paths = [ROOT / module for module in modules]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"no such module: {', '.join(missing)}")
    return sorted(
        {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    )


def related_tests(module: str, root: Path = ROOT) -> list[str]:
    """Return the test files of a module, the quickest first. Raises LookupError without any."""
    path = Path(module)
    names = [
        *RELATED_TESTS.get(module, ()),
        f"test_{path.stem}",
        f"test_{path.parent.name}_{path.stem}",
    ]
    for place in path.parents:
        names += RELATED_TESTS.get(place.as_posix(), ())
    tests = [
        f"tests/{name}.py"
        for name in dict.fromkeys(names)
        if (root / "tests" / f"{name}.py").exists()
    ]
    if not tests:
        raise LookupError(f"no tests of {module}")
    return tests


class Kept:
    """Outcomes of earlier runs in a file of JSON lines; without a path nothing is kept.

    Survivors are not among them, for tests may have been added.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        known = [json.loads(line) for line in lines]
        self._known = {each["mutant"]: each for each in known if each["outcome"] != "survived"}

    def get(self, mutant: Mutant) -> Result | None:
        """Return the outcome of an earlier run, or None."""
        found = self._known.get(mutant.identity)
        return found and Result(mutant, found["outcome"], found["seconds"])

    def add(self, result: Result) -> None:
        """Write an outcome at once, so that an interruption loses none."""
        if self._path is not None:
            line = {
                "mutant": result.mutant.identity,
                "outcome": result.outcome,
                "seconds": round(result.seconds, 1),
            }
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _run_all(copy: Copy, mutants: Sequence[Mutant], kept: Kept) -> Iterator[Result]:
    baselines: dict[str, float] = {}
    for number, mutant in enumerate(mutants, 1):
        if (earlier := kept.get(mutant)) is not None:
            yield earlier
            continue
        tests = related_tests(mutant.module, copy.directory)
        for test in tests:
            if test not in baselines and mutant.identity not in EQUIVALENT:
                baselines[test] = _baseline(copy, test)
        seconds = sum(baselines.get(test, 0.0) for test in tests)
        timeout_s = max(LEAST_TIMEOUT_S, TIMEOUT_FACTOR * seconds)
        result = run_mutant(copy, mutant, tests, timeout_s)
        progress = f"{number}/{len(mutants)} {result.outcome} {result.seconds:.0f} s"
        print(f"{progress} {mutant.identity}", file=sys.stderr, flush=True)
        kept.add(result)
        yield result


def _baseline(copy: Copy, test: str) -> float:
    """Return the seconds of a test file without a mutant. Raise SystemExit if it fails."""
    code, seconds = copy.run_tests([test], timeout_s=BASELINE_TIMEOUT_S)
    if code not in (0, NO_TESTS):
        sys.exit(f"{test} fails without a mutant")
    return seconds


def run_mutant(copy: Copy, mutant: Mutant, tests: Sequence[str], timeout_s: float) -> Result:
    """Plant one mutant and run its tests. Raises RuntimeError if pytest could not run them."""
    if mutant.identity in EQUIVALENT:
        return Result(mutant, "equivalent", 0.0)
    with copy.planted(mutant):
        code, seconds = copy.run_tests(tests, timeout_s)
    if code is None:
        return Result(mutant, "timeout", seconds)
    if code not in (0, FAILED, INTERRUPTED, USAGE_ERROR):
        raise RuntimeError(f"pytest exited with {code} for {mutant.identity}")
    return Result(mutant, "caught" if code else "survived", seconds)


def summary(results: Sequence[Result]) -> dict[str, object]:
    """Count the outcomes.

    rate: the share of mutants that are caught or time out, among those that change behaviour, with
    its 95 % interval.
    """
    counts = Counter(result.outcome for result in results)
    caught = counts["caught"] + counts["timeout"]
    relevant = caught + counts["survived"]
    low, high = wilson_interval(caught, relevant)
    return {
        "mutants": len(results),
        **{outcome: counts[outcome] for outcome in ("caught", "timeout", "survived", "equivalent")},
        "rate": round(caught / relevant, 4) if relevant else None,
        "interval_95": [round(low, 4), round(high, 4)],
        "survivors": [result.mutant.identity for result in results if result.outcome == "survived"],
    }


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="Planted faults, by module", title_justify="left")
    for heading in ("module", "caught", "survived", "timeout", "equivalent"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for module in (*dict.fromkeys(result.mutant.module for result in results), "all"):
        counts = Counter(
            result.outcome for result in results if module in (result.mutant.module, "all")
        )
        table.add_row(
            module,
            *(str(counts[outcome]) for outcome in ("caught", "survived", "timeout", "equivalent")),
        )
    return table


if __name__ == "__main__":
    main()
