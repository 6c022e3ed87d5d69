"""Break the server while requests keep arriving: `python -m load_tests.faults --under-load`.

Requests arrive at a fixed average rate, whatever the server does. Some seconds after the first of
them a fault happens to the server, or other clients begin to misbehave. A request is *lost* if it
gets neither a whole image nor a 429 or 503 with a Retry-After header. In the end no row may be
left, and no file of the API process open that was not when it was idle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from rich.table import Table

from load_tests.misbehaving import Client
from load_tests.processes import fewest_open_files, runs, workers
from load_tests.report import quantiles
from load_tests.serving import (
    READY_TIMEOUT_S,
    RESTARTS,
    Server,
    figures_when_idle,
    launched,
    serving,
)
from load_tests.traffic import (
    REQUEST_TIMEOUT_S,
    Answer,
    Kind,
    Load,
    generate_endpoint,
    kinds_of,
    open_client,
    poisson_trace,
)

STALL_TIMEOUT_S = 4.0
# After which a worker whose API process was killed counts as left behind.
GONE_TIMEOUT_S = 10.0
FULL_DISK = Path("/dev/full")
# Image sides over the native width, and step counts.
SCALES, STEP_COUNTS = (0.5, 1.0), (8, 12)
# Of the time in which requests arrive, the share before the fault and the share until it ends.
BEGINS, ENDS = 0.2, 0.8
POLL_S = 0.05
SETTLED_S, CLOSED_TIMEOUT_S = 2.0, 30.0
Found = TypeVar("Found")
Strike = Callable[[Server, float], Awaitable[int]]
REPLAYED = "paella_requests_replayed_total"


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to break the server.

    strike: causes the fault within the given seconds, and returns the number of its own clients
    that got less than they should, or of processes in the wrong state. idle: it happens before the
    first request arrives.
    """

    name: str
    strike: Strike
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of the requests that arrived before, during and after a fault.

    refused: with an error that says when to come back. lost_of_its_own: clients the fault brought
    along. unready_s: for how long /readyz did not say yes. latency: of all that were sent, from
    when they were due.
    """

    fault: str
    sent: int
    answered: int
    refused: int
    lost_of_its_own: int
    restarts: int
    replayed: int
    files_left: int
    unready_s: float
    latency: dict[str, float]

    @property
    def lost(self) -> int:
        return self.sent - self.answered - self.refused + self.lost_of_its_own

    @property
    def good(self) -> bool:
        return not self.lost and not self.files_left


# ── what happens ──────────────────────────────────────────────────────────────────────────────────


async def _nothing(server: Server, seconds: float) -> int:
    return 0


async def _kill_worker(server: Server, seconds: float) -> int:
    os.kill(workers(server.pid)[0], signal.SIGKILL)
    return 0


def _stop_worker_for(pause_s: float) -> Strike:
    async def strike(server: Server, seconds: float) -> int:
        worker = workers(server.pid)[0]
        os.kill(worker, signal.SIGSTOP)
        await asyncio.sleep(pause_s)
        if worker in workers(server.pid):
            os.kill(worker, signal.SIGCONT)
        return 0

    return strike


async def _until(found: Callable[[], Found], timeout_s: float = READY_TIMEOUT_S) -> Found:
    """Return what is found, once it is something. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not (result := found()):  # noqa: ASYNC110, processes have no event
            await asyncio.sleep(POLL_S)
    return result


async def _hang(server: Server, seconds: float) -> int:
    os.kill(workers(server.pid)[0], signal.SIGSTOP)
    return 0


async def _hang_while_loading(server: Server, seconds: float) -> int:
    """Kill the worker, and stop the next one as soon as there is one."""
    before = workers(server.pid)
    os.kill(before[0], signal.SIGKILL)
    new = await _until(lambda: set(workers(server.pid)) - set(before))
    os.kill(new.pop(), signal.SIGSTOP)
    return 0


async def _kill_api_while_loading(server: Server, seconds: float) -> int:
    """Kill another server while its worker loads; return how many workers it leaves behind."""
    with launched(SETTINGS) as (process, _):
        left = await _until(lambda: workers(process.pid))
        process.kill()
        with contextlib.suppress(TimeoutError):
            await _until(lambda: not any(map(runs, left)), GONE_TIMEOUT_S)
        return sum(map(runs, left))


