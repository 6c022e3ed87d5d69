"""Run a real server in a child process: start it, wait until it is ready, watch it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from load_tests.processes import children, cpu_seconds, family, machine_cpu_seconds, resident_mib

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 60.0
RUNNING, WAITING = "paella_rows_running", "paella_queue_depth"
RESTARTS = "paella_worker_restarts_total"
_POLL_S = 0.05


PAELLERA = ("-m", "server.cli", "serve", "--host", "127.0.0.1")


def finds_compiled() -> bool:
    """Return whether a server with this process's settings finds its weights' compiled networks."""
    from model.compiled.use import directory_of, has_programs
    from model.config import BundleConfig, find_bundle
    from model.runtime import pick_device, pick_dtype
    from server.engine.loading import compiled_root
    from server.settings import Settings

    settings = Settings()
    config = BundleConfig.read(find_bundle(settings.bundles[0]))
    dtype = pick_dtype(settings.dtype, pick_device(settings.device))
    found = has_programs(directory_of(config, dtype, compiled_root(settings)))
    return settings.compiled and found


@dataclass(frozen=True, slots=True)
class Sizes:
    """Image sizes of a server's default model, all in pixels.

    native: (width, height). step: widths and heights are multiples of it. low, high: bounds of a
    side.
    """

    native: tuple[int, int]
    step: int
    low: int
    high: int

    @classmethod
    def of(cls, url: str) -> Sizes:
        """Return the sizes of a server's default model. Raises httpx.HTTPStatusError."""
        model = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]
        width, height = model["native_size"]
        limits = model["limits"]
        return cls((width, height), limits["size_step"], limits["min_side"], limits["max_side"])

    def side(self, scale: float) -> int:
        """Return the possible side closest to the native width times `scale`."""
        steps = round(scale * self.native[0] / self.step)
        return min(max(steps * self.step, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Server:
    """A server in a process group of its own.

    start_to_ready_s: seconds from its process's start until it was ready.
    """

    url: str
    process: subprocess.Popen[bytes]
    start_to_ready_s: float

    @property
    def pid(self) -> int:
        return self.process.pid

    def peak_memory_mib(self) -> dict[str, list[float]]:
        """Return the largest resident memory of the API process and of each of its children.

        The lists are empty except on Linux.
        """
        return {"api": _peaks([self.pid]), "children": _peaks(children(self.pid))}

    def sizes(self) -> Sizes:
        """Return the sizes of the default model. Raises httpx.HTTPStatusError."""
        return Sizes.of(self.url)

    def cpu_seconds(self) -> float:
        return sum(map(cpu_seconds, family(self.pid)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all of its processes for this context, so that another server can be measured."""
        os.killpg(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGCONT)


class Others:
    """The load on the machine, from now on, of other processes than this one and its servers."""

    def __init__(self, *servers: Server) -> None:
        self._servers = servers
        self._began, self._before = time.perf_counter(), self._cpu_seconds()

    def share(self) -> float:
        """Return the load as a share of what all cores could have done."""
        could = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        return round((self._cpu_seconds() - self._before) / could, 3)

    def _cpu_seconds(self) -> float:
        return (
            machine_cpu_seconds()
            - time.process_time()
            - sum(server.cpu_seconds() for server in self._servers)
        )


@contextmanager
def serving(
    settings: Mapping[str, str],
    command: Sequence[str] = PAELLERA,
    ready: str = "/readyz",
    output: Path | None = None,
) -> Iterator[Server]:
    """Run a server on a free loopback port for this context, and yield it once it is ready.

    settings: environment variables on top of those of this process (`{"PAELLERA_WEIGHTS":
    "tiny"}`). command: Python's arguments, to which `--port N` is added. ready: the path that
    answers 200 once it serves. output: a file for its standard output and standard error, in place
    of ours.

    Raises RuntimeError if it exits before it is ready, TimeoutError if it is not ready within
    `READY_TIMEOUT_S`.
    """
    began = time.perf_counter()
    with launched(settings, command, output) as (process, url):
        wait_until_ready(process, url + ready)
        yield Server(url, process, time.perf_counter() - began)


@contextmanager
def launched(
    settings: Mapping[str, str], command: Sequence[str] = PAELLERA, output: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server as `serving` does; yield its process and address, perhaps not open yet."""
    port = free_port()
    arguments = [sys.executable, *command, "--port", str(port)]
    environment = {**os.environ, "PAELLERA_LOG_LEVEL": "warning", **settings}
    with output.open("wb") if output else contextlib.nullcontext() as file:
        process = subprocess.Popen(
            arguments, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def server_timing_ms(response: httpx.Response) -> dict[str, float]:
    """Return the `Server-Timing` header: milliseconds by stage."""
    entries = (
        entry.strip().partition(";dur=")
        for entry in response.headers.get("server-timing", "").split(",")
        if entry.strip()
    )
    return {stage: float(duration) for stage, _, duration in entries}


async def figures(client: httpx.AsyncClient) -> Counter[str]:
    """Return the figures of /metrics, summed over labels; a missing one is 0.

    Raises httpx.HTTPStatusError.
    """
    answer = (await client.get("/metrics")).raise_for_status()
    sums: Counter[str] = Counter()
    for metric in text_string_to_metric_families(answer.text):
        for sample in metric.samples:
            sums[sample.name] += sample.value  # type: ignore[assignment]
    return sums


async def figures_when_idle(client: httpx.AsyncClient) -> Counter[str]:
    """Return the figures once no row is running or waiting. Raises TimeoutError if rows remain."""
    async with asyncio.timeout(IDLE_TIMEOUT_S):
        while True:
            now = await figures(client)
            if not now[RUNNING] + now[WAITING]:
                return now
            await asyncio.sleep(_POLL_S)


def free_port() -> int:
    """Return a port of the loopback for a server that this process starts.

    On Linux it stays bound until this process ends: the kernel chooses it for no other socket, and
    a server may listen on it all the same.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    if sys.platform == "linux":
        holder.detach()
    holder.close()
    return port


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the server is ready. Raises the errors of `serving`."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(timeout=5) as client:
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                raise RuntimeError(f"the server exited with code {code} before it was ready")
            if _ready(client, url):
                return
            time.sleep(_POLL_S)
    raise TimeoutError(f"the server was not ready within {READY_TIMEOUT_S:g} s")


def _ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Whatever it left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _peaks(pids: list[int]) -> list[float]:
    found = (resident_mib(pid, peak=True) for pid in pids)
    return [mib for mib in found if mib is not None]
