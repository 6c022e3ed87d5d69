"""Break the server in every known way with requests in flight, and count lost requests.

    python -m load_tests.faults
    python -m load_tests.faults --under-load  # while requests keep arriving

It also measures the time until the server is ready again. A request is *lost* if it gets neither an
image nor the error that is meant for it (the poison request's own, say). Every second request is
deterministic, and its image must have the bytes that it had before the fault. Exits with 1
otherwise; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
from rich.table import Table

from load_tests import under_load
from load_tests.processes import workers
from load_tests.report import Report
from load_tests.serving import (
    PAELLERA,
    RUNNING,
    WAITING,
    Server,
    figures,
    figures_when_idle,
    serving,
)

INSTRUMENTED = ("-m", "load_tests.instrumented")
STALL_TIMEOUT_S = 4.0
PATIENCE_S = 600.0
POLL_S = 0.02
GONE = "gone"
REPLAYED, CANCELLED = "paella_requests_replayed_total", "paella_cancelled_total"
KEPT, REPEATS = "paella_idempotency_bytes", "paella_idempotent_repeats_total"
# Closing a socket with it resets the connection, as a client that dies does.
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to break the server.

    guilty: the prompt of one more request, which breaks the worker. meant: the error code for that
    request; None means an image. strike: the action on the server in place of a guilty request,
    once all requests are in flight. repeated: one more request has an Idempotency-Key; its client
    dies once the answer is ready, and repeats it.
    """

    name: str
    guilty: str | None = None
    meant: str | None = None
    strike: Callable[[Server], None] | None = None
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a request. code: of the error; status 0 is a connection that broke."""

    status: int
    code: str | None = None
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of the requests in flight.

    ready_after_s: seconds from the fault until /readyz answers 200 for good; 0 if it always did.
    """

    fault: str
    in_flight: int
    answered: int
    failed_as_meant: int
    same_bytes: bool
    replayed: int
    ready_after_s: float
    exit_code: int = 0

    @property
    def lost(self) -> int:
        return self.in_flight - self.answered - self.failed_as_meant

    @property
    def good(self) -> bool:
        return not self.lost and self.same_bytes and not self.exit_code


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every fault. Raises SystemExit with 1 if a request was lost or an image changed."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(sent)
    report = Report(
        "faults-under-load" if options.under_load else "faults",
        command=shlex.join(["python", "-m", "load_tests.faults", *sent]),
    )
    outcomes: Sequence[Outcome] | Sequence[under_load.Outcome]
    outcomes, table = _under_load(options) if options.under_load else _in_flight(options)
    report.add(table)
    good = all(outcome.good for outcome in outcomes)
    lost = sum(outcome.lost for outcome in outcomes)
    report.emit(
        {
            "faults": [asdict(outcome) | {"lost": outcome.lost} for outcome in outcomes],
            "lost": lost,
            "good": good,
        }
    )
    sys.exit(not good)


def _in_flight(options: argparse.Namespace) -> tuple[Sequence[Outcome], Table]:
    outcomes = asyncio.run(_run(options))
    return outcomes, _table(outcomes)


def _under_load(options: argparse.Namespace) -> tuple[Sequence[under_load.Outcome], Table]:
    outcomes = asyncio.run(under_load.measure(options))
    return outcomes, under_load.table(outcomes, options.rate)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.faults",
        description="What goes wrong, and who is answered; the last line is JSON.",
    )
    parser.add_argument(
        "--requests", type=int, default=8, help="in flight at every fault, 8 by default"
    )
    parser.add_argument(
        "--side", type=int, help="of their images in pixels, half the native width by default"
    )
    parser.add_argument("--steps", type=int, default=48, help="of each of them, 48 by default")
    parser.add_argument(
        "--under-load", action="store_true", help="other faults, while mixed requests keep arriving"
    )
    parser.add_argument(
        "--only", default="", help="under load: the faults whose name has this text in it"
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=30,
        help="under load: seconds after which a worker that loads is replaced; several times what"
        " a start takes on this machine, 30 by default",
    )
    parser.add_argument("--rate", type=float, default=8, help="of those, per second, 8 by default")
    parser.add_argument(
        "--seconds",
        type=float,
        default=15,
        help="in which they arrive at each fault, 15 by default",
    )
    return parser.parse_args(arguments)


def _kill_worker(server: Server) -> None:
    os.kill(workers(server.pid)[0], signal.SIGKILL)


