"""Measure the real server process on random weights over HTTP: one client, then rising arrivals.

The arrivals are shares of the saturated rate. It also checks that images are the same alone and
together, and that no graph was recorded after the server was ready.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx

from load_tests.gpu.options import Options
from load_tests.gpu.results import Results
from load_tests.gpu.weights import Family, written
from load_tests.report import quantiles
from load_tests.serving import Server, figures_when_idle, serving
from load_tests.traffic import REQUEST_TIMEOUT_S, Kind, Load, generate_endpoint, poisson_trace

LOADS = (0.5, 0.8, 0.95)
_SEEDS = 16


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of each load, shares of the saturated rate, and the numbers of compared images."""

    warm_up: float
    saturated: float
    arrivals: float
    loads: tuple[float, ...]
    seeds: int

    @classmethod
    def of(cls, options: Options) -> Durations:
        if options.micro:
            return cls(warm_up=0.2, saturated=0.5, arrivals=0.5, loads=LOADS, seeds=_SEEDS)
        if options.quick:
            return cls(warm_up=1.0, saturated=4.0, arrivals=5.0, loads=(0.5, 0.8), seeds=8)
        return cls(warm_up=4.0, saturated=12.0, arrivals=20.0, loads=LOADS, seeds=_SEEDS)


def run(options: Options, results: Results) -> None:
    for family in options.families:
        with written(options.config(family), options.device, options.dtype, options.room) as bundle:
            settings = {
                "PAELLERA_WEIGHTS": str(bundle),
                "PAELLERA_DEVICE": options.device.type,
                "PAELLERA_DTYPE": str(options.dtype).removeprefix("torch."),
                "PAELLERA_KERNELS": options.kernels,
                "PAELLERA_MAX_BATCH_ROWS": str(max(options.rows)),
                "PAELLERA_MAX_REQUEST_WORK": str(10**10),
                "PAELLERA_STALL_TIMEOUT_S": "120",
            }
            with serving(settings) as server:
                asyncio.run(_Served(server, family, options, results).run())


class _Served:
    def __init__(self, server: Server, family: Family, options: Options, results: Results) -> None:
        self.server, self.options = server, options
        self.results, self.family = results, family
        self.durations = Durations.of(options)
        self.target = generate_endpoint(server.url)
        self.kind = Kind(options.size(family)[0], options.steps[-1])

    async def run(self) -> None:
        self._add("ready", {"after_s": round(self.server.start_to_ready_s, 1)})
        async with httpx.AsyncClient(
            base_url=self.server.url,
            timeout=REQUEST_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None),
        ) as client:
            load = Load(client)
            await self._alone(load)
            rate = await self._saturate(load)
            for share in self.durations.loads:
                await self._arrivals(load, share, rate)
            await self._agreement(client)
            figures = await figures_when_idle(client)
        kept = {
            name: value
            for name, value in figures.items()
            if name.startswith(("paella_graph", "paella_worker_restarts"))
        }
        self._add("counters", {name.removeprefix("paella_"): value for name, value in kept.items()})
        peaks = self.server.peak_memory_mib()
        self._add("memory", {name: max(values, default=0.0) for name, values in peaks.items()})

    def _add(self, what: str, row: dict[str, Any]) -> None:
        self.results.add({"family": self.family, "what": what, **row})

    async def _alone(self, load: Load) -> None:
        answers = [
            await load.one(self.target, self.kind, seed)
            for seed in range(self.options.budget.runs + 1)
        ]
        self._add(
            "one client",
            {"kind": str(self.kind), **quantiles([answer.seconds for answer in answers[1:]])},
        )

    async def _saturate(self, load: Load) -> float:
        warm_up, seconds = self.durations.warm_up, self.durations.saturated
        clients = 3 * max(self.options.rows)
        rate = await load.saturate(self.target, [self.kind], clients, warm_up, seconds, seed=0)
        self._add("saturated", {"clients": clients, "pictures_per_s": round(rate, 3)})
        return rate

    async def _arrivals(self, load: Load, share: float, rate: float) -> None:
        trace = poisson_trace([self.kind], max(share * rate, 1.0), self.durations.arrivals, seed=1)
        answers = await load.open_loop(self.target, trace)
        good = [answer.seconds for answer in answers if answer.status == httpx.codes.OK]
        lost = len(answers) - len(good)
        self._add(
            f"arrivals at {share:.0%}",
            {"per_s": round(share * rate, 3), "not_200": lost, **(quantiles(good) if good else {})},
        )

    async def _agreement(self, client: httpx.AsyncClient) -> None:
        """Compare images alone with sixteen at once.

        It records how many have the same pixels, and whether all deterministic ones do.
        """
        for deterministic in (False, True):
            alone = [
                await self._pixels(client, seed, deterministic)
                for seed in range(self.durations.seeds)
            ]
            together = await asyncio.gather(
                *(self._pixels(client, seed, deterministic) for seed in range(self.durations.seeds))
            )
            same = sum(one == other for one, other in zip(alone, together, strict=True))
            self._add(
                "alone and together",
                {"deterministic": deterministic, "pictures": self.durations.seeds, "same": same},
            )

    async def _pixels(self, client: httpx.AsyncClient, seed: int, deterministic: bool) -> bytes:
        body = {
            "prompt": "a red ball on a table",
            "seed": seed,
            "num_inference_steps": self.kind.steps,
            "deterministic": deterministic,
        }
        answer = (await client.post("/generate", json=body)).raise_for_status()
        return answer.content
