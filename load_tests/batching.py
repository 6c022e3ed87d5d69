"""Compare `paellera serve` with whole-request batching (LitServe) under mixed requests.

    python -m load_tests.batching                       # about five minutes
    python -m load_tests.batching --seconds 12 --trial 3

Both servers run the same model as real processes; while one is measured, the other is stopped, and
they take turns. First the compared server's batch size and timeout are searched. Then each server
is saturated, and gets the same Poisson arrivals at 80 % of the compared server's throughput. A
*slowdown* is a request's latency over the median latency of its kind alone: on the same server
("own"), or on the faster of the two ("common"): a server that waits for a batch even for a single
client looks good beside itself. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from load_tests.report import Report, quantiles
from load_tests.serving import Others, Server, Sizes, serving
from load_tests.traffic import (
    REQUEST_TIMEOUT_S,
    Answer,
    Kind,
    Load,
    Target,
    generate_endpoint,
    kinds_of,
    poisson_trace,
    slowdowns,
)

PEER = ("-m", "load_tests.peer")
LOAD = 0.8
# Image sides over the native width.
SCALES = (0.5, 1.0, 1.5)
SLOWDOWN_TARGET, THROUGHPUT_TARGET = 0.6, 0.95
BATCH_SIZES = (8, 16, 32)
BATCH_TIMEOUTS = (0.0, 0.05)
# Batch sizes whose throughput is this close to the best one's go on to the trial of their tails.
NEARLY_BEST = 0.95


@dataclass
class Measured:
    """One server's turns, collected."""

    target: Target
    alone: dict[Kind, float] = field(default_factory=dict)
    saturated: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Return the answers per second with more clients than slots."""
        return float(np.mean(self.saturated))

    def figures(self, common: Mapping[Kind, float]) -> dict[str, Any]:
        own = {
            f"p{q}": round(value, 3)
            for q, value in _tails(slowdowns(self.answers, self.alone)).items()
        }
        shared = {
            f"p{q}": round(value, 3) for q, value in _tails(slowdowns(self.answers, common)).items()
        }
        return {
            "throughput_per_s": round(self.throughput, 3),
            "saturated_per_s": [round(rate, 3) for rate in self.saturated],
            "alone_ms": {
                str(kind): round(seconds * 1000, 2) for kind, seconds in self.alone.items()
            },
            "latency": quantiles([answer.seconds for answer in self.answers]),
            "slowdown": own,
            "slowdown_common": shared,
            "not_200": sum(answer.status != httpx.codes.OK for answer in self.answers),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises SystemExit for bad arguments, RuntimeError if a server does not start.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("batching", command=shlex.join(["python", "-m", "load_tests.batching", *sent]))
    with serving({}, PEER, "/health") as peer, serving({}) as own:
        options.sides = options.sides or default_sides(own.sizes())
        others = Others(peer, own)
        measured = asyncio.run(Comparison(peer, own, options).run())
        measured["others_share_of_the_machine"] = others.share()
    report.add(_table(measured))
    report.emit(measured)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.batching",
        description="Mixed requests, two servers; the last line is JSON.",
    )
    parser.add_argument(
        "--sides",
        type=numbers,
        help="image sides in pixels; by default 0.5, 1 and 1.5 times the native width",
    )
    parser.add_argument(
        "--steps", type=numbers, default=(8, 12, 16), help="step counts, 8,12,16 by default"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="of open-loop arrivals for each server, 30 by default",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns they are divided into, 3 by default"
    )
    parser.add_argument(
        "--saturate",
        type=float,
        default=8,
        help="seconds of saturation a turn, two turns each, 8 by default",
    )
    parser.add_argument(
        "--trial",
        type=float,
        default=6,
        help="seconds for each setting of the search, 6 by default",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=48,
        help="concurrent clients of a saturated server, 48 by default",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    return parser.parse_args(arguments)


def default_sides(sizes: Sizes) -> tuple[int, ...]:
    """Return different image sides around the native width, in pixels."""
    return tuple(sorted({sizes.side(scale) for scale in SCALES}))


def numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"numbers with commas between them, not {text!r}")
    return tuple(map(int, parts))


class Comparison:
    """Both servers, and the measurements in their order."""

    def __init__(self, peer: Server, own: Server, options: argparse.Namespace) -> None:
        self.servers = {"litserve": peer, "paellera": own}
        self.peer, self.own = (
            Measured(Target("litserve", f"{peer.url}/predict")),
            Measured(generate_endpoint(own.url)),
        )
        self.options = options
        self.kinds = kinds_of(options.sides, options.steps)

    async def run(self) -> dict[str, Any]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.options.clients)
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
            self.load, self.client = Load(client), client
            search = await self._tune()
            _say(f"LitServe: {search}")
            for each in (self.peer, self.own):
                with self._turn(each):
                    each.alone = await self.load.alone(each.target, self.kinds, repeats=4)
            for turn in range(2):
                await self._saturate(turn)
            _say(f"saturated: {self.peer.throughput:.1f} and {self.own.throughput:.1f} requests/s")
            rate = LOAD * self.peer.throughput
            for turn in range(self.options.rounds):
                await self._arrivals(rate, turn)
                _say(f"arrivals: turn {turn + 1} of {self.options.rounds}")
        return compare(search, rate, peer=self.peer, own=self.own)

    @contextlib.contextmanager
    def _turn(self, measured: Measured) -> Iterator[None]:
        """Stop the other server's processes for this context."""
        (other,) = (server for name, server in self.servers.items() if name != measured.target.name)
        with other.paused():
            yield

    # ── the search ────────────────────────────────────────────────────────────────────────────────

    async def _tune(self) -> dict[str, Any]:
        """Leave the compared server with its best settings, and return the search.

        The best settings have the lowest p99 slowdown among those of nearly the best throughput.
        """
        with self._turn(self.peer):
            throughput = {size: await self._peer_throughput(size) for size in BATCH_SIZES}
            best = max(throughput.values())
            rate = LOAD * best
            await self._batching(1, 0.0)
            alone = await self.load.alone(self.peer.target, self.kinds, repeats=2)
            tails = {}
            for size in (
                size for size, reached in throughput.items() if reached >= NEARLY_BEST * best
            ):
                for timeout in BATCH_TIMEOUTS:
                    tails[size, timeout] = await self._peer_tail(size, timeout, rate, alone)
            chosen = min(tails, key=lambda setting: tails[setting])
            await self._batching(*chosen)
        return {
            "max_batch_size": chosen[0],
            "batch_timeout_s": chosen[1],
            "throughput_per_s": {
                str(size): round(reached, 2) for size, reached in throughput.items()
            },
            "p99_slowdown": {
                f"{size}, {timeout:g} s": round(tail, 2) for (size, timeout), tail in tails.items()
            },
        }

    async def _batching(self, size: int, wait_s: float) -> None:
        answer = await self.client.post(
            self.peer.target.url, json={"max_batch_size": size, "batch_timeout": wait_s}
        )
        answer.raise_for_status()

    async def _peer_throughput(self, size: int) -> float:
        await self._batching(size, 0.0)
        return await self.load.saturate(
            self.peer.target,
            self.kinds,
            self.options.clients,
            3.0,
            self.options.trial,
            self.options.seed,
        )

    async def _peer_tail(
        self, size: int, wait_s: float, rate: float, alone: Mapping[Kind, float]
    ) -> float:
        await self._batching(size, wait_s)
        trace = poisson_trace(self.kinds, rate, self.options.trial, self.options.seed + 1_000)
        return _tails(slowdowns(await self.load.open_loop(self.peer.target, trace), alone))[99]

    # ── the comparison ────────────────────────────────────────────────────────────────────────────

    async def _saturate(self, turn: int) -> None:
        o = self.options
        for each in (self.peer, self.own):
            with self._turn(each):
                each.saturated.append(
                    await self.load.saturate(
                        each.target, self.kinds, o.clients, 4.0, o.saturate, o.seed + turn
                    )
                )

    async def _arrivals(self, rate: float, turn: int) -> None:
        trace = poisson_trace(
            self.kinds, rate, self.options.seconds / self.options.rounds, self.options.seed + turn
        )
        for each in (self.peer, self.own):
            with self._turn(each):
                each.answers += await self.load.open_loop(each.target, trace)