def _terminate(server: Server) -> None:
    os.kill(server.pid, signal.SIGTERM)


FAULTS = (
    Fault("nothing"),
    Fault("kill -9 of the worker", strike=_kill_worker),
    Fault("exception in a step", guilty="bug", meant="internal"),
    Fault("out of memory", guilty="memory", meant="out_of_memory"),
    Fault("out of memory unless alone", guilty="memory-crowd"),
    Fault("device error", guilty="accelerator-once"),
    Fault("hang", guilty="hang-once"),
    Fault("poison: kills every worker", guilty="kill", meant="poison"),
    Fault("client gone", guilty="leave", meant=GONE),
    Fault("client dies, its answer ready, and repeats", repeated=True),
)
STOPPED = Fault("SIGTERM of the server", strike=_terminate)


async def _run(options: argparse.Namespace) -> list[Outcome]:
    """Run all faults on one server, then send SIGTERM to `paellera serve` itself."""
    settings = {
        "PAELLERA_STALL_TIMEOUT_S": str(STALL_TIMEOUT_S),
        "PAELLERA_START_WAIT_S": str(PATIENCE_S),
    }
    quiet = settings | {"PAELLERA_LOG_LEVEL": "error", "PAELLERA_DRAIN_TIMEOUT_S": str(PATIENCE_S)}
    with serving(quiet, INSTRUMENTED) as server:
        options.side = options.side or server.sizes().side(0.5)
        bodies = [
            request(f"a red ball, number {seed}", seed, options) for seed in range(options.requests)
        ]
        trial = Trial(server, bodies, await _references(server, bodies))
        outcomes = [await trial.run(fault) for fault in FAULTS]
    with serving(quiet, PAELLERA) as server:
        last = await replace(trial, server=server).run(STOPPED)
        return [
            *outcomes,
            replace(last, exit_code=await asyncio.to_thread(server.process.wait, PATIENCE_S)),
        ]


