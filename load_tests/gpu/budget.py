"""Run every part of the checks within a given number of minutes.

    python -m load_tests.gpu --budget-minutes 6 --out results

The tasks run in the order of `PLAN`, correctness first, in one child process, so that the libraries
are loaded once. A task that crashes the child, or takes far longer than planned, is recorded as
failed, and a new child runs the rest. A task whose planned time no longer fits is skipped and
recorded as such. Results are written after every row, and all of them together after every task.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from load_tests.gpu.results import write_json
from load_tests.report import Report

# A task may take this many times its planned seconds, and never fewer than the second number,
# before it counts as hung.
_PATIENCE, _SHORTEST_S = 2.5, 45.0
# Seconds kept for stopping children and writing the report.
_MARGIN_S = 8.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Task:
    """One invocation of the program. seconds: planned, on one H100 or H200."""

    name: str
    seconds: float
    arguments: tuple[str, ...]


def _task(name: str, seconds: float, arguments: str) -> Task:
    return Task(name, seconds, tuple(arguments.split()))


PLAN = (
    _task("checks-v3", 45, "--part checks --families v3 --quick"),
    _task("kernels", 35, "--part kernels --runs 15"),
    _task("stages-v3", 35, "--part stages --families v3 --rows 1,4,16 --sides 256 --runs 15"),
    _task("stages-v1", 20, "--part stages --families v1 --rows 1,4,16 --sides 256 --runs 15"),
    _task("served-v3", 75, "--part served --families v3 --rows 16 --steps 8,12 --runs 20 --quick"),
    _task("transcription", 30, "--part transcription --families v3 --rows 1,4,16 --runs 8 --quick"),
    _task("profile-v3", 20, "--part profile --families v3 --rows 1"),
    _task("served-v1", 45, "--part served --families v1 --rows 16 --steps 8,12 --runs 20 --quick"),
    _task("checks-v1", 20, "--part checks --families v1 --quick"),
    _task("profile-v1", 12, "--part profile --families v1 --rows 1"),
    _task("compiled-transcription", 75, "--part transcription --families v3 --rows 1 --runs 8"),
)
SMOKE_PLAN = (
    _task("checks-v3", 20, "--part checks --families v3 --smoke"),
    _task("stages-v3", 20, "--part stages --families v3 --rows 1,2 --smoke"),
    _task("served-v3", 40, "--part served --families v3 --rows 2 --quick --smoke"),
    _task("transcription", 20, "--part transcription --rows 1 --quick --smoke"),
    _task("stages-v1", 20, "--part stages --families v1 --rows 1 --smoke"),
    _task("profile-v3", 20, "--part profile --families v3 --rows 1 --smoke"),
)


def choose(plan: Sequence[Task], chosen: Sequence[str]) -> list[Task]:
    """Return the named tasks in the plan's order, or the whole plan.

    Raises:
        ValueError: for a name that the plan lacks.
    """
    if unknown := set(chosen) - {task.name for task in plan}:
        raise ValueError(
            f"unknown tasks {', '.join(sorted(unknown))}; known: "
            f"{', '.join(task.name for task in plan)}"
        )
    return [task for task in plan if not chosen or task.name in chosen]


class Progress:
    """State shared by the parent and its child through one JSON file.

    It holds the running task, its start, and the result of every finished task.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "progress.json"

    def read(self) -> dict[str, Any]:
        return (
            json.loads(self._file.read_text())
            if self._file.exists()
            else {"running": None, "ended": {}}
        )

    def _write(self, state: dict[str, Any]) -> None:
        write_json(self._file, state)

    def begin(self, task: str) -> None:
        self._write(self.read() | {"running": task, "since": time.time()})

    def end(self, task: str, outcome: str) -> None:
        state = self.read()
        seconds = round(time.time() - state.get("since", time.time()), 1)
        self._write(
            {
                "running": None,
                "ended": state["ended"] | {task: {"outcome": outcome, "seconds": seconds}},
            }
        )


