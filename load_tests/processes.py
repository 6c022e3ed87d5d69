"""Read memory, open files, threads, children and CPU time of processes from /proc (Linux)."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

_POLL_S = 0.05


def family(pid: int) -> list[int]:
    """Return a process, its children, theirs, and so on."""
    return [pid] + [member for child in children(pid) for member in family(child)]


def children(pid: int) -> list[int]:
    return sorted(
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in _read(str(path)).split()
    )


def workers(pid: int) -> list[int]:
    """Return those of a server's children that are its workers."""
    mark = b"server.engine.child"
    return [child for child in children(pid) if mark in _read(f"/proc/{child}/cmdline")]


def runs(pid: int) -> bool:
    """Return whether a process is there, and not only its exit code."""
    state = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return bool(state) and state[0] != b"Z"


def resident_mib(pid: int, *, peak: bool = False) -> float | None:
    """Return resident memory now, or at its largest; None for a process that is not there."""
    kib = _status(pid, "VmHWM" if peak else "VmRSS")
    return None if kib is None else round(kib / 1024, 2)


def threads(pid: int) -> int | None:
    return _status(pid, "Threads")


def open_files(pid: int) -> int | None:
    directory = Path(f"/proc/{pid}/fd")
    return len(list(directory.iterdir())) if directory.exists() else None


async def fewest_open_files(pid: int, enough: int, seconds: float) -> int:
    """Return the fewest open files of a process within `seconds`.

    It stops at `enough`: a server closes connections a moment after their answers.
    """
    ends, fewest = time.monotonic() + seconds, sys.maxsize
    while time.monotonic() < ends and fewest > enough:
        fewest = min(fewest, open_files(pid) or 0)
        await asyncio.sleep(_POLL_S)
    return fewest


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and of its children that have ended."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """Return the time that all cores together have worked; 0 where there is no /proc."""
    times = [int(time) for time in _read("/proc/stat").split(b"\n", 1)[0].split()[1:9]]
    # The fourth and fifth are those of doing nothing and of waiting for a disk.
    return (sum(times) - sum(times[3:5])) / os.sysconf("SC_CLK_TCK")


def _status(pid: int, key: str) -> int | None:
    lines = _read(f"/proc/{pid}/status").decode().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _read(path: str) -> bytes:
    """Return the content, nothing if there is no such file, or not any more."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
