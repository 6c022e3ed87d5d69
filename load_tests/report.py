"""Report a load test: tables for people, then one line of JSON for programs.

    report = Report("bench", command="paellera bench --repeats 3")
    report.add(table)
    report.emit({"stages": …})

The JSON holds the machine and the versions that the test ran on.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

# What decides how fast a CPU multiplies matrices.
_CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)
_FILE_WIDTH = 120
_PACKAGES = (
    "paellera",
    "torch",
    "numpy",
    "transformers",
    "open_clip_torch",
    "safetensors",
    "fastapi",
    "uvicorn",
    "pillow",
)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return count, median, 95th and 99th percentile, in milliseconds.

    Raises IndexError without measurements.
    """
    p50, p95, p99 = np.quantile(seconds, (0.5, 0.95, 0.99)) * 1000
    return {
        "n": len(seconds),
        "p50_ms": round(float(p50), 3),
        "p95_ms": round(float(p95), 3),
        "p99_ms": round(float(p99), 3),
    }


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, at 95 % by default; (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    middle = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def hardware() -> dict[str, Any]:
    """Return CPU, memory and GPUs, and the machine's load before the measurement."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def usable_cores() -> int:
    """Return the number of cores that this process may run on, or of all if that is unknown."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty except on Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False)
    return listing.stdout.splitlines() if listing.returncode == 0 else []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "os": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class Report:
    """One run of a load test.

    The machine's load average is read at its start, so that it is not the run's own.
    """

    name: str
    command: str
    tables: list[Table] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    hardware: dict[str, Any] = field(default_factory=hardware)

    def add(self, table: Table) -> None:
        self.tables.append(table)

    def emit(self, measurements: dict[str, Any], *, json_only: bool = False) -> None:
        """Print the tables and, as the last line of standard output, everything as JSON."""
        if not json_only:
            console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _FILE_WIDTH)
            for table in self.tables:
                console.print(table)
        run = {
            "report": self.name,
            "date": self.date,
            "command": self.command,
            "hardware": self.hardware,
            "versions": versions(),
        }
        print(json.dumps(run | measurements), flush=True)