class BudgetRun:
    """One run of a plan.

    out: the folder for PART files of every task, `progress.json` and `gpu.json`. minutes: of wall
    clock, all included.
    """

    def __init__(self, plan: Sequence[Task], minutes: float, out: Path, report: Report) -> None:
        self.plan, self.out, self.report = list(plan), out, report
        self.progress = Progress(out)
        self._deadline = time.monotonic() + 60 * minutes - _MARGIN_S

    def run(self) -> int:
        """Run what fits and return the exit status: 0 if every task that ran passed its checks."""
        while pending := [
            task for task in self.plan if task.name not in self.progress.read()["ended"]
        ]:
            if not self._run_child(pending):
                break
            self._write_report()
        for task in self.plan:
            if task.name not in self.progress.read()["ended"]:
                self.progress.end(task.name, "skipped: no time left")
        found = self._write_report()
        self.report.add(_summary(found["tasks"]))
        self.report.emit(found)
        return int(
            any(
                ended["outcome"] not in ("passed", "skipped: no time left")
                for ended in found["tasks"].values()
            )
        )

    def _run_child(self, pending: Sequence[Task]) -> bool:
        """Run tasks in one child until it ends. False: there is no time for anything more."""
        left = self._deadline - time.monotonic()
        if left < min(task.seconds for task in pending):
            return False
        command = [
            sys.executable,
            "-m",
            "load_tests.gpu",
            "--child",
            f"{left:.0f}",
            "--out",
            str(self.out),
        ]
        smoke = ["--smoke"] if self.plan[0].arguments[-1] == "--smoke" else []
        names = [task.name for task in pending]
        # The tables of every task would push the summary out of sight; the rows still go to
        # standard error.
        with (self.out / "tables.txt").open("ab") as tables:
            child = subprocess.Popen(
                [*command, *smoke, "--tasks", *names], stdout=tables, start_new_session=True
            )
            try:
                self._watch(child)
            finally:
                _kill(child)
        running = self.progress.read()["running"]
        if running is not None:
            self.progress.end(running, f"failed: exit status {child.returncode}")
        return running is not None or child.returncode == _RESTART

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Return when the child has ended, has no time left, or hangs in a task."""
        planned = {task.name: task.seconds for task in self.plan}
        while child.poll() is None and time.monotonic() < self._deadline:
            state = self.progress.read()
            name = state["running"]
            if name is not None and time.time() - state["since"] > max(
                _SHORTEST_S, _PATIENCE * planned[name]
            ):
                return
            time.sleep(_POLL_S)

    def _write_report(self) -> dict[str, Any]:
        """Write everything found so far to `gpu.json` and return it."""
        tasks = {
            name: {**ended, "rows": _rows(self.out / name)}
            for name, ended in self.progress.read()["ended"].items()
        }
        found = {"tasks": tasks}
        run = {"report": "gpu", "date": self.report.date, "hardware": self.report.hardware}
        write_json(self.out / "gpu.json", run | found)
        return found


# A child whose device no longer works after a failed task: the rest needs a new process.
_RESTART = 75


def run_tasks(
    tasks: Sequence[Task],
    seconds: float,
    out: Path,
    run: Callable[[Sequence[str]], int],
    device_works: Callable[[], bool],
) -> int:
    """Run tasks one after the other in this process, and return the exit status for the parent.

    seconds: the time for all tasks. run: the program's main function. device_works: whether the
    device can still be used after a failure.
    """
    progress, deadline = Progress(out), time.monotonic() + seconds
    for task in tasks:
        if deadline - time.monotonic() < task.seconds:
            progress.end(task.name, "skipped: no time left")
            continue
        progress.begin(task.name)
        print(
            f"task {task.name}, {deadline - time.monotonic():.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        try:
            status = run([*task.arguments, "--out", str(out / task.name)])
        except Exception as error:
            progress.end(
                task.name,
                f"failed: {type(error).__name__}: "
                f"{str(error).splitlines()[0][:300] if str(error) else ''}",
            )
            traceback.print_exc(limit=-6, file=sys.stderr)
            if not device_works():
                return _RESTART
            continue
        progress.end(task.name, "passed" if status == 0 else "failed: a check did not pass")
    return 0


def _summary(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="tasks", title_justify="left")
    for column in ("task", "outcome", "seconds"):
        table.add_column(column)
    for name, ended in tasks.items():
        table.add_row(name, ended["outcome"], str(ended["seconds"]))
    return table


def _rows(directory: Path) -> dict[str, Any]:
    """Return the results of one task, by part."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def _kill(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