def compare(
    search: Mapping[str, Any], rate: float, *, peer: Measured, own: Measured
) -> dict[str, Any]:
    """Return both servers' figures, the ratios of ours over theirs, and the targets met.

    rate: arrivals per second.
    """
    common = {kind: min(seconds, own.alone[kind]) for kind, seconds in peer.alone.items()}
    theirs, ours = peer.figures(common), own.figures(common)
    ratios = {
        "p99_slowdown": round(ours["slowdown"]["p99"] / theirs["slowdown"]["p99"], 3),
        "p99_slowdown_common": round(
            ours["slowdown_common"]["p99"] / theirs["slowdown_common"]["p99"], 3
        ),
        "p99_latency": round(ours["latency"]["p99_ms"] / theirs["latency"]["p99_ms"], 3),
        "throughput": round(own.throughput / peer.throughput, 3),
    }
    met = {
        name: ratios[name] <= SLOWDOWN_TARGET for name in ("p99_slowdown", "p99_slowdown_common")
    }
    met |= {
        "throughput": ratios["throughput"] >= THROUGHPUT_TARGET,
        "all_answered": not ours["not_200"],
    }
    return {
        "rate_per_s": round(rate, 3),
        "search": dict(search),
        "litserve": theirs,
        "paellera": ours,
        "ratios": ratios,
        "met": met,
    }


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _tails(values: Sequence[float]) -> dict[int, float]:
    return {q: float(np.percentile(values, q)) for q in (50, 95, 99)}


def _table(measured: Mapping[str, Any]) -> Table:
    """Return a table with one column a server, and the ratio of ours over theirs."""
    peer, own = measured["litserve"], measured["paellera"]
    search = measured["search"]
    title = (
        f"{measured['rate_per_s']:.1f} requests/s; LitServe: batches of "
        f"{search['max_batch_size']}, timeout {search['batch_timeout_s']:g} s"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "LitServe", "Paellera", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    rows = [("saturated, requests/s", peer["throughput_per_s"], own["throughput_per_s"])]
    for key, of, unit in (
        ("latency", "latency", "_ms"),
        ("slowdown", "slowdown, own", ""),
        ("slowdown_common", "slowdown, common", ""),
    ):
        rows += [
            (f"{q} {of}{unit.replace('_', ', ')}", peer[key][q + unit], own[key][q + unit])
            for q in ("p50", "p95", "p99")
        ]
    for name, theirs, ours in rows:
        table.add_row(name, f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}")
    return table


if __name__ == "__main__":
    main()
