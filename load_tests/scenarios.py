"""Run Locust's scenarios (locustfile.py) one after the other against a server of its own.

    python -m load_tests.scenarios --users 8 --seconds 30

Locust replaces Python's sockets, so it runs as a process of its own. Exits with 1 if a request
failed; the last line of output is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from load_tests.report import Report
from load_tests.serving import Others, serving

ROOT = Path(__file__).parents[1]
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SCENARIOS = ("Generate", "MixedOperations", "Bursts")


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one kind of request in one scenario."""

    scenario: str
    request: str
    requests: int
    failures: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the scenarios and print their results.

    Raises SystemExit with 1 if a request failed, subprocess.CalledProcessError if Locust failed.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report(
        "scenarios", command=shlex.join(["python", "-m", "load_tests.scenarios", *sent])
    )
    with serving({}) as server:
        others = Others(server)
        rows = [row for name in SCENARIOS for row in read(name, _locust(name, server.url, options))]
        share = others.share()
    good = bool(rows) and not any(row.failures for row in rows)
    report.add(_table(rows))
    report.emit(
        {
            "others_share_of_the_machine": share,
            "users": options.users,
            "rows": [asdict(row) for row in rows],
            "good": good,
        }
    )
    sys.exit(not good)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.scenarios",
        description="Locust's scenarios; the last line is JSON.",
    )
    parser.add_argument(
        "--users", type=int, default=8, help="at once in each scenario, 8 by default"
    )
    parser.add_argument("--seconds", type=int, default=30, help="for each scenario, 30 by default")
    return parser.parse_args(arguments)


def _locust(scenario: str, url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return Locust's own statistics, one entry for each path."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(LOCUSTFILE),
        "--headless",
        "--json",
        "--skip-log",
        "--host",
        url,
    ]
    command += [
        "--users",
        str(options.users),
        "--spawn-rate",
        str(options.users),
        "--run-time",
        f"{options.seconds}s",
        "--stop-timeout",
        "60",
    ]
    # A failed request is for us to tell, not for its exit code.
    command += ["--exit-code-on-error", "0", scenario]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        text=True,
    )
    statistics: list[dict[str, Any]] = json.loads(ran.stdout)
    return statistics


def read(scenario: str, statistics: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for entry in sorted(statistics, key=lambda entry: str(entry["name"])):
        histogram = {
            float(milliseconds): count for milliseconds, count in entry["response_times"].items()
        }
        quantiles = (quantile(histogram, q) for q in (0.5, 0.95, 0.99))
        rows.append(
            Row(scenario, entry["name"], entry["num_requests"], entry["num_failures"], *quantiles)
        )
    return rows


def quantile(histogram: Mapping[float, int], q: float) -> float:
    """Return the least value that a share `q` of all does not exceed.

    Raises IndexError for an empty histogram.
    """
    values = sorted(histogram)
    seen = list(itertools.accumulate(histogram[value] for value in values))
    return values[bisect_left(seen, q * seen[-1])]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Locust's scenarios", title_justify="left")
    for column in ("scenario", "request", "requests", "failures", "p50 ms", "p95 ms", "p99 ms"):
        table.add_column(column, justify="left" if column in ("scenario", "request") else "right")
    for row in rows:
        quantiles = (f"{value:.0f}" for value in (row.p50_ms, row.p95_ms, row.p99_ms))
        table.add_row(row.scenario, row.request, str(row.requests), str(row.failures), *quantiles)
    return table


if __name__ == "__main__":
    main()
