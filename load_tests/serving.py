"""A real `paellera serve` in a child process, for load tests: start it, wait until it is ready, ask it things, stop it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was ready `start_to_ready_s` after its process began."""

    url: str
    pid: int
    start_to_ready_s: float

    def peak_memory_mib(self) -> dict[str, list[float]]:
        """Largest resident memory so far of the API process and of each of its children; empty lists elsewhere than on Linux."""
        return {"api": _peaks([self.pid]), "children": _peaks(_children(self.pid))}


@contextmanager
def serving(settings: Mapping[str, str]) -> Iterator[Server]:
    """A server on a free loopback port with this environment's settings and these on top (`{"PAELLERA_WEIGHTS": "tiny"}`).

    Raises RuntimeError if it exits before it is ready, TimeoutError if it is not ready within `READY_TIMEOUT_S`.
    """
    port = _free_port()
    began = time.perf_counter()
    command = [sys.executable, "-m", "server.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PAELLERA_LOG_LEVEL": "warning", **settings})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url)
        yield Server(url, process.pid, time.perf_counter() - began)
    finally:
        _stop(process)


def server_timing_ms(response: httpx.Response) -> dict[str, float]:
    """The `Server-Timing` header: milliseconds by stage."""
    entries = (entry.strip().partition(";dur=") for entry in response.headers.get("server-timing", "").split(",") if entry.strip())
    return {stage: float(duration) for stage, _, duration in entries}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=5) as client:
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                raise RuntimeError(f"the server exited with code {code} before it was ready")
            if _ready(client):
                return
            time.sleep(_POLL_S)
    raise TimeoutError(f"the server was not ready within {READY_TIMEOUT_S:g} s")


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for path in lists for child in path.read_text().split())


def _peaks(pids: list[int]) -> list[float]:
    found = (_status_kib(pid, "VmHWM") for pid in pids)
    return [round(kib / 1024, 1) for kib in found if kib is not None]


def _status_kib(pid: int, key: str) -> int | None:
    path = Path(f"/proc/{pid}/status")
    if not path.exists():
        return None
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{key}:")), None)