async def _keep_one_down(server: Server, seconds: float) -> int:
    """Kill one of two workers, and every one that replaces it; return how often the server was
    not ready.
    """
    ends, unready = time.monotonic() + seconds, 0
    kept = workers(server.pid)[0]
    async with httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT_S) as client:
        while time.monotonic() < ends:
            for worker in set(workers(server.pid)) - {kept}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            unready += (await client.get("/readyz")).status_code != httpx.codes.OK
            await asyncio.sleep(POLL_S)
    return unready


def _clients(misbehave: Callable[[Client, float], Awaitable[bool]], count: int) -> Strike:
    """Return a strike with `count` clients at once.

    misbehave: returns whether its client got the expected answer.
    """

    async def strike(server: Server, seconds: float) -> int:
        address = httpx.URL(server.url)
        clients = [Client(address.host, address.port or 80, number) for number in range(count)]
        return (await asyncio.gather(*(misbehave(client, seconds) for client in clients))).count(
            False
        )

    return strike


async def _leave_again_and_again(client: Client, seconds: float) -> bool:
    ends, moments = time.monotonic() + seconds, random.Random(client.number)
    while time.monotonic() < ends:
        await client.leave_after(moments.uniform(0, 0.3))
    return True


FAULTS = (
    Fault("nothing", _nothing),
    Fault("kill -9 of the worker", _kill_worker),
    Fault(f"worker stopped for {STALL_TIMEOUT_S / 2:g} s", _stop_worker_for(STALL_TIMEOUT_S / 2)),
    Fault(f"worker stopped for {2 * STALL_TIMEOUT_S:g} s", _stop_worker_for(2 * STALL_TIMEOUT_S)),
    Fault("idle worker stopped", _hang, idle=True),
    Fault("worker stopped while it loads", _hang_while_loading),
    Fault("API process of another server killed while its worker loads", _kill_api_while_loading),
    Fault("8 slow readers", _clients(Client.read_slowly, 8)),
    Fault("100 half-open connections", _clients(Client.stay_half_open, 100)),
    Fault("disconnect storm of 20 clients", _clients(_leave_again_and_again, 20)),
)
LOG_ON_FULL_DISK = Fault("log on a full disk", _nothing)
LOG_STALLED = Fault("log that nobody reads", _nothing)
ONE_DOWN = Fault("one of two workers down", _keep_one_down)

SETTINGS = {
    "PAELLERA_STALL_TIMEOUT_S": str(STALL_TIMEOUT_S),
    "PAELLERA_LOG_LEVEL": "error",
}
LOUD = SETTINGS | {"PAELLERA_LOG_LEVEL": "debug"}
TWO_WORKERS = SETTINGS | {"PAELLERA_DEVICES": "cpu,cpu", "PAELLERA_THREADS": "1"}


# ── the trial ─────────────────────────────────────────────────────────────────────────────────────


async def measure(options: argparse.Namespace) -> list[Outcome]:
    """Run most faults on one server; others need one whose log goes nowhere, or two workers.

    A stall is noticed after `STALL_TIMEOUT_S`. Raises ValueError if no fault has the name that is
    asked for.
    """
    with _unread_pipe() as pipe:
        plans: list[tuple[Mapping[str, str], Path | None, Sequence[Fault]]] = [
            (SETTINGS, None, FAULTS),
            (LOUD, FULL_DISK, [LOG_ON_FULL_DISK]),
            (LOUD, pipe, [LOG_STALLED]),
            (TWO_WORKERS, None, [ONE_DOWN]),
        ]
        outcomes: list[Outcome] = []
        for settings, output, faults in plans:
            if chosen := [fault for fault in faults if options.only in fault.name]:
                limit = {"PAELLERA_START_TIMEOUT_S": str(options.start_timeout)}
                with serving({**settings, **limit}, output=output) as server:
                    outcomes += await _measure(server, chosen, options)
    if not outcomes:
        raise ValueError(f"no fault under load has {options.only!r} in its name")
    return outcomes