def request(prompt: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return a JSON body; every second one is deterministic."""
    size = {"width": options.side, "height": options.side, "num_inference_steps": options.steps}
    return {
        "prompt": prompt,
        "seed": seed,
        "deterministic": seed % 2 == 0,
        "timeout_s": PATIENCE_S,
        **size,
    }


async def _references(server: Server, bodies: Sequence[Mapping[str, Any]]) -> dict[int, bytes]:
    """Return the deterministic images by seed, requested one by one before any fault."""
    async with _client(server) as client:
        return {
            body["seed"]: (await _ask(client, body)).content
            for body in bodies
            if body["deterministic"]
        }


def _client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.url, timeout=PATIENCE_S + 30, limits=httpx.Limits(max_connections=None)
    )


async def _ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Result:
    try:
        answer = await client.post("/generate", json=body)
    except httpx.TransportError:
        return Result(0)
    if answer.status_code == httpx.codes.OK:
        return Result(answer.status_code, content=answer.content)
    return Result(answer.status_code, answer.json()["error"]["code"])


@dataclass
class Trial:
    """One server, and the requests that are in flight at every fault.

    references: the expected images of the deterministic requests, by seed.
    """

    server: Server
    bodies: list[dict[str, Any]]
    references: dict[int, bytes]

    async def run(self, fault: Fault) -> Outcome:
        """Run one fault. Raises RuntimeError if the requests are answered before the fault."""
        async with _client(self.server) as client:
            before = await figures(client)
            flying = [asyncio.create_task(_ask(client, body)) for body in self.bodies]
            await self._until_all_fly(client, flying)
            guilty = await self._strike(fault, client, flying)
            watch = asyncio.create_task(self._ready_after(client, fault))
            results = await asyncio.gather(*flying)
            answered = sum(result.status == httpx.codes.OK for result in results)
            as_meant = guilty is not None and await self._as_meant(fault, guilty, client, before)
            after = before if fault is STOPPED else await figures(client)
            return Outcome(
                fault=fault.name,
                in_flight=len(flying) + (guilty is not None),
                answered=answered + (as_meant and fault.meant is None),
                failed_as_meant=int(as_meant and fault.meant is not None),
                same_bytes=all(
                    self._same(body, result)
                    for body, result in zip(self.bodies, results, strict=True)
                ),
                replayed=int(after[REPLAYED] - before[REPLAYED]),
                ready_after_s=await watch,
            )

    async def _until_all_fly(
        self, client: httpx.AsyncClient, flying: Sequence[asyncio.Task[Result]]
    ) -> None:
        while True:
            now = await figures(client)
            if any(task.done() for task in flying):
                raise RuntimeError(
                    "a request was through before all had begun: --steps must be more"
                )
            if now[RUNNING] and now[RUNNING] + now[WAITING] >= len(flying):
                return
            await asyncio.sleep(POLL_S)

    async def _strike(
        self, fault: Fault, client: httpx.AsyncClient, flying: Sequence[asyncio.Task[Result]]
    ) -> asyncio.Task[Result] | None:
        """Cause the fault.

        A guilty request is sent and returned; it causes the fault in its second step.
        """
        if fault.strike:
            fault.strike(self.server)
        if fault.repeated:
            return asyncio.create_task(self._die_and_repeat(client))
        if fault.guilty is None:
            return None
        body = {**self.bodies[-1], "prompt": fault.guilty, "deterministic": False}
        guilty = asyncio.create_task(_ask(client, body))
        if fault.meant == GONE:
            await self._until_all_fly(client, [*flying, guilty])
            guilty.cancel()
        return guilty

    async def _until_kept(self, client: httpx.AsyncClient, before: float) -> None:
        """Wait until one more answer is kept for a repeat."""
        while True:
            if (await figures(client))[KEPT] > before:
                return
            await asyncio.sleep(POLL_S)

    async def _die_and_repeat(self, client: httpx.AsyncClient) -> Result:
        """Let a client die before it reads its answer; return what its repeat gets.

        The repeat must get the reference's bytes, without a second drawing.
        """
        body = next(body for body in self.bodies if body["deterministic"])
        before = await figures(client)
        request = client.build_request(
            "POST", "/generate", json=body, headers={"Idempotency-Key": uuid.uuid4().hex}
        )
        _, writer = await asyncio.open_connection(request.url.host, request.url.port)
        head = [f"POST {request.url.path} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in request.headers.items()]
        writer.write("\r\n".join([*head, "", ""]).encode() + request.content)
        await self._until_kept(client, before[KEPT])
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.close()
        answer = await client.send(request)
        repeats = (await figures(client))[REPEATS] - before[REPEATS]
        if answer.headers.get("idempotent-replayed") != "true" or repeats != 1:
            return Result(answer.status_code, "drawn_twice")
        if answer.content != self.references[body["seed"]]:
            return Result(answer.status_code, "other_bytes")
        return Result(answer.status_code, content=answer.content)

    async def _as_meant(
        self,
        fault: Fault,
        guilty: asyncio.Task[Result],
        client: httpx.AsyncClient,
        before: Mapping[str, float],
    ) -> bool:
        """Return whether the guilty request got its error, or its image.

        For a client that left: whether its row was removed.
        """
        if fault.meant == GONE:
            await asyncio.wait([guilty])
            now = await figures_when_idle(client)
            return now[CANCELLED] - before[CANCELLED] == 1
        result = await guilty
        return result.code == fault.meant and (
            fault.meant is not None or result.status == httpx.codes.OK
        )

    async def _ready_after(self, client: httpx.AsyncClient, fault: Fault) -> float:
        """Poll until the server has been ready for longer than a stall can go unnoticed."""
        struck = ready_at = time.perf_counter()
        while fault is not STOPPED and time.perf_counter() - ready_at < 2 * STALL_TIMEOUT_S:
            ready = (await client.get("/readyz")).status_code == httpx.codes.OK
            if not ready:
                ready_at = time.perf_counter()
            await asyncio.sleep(POLL_S)
        return round(ready_at - struck, 2)

    def _same(self, body: Mapping[str, Any], result: Result) -> bool:
        return not body["deterministic"] or result.content == self.references[body["seed"]]


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="Faults with requests in flight", title_justify="left")
    table.add_column("fault")
    for column in (
        "in flight",
        "answered",
        "failed as meant",
        "lost",
        "same bytes",
        "replayed",
        "ready after s",
    ):
        table.add_column(column, justify="right")
    for o in outcomes:
        counts = (o.in_flight, o.answered, o.failed_as_meant, o.lost)
        ready = f"exit code {o.exit_code}" if o.fault == STOPPED.name else f"{o.ready_after_s:.2f}"
        table.add_row(
            o.fault, *map(str, counts), "yes" if o.same_bytes else "NO", str(o.replayed), ready
        )
    return table


if __name__ == "__main__":
    main()
