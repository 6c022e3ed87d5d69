"""Send requests of mixed sizes and step counts: at given times, or as fast as they are answered.

Both servers of a comparison get the same requests at the same times. A latency counts from the time
at which the request was due, not from the time at which the client sent it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import httpx
import numpy as np

from load_tests.prompts import prompts

REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Kind:
    """The cost of a request: side × side pixels, denoised in `steps` steps."""

    side: int
    steps: int

    def __str__(self) -> str:
        return f"{self.side}x{self.side}, {self.steps} steps"


@dataclass(frozen=True, slots=True)
class Arrival:
    """at: seconds from the beginning of the trace."""

    at: float
    kind: Kind
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """refused: with an error that says when to come back."""

    kind: Kind
    status: int
    seconds: float
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load. url: where requests are posted to."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time. begin: on the performance counter."""

    begin: float
    seconds: float

    @property
    def end(self) -> float:
        return self.begin + self.seconds

    def share(self, began: float, ended: float) -> float:
        """Return the share of a span that lies within the window.

        Whole answers would mislead: a batch's answers all come at once, within the window or
        outside it.
        """
        return max(0.0, min(ended, self.end) - max(began, self.begin)) / (ended - began)


def refused_honestly(status: int, headers: Mapping[str, str]) -> bool:
    return (
        status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
        and "retry-after" in headers
    )


def kinds_of(sides: Sequence[int], step_counts: Sequence[int]) -> list[Kind]:
    return [Kind(side, steps) for side, steps in itertools.product(sides, step_counts)]


def generate_endpoint(url: str) -> Target:
    """Return the endpoint that generates images, of the server at the URL."""
    return Target("paellera", f"{url}/generate")


def open_client(url: str) -> httpx.AsyncClient:
    """Return a client of the server at the URL, with as many connections as it wants."""
    return httpx.AsyncClient(
        base_url=url, timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=None)
    )


def poisson_trace(kinds: Sequence[Kind], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Return arrivals at `rate` per second with exponential gaps, every kind as likely.

    The same arguments give the same arrivals.
    """
    random = np.random.default_rng(seed)
    # Twice as many as are expected, and some: the rest lies after the end.
    times = np.cumsum(random.exponential(1 / rate, int(2 * rate * seconds) + 20))
    chosen = random.integers(len(kinds), size=len(times))
    return [
        Arrival(float(at), kinds[i], n)
        for n, (at, i) in enumerate(zip(times, chosen, strict=True))
        if at < seconds
    ]


def slowdowns(answers: Sequence[Answer], alone: Mapping[Kind, float]) -> list[float]:
    """Return each answer's latency over that of the same request on an idle server."""
    return [answer.seconds / alone[answer.kind] for answer in answers]


class Load:
    """Send requests over one connection pool.

    Every prompt is new, so that no server answers from a cache. fields: added to every body.
    """

    def __init__(
        self, client: httpx.AsyncClient, fields: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        self._client, self._fields = client, fields
        self._prompts = prompts()

    async def one(self, target: Target, kind: Kind, seed: int) -> Answer:
        """Send a request and return its answer. Status 0 is a connection that broke."""
        size = {"width": kind.side, "height": kind.side, "num_inference_steps": kind.steps}
        body = {"prompt": next(self._prompts), "seed": seed, **size, **self._fields}
        began = time.perf_counter()
        try:
            answer = await self._client.post(target.url, json=body)
        except httpx.TransportError:
            return Answer(kind, 0, time.perf_counter() - began)
        refused = refused_honestly(answer.status_code, answer.headers)
        return Answer(kind, answer.status_code, time.perf_counter() - began, refused)

    async def alone(self, target: Target, kinds: Sequence[Kind], repeats: int) -> dict[Kind, float]:
        """Return the median seconds of one request at a time, by kind.

        One more of each kind goes first and is not counted.
        """
        seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
        for repeat, kind in itertools.product(range(repeats + 1), kinds):
            answer = await self.one(target, kind, seed=repeat)
            if repeat:
                seconds[kind].append(answer.seconds)
        return {kind: float(np.median(taken)) for kind, taken in seconds.items()}

    async def open_loop(self, target: Target, trace: Sequence[Arrival]) -> list[Answer]:
        """Send every request when it is due, and wait until all are answered."""
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._arrive(target, arrival, began)) for arrival in trace]
        return [task.result() for task in tasks]

    async def _arrive(self, target: Target, arrival: Arrival, began: float) -> Answer:
        await asyncio.sleep(began + arrival.at - time.perf_counter())
        late = time.perf_counter() - began - arrival.at
        answer = await self.one(target, arrival.kind, arrival.seed)
        return replace(answer, seconds=answer.seconds + late)

    async def saturate(
        self,
        target: Target,
        kinds: Sequence[Kind],
        clients: int,
        warm_up: float,
        seconds: float,
        seed: int,
    ) -> float:
        """Return the answers per second in `seconds` after the warm-up.

        clients: each sends its next request when the last is answered.
        """
        chosen = (
            kinds[i] for i in np.random.default_rng(seed).integers(len(kinds), size=1_000_000)
        )
        window = Window(time.perf_counter() + warm_up, seconds)
        done = await asyncio.gather(
            *(self._client_loop(target, chosen, window) for _ in range(clients))
        )
        return sum(done) / seconds

    async def _client_loop(self, target: Target, kinds: Iterator[Kind], window: Window) -> float:
        done = 0.0
        for seed in itertools.count():
            began = time.perf_counter()
            answer = await self.one(target, next(kinds), seed)
            now = time.perf_counter()
            done += window.share(began, now) * (answer.status == httpx.codes.OK)
            if now >= window.end:
                break
        return done
