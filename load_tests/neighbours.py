"""Measure one image beside processes that keep cores busy, by the number of threads.

    python -m load_tests.neighbours --requests 30

One server uses the worker's own choice of threads, the others fixed numbers. In every round each
server gets requests in turn while the others are stopped. Busy processes: none, one, one for each
core. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
from rich.table import Table

from load_tests.prompts import prompts
from load_tests.report import Report, quantiles, usable_cores
from load_tests.serving import Server, serving

CORES = usable_cores()
ALL = {"PAELLERA_THREADS": str(CORES)}
# What libgomp does if nobody says anything.
UNBOUNDED = {"GOMP_SPINCOUNT": "300000"}
SERVERS: Mapping[str, Mapping[str, str]] = {
    "chosen": {},
    "one": {"PAELLERA_THREADS": "1"},
    "all": ALL,
    "all, spinning on": {**ALL, **UNBOUNDED},
}
NEIGHBOURS = tuple(dict.fromkeys((0, 1, CORES)))
NEW_PROMPTS = prompts()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. Raises httpx.HTTPStatusError if a request fails."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report(
        "neighbours", command=shlex.join(["python", "-m", "load_tests.neighbours", *sent])
    )
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving({"PAELLERA_LOG_LEVEL": "error", **settings}))
            for name, settings in SERVERS.items()
        }
        rows = [row for neighbours in NEIGHBOURS for row in measure(servers, neighbours, options)]
    report.add(_table(rows))
    report.emit({"rows": rows})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.neighbours",
        description="Beside busy processes; the last line is JSON.",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=30,
        help="of each server beside each number of processes, 30 by default",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="in which they are shared out, 3 by default"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10,
        help="after so long a server's round is over, 10 by default",
    )
    return parser.parse_args(arguments)


def measure(
    servers: Mapping[str, Server], neighbours: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each server."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    with busy(neighbours):
        for _ in range(options.rounds):
            for name, server in servers.items():
                with ExitStack() as others:
                    for other in servers.values():
                        if other is not server:
                            others.enter_context(other.paused())
                    seconds[name] += ask(
                        server, options.requests // options.rounds, options.seconds
                    )
    for name, taken in seconds.items():
        yield {
            "threads": name,
            "neighbours": neighbours,
            **quantiles(taken),
            "longest_ms": round(max(taken) * 1000, 3),
        }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run processes that compute all the time, for this context."""
    running = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def ask(server: Server, requests: int, seconds: float) -> list[float]:
    """Return the seconds of images of new prompts, one after the other.

    There are `requests` of them; none starts after `seconds`.
    """
    taken: list[float] = []
    began = time.perf_counter()
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for prompt in NEW_PROMPTS:
            asked = time.perf_counter()
            client.post("/generate", json={"prompt": prompt}).raise_for_status()
            now = time.perf_counter()
            taken.append(now - asked)
            if len(taken) == requests or now - began > seconds:
                break
    return taken


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="One image beside busy processes, milliseconds", title_justify="left")
    for column in ("threads", "busy processes", "requests", "p50", "p95", "longest"):
        table.add_column(column, justify="left" if column == "threads" else "right")
    for row in rows:
        times = (f"{row[name]:.0f}" for name in ("p50_ms", "p95_ms", "longest_ms"))
        table.add_row(row["threads"], str(row["neighbours"]), str(row["n"]), *times)
    return table


if __name__ == "__main__":
    main()