@contextmanager
def _unread_pipe() -> Iterator[Path]:
    """Yield a pipe that holds one page and has a reader who never reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux's
                fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
            yield path
        finally:
            os.close(reader)


async def _measure(
    server: Server, faults: Sequence[Fault], options: argparse.Namespace
) -> list[Outcome]:
    sizes = server.sizes()
    kinds = kinds_of([sizes.side(scale) for scale in SCALES], STEP_COUNTS)
    trial = Trial(server, kinds, options.rate, options.seconds)
    await trial.warm_up()
    outcomes = []
    for fault in faults:
        outcomes.append(await trial.run(fault))
        print(outcomes[-1], file=sys.stderr, flush=True)
    return outcomes


@dataclass
class Trial:
    """One server, and the requests of `kinds` that arrive at every fault, `rate` a second.

    files: open in the API process when it is idle.
    """

    server: Server
    kinds: Sequence[Kind]
    rate: float
    seconds: float
    files: int = 0

    async def warm_up(self) -> None:
        """Send requests until the engine knows the cost of its steps."""
        async with open_client(self.server.url) as client:
            await Load(client).alone(generate_endpoint(self.server.url), self.kinds, repeats=1)
        self.files = await fewest_open_files(self.server.pid, 0, SETTLED_S)

    async def run(self, fault: Fault) -> Outcome:
        async with open_client(self.server.url) as client:
            await self._until_ready(client)
            before = await figures_when_idle(client)
            trace = poisson_trace(self.kinds, self.rate, self.seconds, seed=0)
            lost = await fault.strike(self.server, self.seconds) if fault.idle else 0
            arriving = asyncio.create_task(
                Load(client).open_loop(generate_endpoint(self.server.url), trace)
            )
            answers, lost_under_load, unready_s = await asyncio.gather(
                arriving, self._strike(fault), self._unready(client, arriving)
            )
            lost += lost_under_load
            await self._until_ready(client)
            after = await figures_when_idle(client)
        files = await fewest_open_files(self.server.pid, self.files, CLOSED_TIMEOUT_S)
        return Outcome(
            fault=fault.name,
            sent=len(answers),
            answered=sum(answer.status == httpx.codes.OK for answer in answers),
            refused=sum(answer.refused for answer in answers),
            lost_of_its_own=lost,
            restarts=int(after[RESTARTS] - before[RESTARTS]),
            replayed=int(after[REPLAYED] - before[REPLAYED]),
            files_left=max(0, files - self.files),
            unready_s=round(unready_s, 2),
            latency=quantiles([answer.seconds for answer in answers]),
        )

    async def _until_ready(self, client: httpx.AsyncClient) -> None:
        """Raises TimeoutError if that takes too long."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while (await client.get("/readyz")).status_code != httpx.codes.OK:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    async def _strike(self, fault: Fault) -> int:
        if fault.idle:
            return 0
        await asyncio.sleep(BEGINS * self.seconds)
        return await fault.strike(self.server, (ENDS - BEGINS) * self.seconds)

    async def _unready(
        self, client: httpx.AsyncClient, arriving: asyncio.Task[list[Answer]]
    ) -> float:
        """Return the seconds in which /readyz did not answer 200."""
        seconds, checked = 0.0, time.perf_counter()
        while not arriving.done():
            ready = (await client.get("/readyz")).status_code == httpx.codes.OK
            now = time.perf_counter()
            seconds += 0 if ready else now - checked
            checked = now
            await asyncio.sleep(POLL_S)
        return seconds


def table(outcomes: Sequence[Outcome], rate: float) -> Table:
    title = f"Faults while {rate:g} requests/s arrive"
    found = Table(title=title, title_justify="left")
    found.add_column("fault")
    for column in (
        "sent",
        "answered",
        "refused",
        "lost",
        "restarts",
        "replayed",
        "files left",
        "not ready s",
        "p50 ms",
        "p99 ms",
    ):
        found.add_column(column, justify="right")
    for o in outcomes:
        counts = (o.sent, o.answered, o.refused, o.lost, o.restarts, o.replayed, o.files_left)
        found.add_row(
            o.fault,
            *map(str, counts),
            f"{o.unready_s:.2f}",
            f"{o.latency['p50_ms']:.0f}",
            f"{o.latency['p99_ms']:.0f}",
        )
    return found
