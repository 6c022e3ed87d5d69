"""Send thousands of small requests, some of them cancelled, and check for growth and leftovers.

    python -m load_tests.soak --requests 10000
    python -m load_tests.soak --minutes 60
    python -m load_tests.soak --minutes 60 --hostile 1

After every tenth of the requests the server may come to rest; then a snapshot is taken: memory of
both processes, open files, threads, asyncio tasks, rows. Exits with 1 if from the first tenth to
the end memory has grown by more than 2 %, or anything else at all, or a request failed. The growth
of memory in an hour is the slope of a line through the snapshots; p99 is that of the answers of a
tenth. The last line is JSON.

With --hostile all attacks of `load_tests/attacks.py` run beside the requests of every tenth. Then a
request may also be refused with a time to come back. The allocator keeps some of the memory that
held the attackers' uploads, so the last snapshot is compared with the highest of the first three.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from load_tests.attacks import attackers_of
from load_tests.processes import open_files, resident_mib, threads, workers
from load_tests.prompts import prompts
from load_tests.report import Report, quantiles
from load_tests.serving import RUNNING, WAITING, Server, figures_when_idle, serving
from load_tests.traffic import refused_honestly

INSTRUMENTED = ("-m", "load_tests.instrumented")
GROWTH_ALLOWED = 0.02
STEPS = 2
# Of ten requests one is cancelled by id, one by hanging up, and two are deterministic.
CANCELLED_BY_ID, HANGS_UP, DETERMINISTIC = (3,), (7,), (1, 5)
HANGS_UP_AFTER_S = 0.02
REST_S = 1.0
# After an attack images are still being decoded that nobody waits for any more.
REST_AFTER_ATTACK_S = 15.0
SETTLING = 3  # snapshots under attack before memory, threads and files are at their level
# Full before the first snapshot: the default of 256 MiB takes thousands of these requests to fill,
# which is growth, but not a leak.
_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The server while it has nothing to do."""

    requests: int
    api_mib: float
    worker_mib: float
    api_files: int
    worker_files: int
    api_threads: int
    worker_threads: int
    tasks: int
    rows: int

    def violations(self, earlier: Snapshot) -> list[str]:
        """Return the figures that have grown since an earlier snapshot, in words."""
        found = []
        for name, value in asdict(self).items():
            before = getattr(earlier, name)
            allowed = before * (1 + GROWTH_ALLOWED) if name.endswith("_mib") else before
            if name != "requests" and value > allowed:
                found.append(f"{name}: {before:g} to {value:g}")
        return found


def highest(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Return the highest value of each figure."""
    names = [field.name for field in fields(Snapshot)]
    return Snapshot(**{name: max(getattr(one, name) for one in snapshots) for name in names})


@dataclass(frozen=True, slots=True)
class Tenth:
    """ended_s: since the first request. latency: of the requests that nobody cancelled."""

    snapshot: Snapshot
    ended_s: float
    latency: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the soak test and print.

    Raises SystemExit with 1 for growth, leftovers or failed requests.
    """
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report("soak", command=shlex.join(["python", "-m", "load_tests.soak", *sent]))
    began = time.perf_counter()
    with serving(
        {"PAELLERA_LOG_LEVEL": "error", "PAELLERA_PROMPT_CACHE_BYTES": str(_CACHE_BYTES)},
        INSTRUMENTED,
    ) as server:
        soak = Soak(server, options.side or server.sizes().low, options.hostile)
        tenths = asyncio.run(soak.run(shares(options.requests, options.minutes), options.clients))
    measured = {
        "seconds": round(time.perf_counter() - began, 1),
        "refused": soak.refused,
        **judge(tenths, soak.statuses, settling=SETTLING if options.hostile else 1),
    }
    report.add(_table(tenths))
    report.emit(measured)
    sys.exit(not measured["good"])


# 499 is what the one who was cancelled by id gets.
HUNG_UP, BROKEN = 0, -1
EXPECTED = (200, 499, HUNG_UP)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.soak", description="Many small requests; the last line is JSON."
    )
    parser.add_argument("--requests", type=int, default=10_000, help="10,000 by default")
    parser.add_argument("--minutes", type=float, help="as many requests as fit into them instead")
    parser.add_argument("--clients", type=int, default=8, help="requests at once, 8 by default")
    parser.add_argument(
        "--side", type=int, help="of the images in pixels, the smallest possible by default"
    )
    parser.add_argument(
        "--hostile",
        type=float,
        default=0.0,
        metavar="SCALE",
        help="run all attacks beside the requests, at so many times their usual rates",
    )
    return parser.parse_args(arguments)


