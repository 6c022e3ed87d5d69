"""Measure latency at rising rates of arrivals, up to saturation and a little beyond.

    python -m load_tests.curve --plot docs/curve.svg
    python -m load_tests.curve --seconds 4 --sides 128,256 --steps 8,12
    python -m load_tests.curve --steps 2 --devices cpu,cpu     # two workers on the CPU

Requests come as a Poisson process, whatever the server does; a latency counts from the time at
which the request was due. The rate is multiplied until the server is saturated: it answers less
than 95 % of the arrivals, or rejects more than 1 %. Between that rate and the last sustained one
lies the *knee*, which is narrowed down to 12 %. At every rate the first seconds are not counted.
The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from load_tests.batching import numbers
from load_tests.report import Report, quantiles
from load_tests.serving import Others, Server, figures_when_idle, finds_compiled, serving
from load_tests.traffic import (
    Answer,
    Arrival,
    Load,
    Target,
    generate_endpoint,
    kinds_of,
    open_client,
    poisson_trace,
)

FACTOR, PRECISION = 1.5, 1.12
SERVED_SHARE, REFUSED_SHARE = 0.95, 0.01
TARGET_S = 0.5


@dataclass(frozen=True, slots=True)
class Point:
    """The result of one rate, in requests per second.

    rate: the nominal one. arrived: requests that were due in the counted seconds, which differs
    from it by chance. served: answers in these seconds, some of them to earlier requests. latency:
    of the answered requests, if there are any. The others are shares.
    """

    rate: float
    arrived: float
    served: float
    latency: dict[str, float]
    under_target: float
    refused: float
    failed: float

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Point:
        """Return the point that a result in JSON has."""
        return cls(**{field.name: stored[field.name] for field in fields(cls)})

    @property
    def sustained(self) -> bool:
        return (
            self.served >= SERVED_SHARE * self.arrived
            and self.refused + self.failed <= REFUSED_SHARE
        )

    @property
    def on_target(self) -> bool:
        """Return whether 99 % are answered within half a second."""
        return (
            self.latency.get("p99_ms", math.inf) <= TARGET_S * 1000
            and self.refused + self.failed <= REFUSED_SHARE
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises SystemExit for bad arguments, RuntimeError if the server does not start.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("curve", command=shlex.join(["python", "-m", "load_tests.curve", *sent]))
    settings = {"PAELLERA_DEVICES": options.devices} if options.devices else {}
    with serving(settings) as server:
        options.sides = options.sides or (server.sizes().native[0],)
        others = Others(server)
        points = asyncio.run(Curve(server, options).run())
        measured: dict[str, Any] = {"others_share_of_the_machine": others.share()}
    measured |= {
        "kinds": [str(kind) for kind in kinds_of(options.sides, options.steps)],
        "devices": options.devices,
        "compiled": finds_compiled(),
        **summary(points),
    }
    report.add(_table(points))
    report.emit(measured)
    if options.plot:
        from load_tests.plot import draw

        draw(measured, options.plot)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.curve",
        description="Latency at rising rates; the last line is JSON.",
    )
    parser.add_argument(
        "--sides", type=numbers, help="image sides in pixels, the native width by default"
    )
    parser.add_argument("--steps", type=numbers, default=(12,), help="step counts, 12 by default")
    parser.add_argument(
        "--first", type=float, default=4, help="the lowest rate, requests per second, 4 by default"
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="that count at every rate, 10 by default"
    )
    parser.add_argument(
        "--warm-up", type=float, default=2, help="seconds before them, 2 by default"
    )
    parser.add_argument(
        "--timeout", type=float, default=5, help="of the requests, in seconds, 5 by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument(
        "--devices", default="", help="PAELLERA_DEVICES of the server, such as cpu,cpu"
    )
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file to draw")
    return parser.parse_args(arguments)


def next_rate(points: Sequence[Point], first: float) -> float | None:
    """Return the next rate to measure; None if the knee is known well enough.

    The rate grows by `FACTOR` until one is not sustained; then it is the geometric middle of the
    gap below that one.
    """
    if not points:
        return first
    saturated = min((point.rate for point in points if not point.sustained), default=math.inf)
    below = max((point.rate for point in points if point.rate < saturated), default=None)
    if below is None:
        return saturated / FACTOR
    if saturated == math.inf:
        return below * FACTOR
    return math.sqrt(below * saturated) if saturated / below > PRECISION else None


def evaluate(
    rate: float, trace: Sequence[Arrival], answers: Sequence[Answer], warm_up: float, seconds: float
) -> Point:
    """Count the requests due after the warm-up, and the answers in the seconds after it."""
    counted = [
        answer for arrival, answer in zip(trace, answers, strict=True) if arrival.at >= warm_up
    ]
    good = [answer.seconds for answer in counted if answer.status == httpx.codes.OK]
    ends = (
        arrival.at + answer.seconds
        for arrival, answer in zip(trace, answers, strict=True)
        if answer.status == httpx.codes.OK
    )
    refused = sum(answer.refused for answer in counted)
    return Point(
        rate=round(rate, 3),
        arrived=round(len(counted) / seconds, 3),
        served=round(sum(warm_up <= end < warm_up + seconds for end in ends) / seconds, 3),
        latency=quantiles(good) if good else {},
        under_target=round(sum(taken < TARGET_S for taken in good) / len(counted), 4),
        refused=round(refused / len(counted), 4),
        failed=round((len(counted) - len(good) - refused) / len(counted), 4),
    )


def summary(points: Sequence[Point]) -> dict[str, Any]:
    """Return the two rates that describe the curve, and all points.

    knee_per_s: the answers per second at the highest sustained rate. on_target_per_s: the same at
    the highest rate with a p99 within 500 ms.
    """
    by_rate = sorted(points, key=lambda point: point.rate)
    return {
        "knee_per_s": _highest(point for point in by_rate if point.sustained),
        "on_target_per_s": _highest(point for point in by_rate if point.on_target),
        "points": [asdict(point) | {"sustained": point.sustained} for point in by_rate],
    }


def _highest(points: Iterable[Point]) -> float:
    """Return the answers per second at the last of these points; 0 without any."""
    return next((point.served for point in reversed(list(points))), 0.0)


class Curve:
    """One server and its rates."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server, self.options = server, options
        self.kinds = kinds_of(options.sides, options.steps)

    async def run(self) -> list[Point]:
        points: list[Point] = []
        async with open_client(self.server.url) as client:
            load = Load(client, {"timeout_s": self.options.timeout})
            target = generate_endpoint(self.server.url)
            await load.alone(target, self.kinds, repeats=2)
            while (rate := next_rate(points, self.options.first)) is not None:
                points.append(await self._measure(load, target, rate))
                print(points[-1], file=sys.stderr, flush=True)
                await figures_when_idle(client)
        return points

    async def _measure(self, load: Load, target: Target, rate: float) -> Point:
        o = self.options
        trace = poisson_trace(self.kinds, rate, o.warm_up + o.seconds, o.seed)
        return evaluate(rate, trace, await load.open_loop(target, trace), o.warm_up, o.seconds)


def _table(points: Sequence[Point]) -> Table:
    table = Table(title="Open loop; per second, ms, and % of what arrived", title_justify="left")
    for column in (
        "rate",
        "arrived",
        "served",
        "p50",
        "p95",
        "p99",
        "under 500 ms",
        "refused",
        "failed",
        "sustained",
    ):
        table.add_column(column, justify="right")
    for p in sorted(points, key=lambda point: point.rate):
        rates = (f"{p.rate:.1f}", f"{p.arrived:.1f}", f"{p.served:.1f}")
        tails = (f"{p.latency.get(f'p{q}_ms', math.nan):.0f}" for q in (50, 95, 99))
        shares = (f"{100 * share:.1f}" for share in (p.under_target, p.refused, p.failed))
        table.add_row(*rates, *tails, *shares, "yes" if p.sustained else "no")
    return table


if __name__ == "__main__":
    main()
