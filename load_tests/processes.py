"""What /proc says about processes: memory, open files, threads, children, CPU time. Elsewhere
than on Linux there is nothing to be said.
"""

from __future__ import annotations

import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    return [pid] + [member for child in children(pid) for member in family(child)]


def children(pid: int) -> list[int]:
    return sorted(
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in _read(str(path)).split()
    )


def workers(pid: int) -> list[int]:
    """Those of a server's children that are its workers."""
    mark = b"server.engine.worker_process"
    return [child for child in children(pid) if mark in _read(f"/proc/{child}/cmdline")]


def runs(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    state = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return bool(state) and state[0] != b"Z"


def resident_mib(pid: int, *, peak: bool = False) -> float | None:
    """Resident memory now, or at its largest; None for a process that is not there."""
    kib = _status(pid, "VmHWM" if peak else "VmRSS")
    return None if kib is None else round(kib / 1024, 2)


def threads(pid: int) -> int | None:
    return _status(pid, "Threads")


def open_files(pid: int) -> int | None:
    directory = Path(f"/proc/{pid}/fd")
    return len(list(directory.iterdir())) if directory.exists() else None


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """Time that all cores together have worked, for whomever; 0 where there is no /proc."""
    times = [int(time) for time in _read("/proc/stat").split(b"\n", 1)[0].split()[1:9]]
    # The fourth and fifth are those of doing nothing and of waiting for a disk.
    return (sum(times) - sum(times[3:5])) / os.sysconf("SC_CLK_TCK")


def _status(pid: int, key: str) -> int | None:
    lines = _read(f"/proc/{pid}/status").decode().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _read(path: str) -> bytes:
    """Nothing if there is no such file, or not any more."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