def shares(requests: int, minutes: float | None) -> Iterator[Iterator[int]]:
    """Yield the numbers of the requests of each tenth.

    minutes: each tenth begins when it is requested and lasts a tenth of this time.
    """
    if minutes is None:
        yield from (
            iter(range(requests * tenth // 10, requests * (tenth + 1) // 10)) for tenth in range(10)
        )
        return
    numbers = itertools.count()
    for _ in range(10):
        yield _until(time.monotonic() + 60 * minutes / 10, numbers)


def _until(end: float, numbers: Iterator[int]) -> Iterator[int]:
    while time.monotonic() < end:
        yield next(numbers)


def judge(
    tenths: Sequence[Tenth], statuses: Mapping[int, int], settling: int = 1
) -> dict[str, Any]:
    """Return growth and failures. p99_drift: the last tenth's over the first's, minus one.

    settling: number of first snapshots whose highest values the last one may have.
    """
    first, last = tenths[0], tenths[-1]
    errors = {str(status): n for status, n in statuses.items() if status not in EXPECTED}
    before = highest([tenth.snapshot for tenth in tenths[:settling]])
    violations = last.snapshot.violations(before) + [
        f"status {status}: {n}" for status, n in errors.items()
    ]
    return {
        "answers": {str(status): n for status, n in sorted(statuses.items())},
        "errors": sum(errors.values()),
        "memory_mib_per_hour": {
            name: _slope(tenths[settling - 1 :], name) for name in ("api_mib", "worker_mib")
        },
        "p99_drift": round(last.latency["p99_ms"] / first.latency["p99_ms"] - 1, 3),
        "violations": violations,
        "good": not violations,
        "snapshots": [asdict(tenth.snapshot) for tenth in tenths],
        "latency": [tenth.latency for tenth in tenths],
    }


def _slope(tenths: Sequence[Tenth], name: str) -> float:
    """Return the growth in MiB per hour."""
    hours, mib = (
        [tenth.ended_s / 3600 for tenth in tenths],
        [getattr(tenth.snapshot, name) for tenth in tenths],
    )
    return round(float(np.polyfit(hours, mib, 1)[0]), 2)


class _RefusedError(Exception):
    """A request beside attacks was told when to come back."""


class Soak:
    """Clients of one server.

    hostile: scale of the attacks beside them; 0 for none. refused: requests that were told when to
    come back, which counts as a failure unless there are attacks.
    """

    def __init__(self, server: Server, side: int, hostile: float = 0.0) -> None:
        self.server, self.side, self.hostile = server, side, hostile
        self.statuses: Counter[int] = Counter()
        self.refused = 0
        self._seconds: list[float] = []
        self._prompts = prompts()

    async def run(self, shares: Iterator[Iterator[int]], clients: int) -> list[Tenth]:
        """Run one tenth after the other, with a snapshot after each."""
        began, tenths = time.perf_counter(), []
        for numbers in shares:
            self._seconds = []
            # The numbers are shared by the clients: each goes to one of them.
            with self._attacks():
                async with self._client() as client:
                    await asyncio.gather(*(self._ask_all(client, numbers) for _ in range(clients)))
            async with self._client() as client:
                snapshot = await self._snapshot(client, self.statuses.total() + self.refused)
            tenths.append(Tenth(snapshot, time.perf_counter() - began, quantiles(self._seconds)))
            print(tenths[-1], file=sys.stderr, flush=True)
        return tenths

    def _attacks(self) -> contextlib.AbstractContextManager[object]:
        if not self.hostile:
            return contextlib.nullcontext()
        return attackers_of(self.server.url, seconds=math.inf, scale=self.hostile).running()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.url, timeout=300)

    async def _ask_all(self, client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            began = time.perf_counter()
            try:
                self.statuses[await self._ask(client, number)] += 1
            except httpx.TransportError:
                self.statuses[BROKEN] += 1
            except _RefusedError:
                self.refused += 1
                await asyncio.sleep(REST_S)
                continue
            if number % 10 not in CANCELLED_BY_ID + HANGS_UP:
                self._seconds.append(time.perf_counter() - began)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> int:
        """Return the answer's status; HUNG_UP for the request that hangs up."""
        kind, id = number % 10, f"soak-{number}"
        post = client.post("/generate", json=self._body(number), headers={"X-Request-Id": id})
        if kind in HANGS_UP:
            with contextlib.suppress(TimeoutError):
                return self._status(await asyncio.wait_for(post, HANGS_UP_AFTER_S))
            return HUNG_UP
        if kind in CANCELLED_BY_ID:
            answer, _ = await asyncio.gather(post, self._cancel(client, id))
            return self._status(answer)
        return self._status(await post)

    def _status(self, answer: httpx.Response) -> int:
        if self.hostile and refused_honestly(answer.status_code, answer.headers):
            raise _RefusedError
        return answer.status_code

    async def _cancel(self, client: httpx.AsyncClient, id: str) -> None:
        await asyncio.sleep(HANGS_UP_AFTER_S)
        await client.delete(f"/requests/{id}")

    def _body(self, number: int) -> dict[str, Any]:
        size = {"width": self.side, "height": self.side, "num_inference_steps": STEPS}
        return {
            "prompt": next(self._prompts),
            "seed": number,
            "deterministic": number % 10 in DETERMINISTIC,
            "timeout_s": 300,
            **size,
        }

    async def _snapshot(self, client: httpx.AsyncClient, requests: int) -> Snapshot:
        await figures_when_idle(client)
        # The connections of the clients that have just left are closed in a moment.
        await asyncio.sleep(REST_AFTER_ATTACK_S if self.hostile else REST_S)
        figures = await figures_when_idle(client)
        (worker,) = workers(self.server.pid)
        return Snapshot(
            requests=requests,
            api_mib=resident_mib(self.server.pid) or 0.0,
            worker_mib=resident_mib(worker) or 0.0,
            api_files=open_files(self.server.pid) or 0,
            worker_files=open_files(worker) or 0,
            api_threads=threads(self.server.pid) or 0,
            worker_threads=threads(worker) or 0,
            tasks=int(figures["asyncio_tasks"]),
            rows=int(figures[RUNNING] + figures[WAITING]),
        )


def _table(tenths: Sequence[Tenth]) -> Table:
    table = Table(
        title="The idle server, after so many requests, and the latency of those before",
        title_justify="left",
    )
    for column in (*asdict(tenths[0].snapshot), "p50 ms", "p99 ms"):
        table.add_column(column.replace("_", " "), justify="right")
    for tenth in tenths:
        latency = (tenth.latency["p50_ms"], tenth.latency["p99_ms"])
        table.add_row(
            *(f"{value:g}" for value in asdict(tenth.snapshot).values()),
            *(f"{value:.0f}" for value in latency),
        )
    return table


if __name__ == "__main__":
    main()
