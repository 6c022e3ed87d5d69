"""What /proc says about processes: memory, open files, threads, children, CPU time. Elsewhere than on Linux there is nothing to be said."""

from __future__ import annotations

import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    return [pid] + [member for child in children(pid) for member in family(child)]


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for path in lists for child in path.read_text().split())


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
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """Time that all cores together have worked, for whomever; 0 where there is no /proc."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _iowait, *interrupts_and_stolen = map(int, path.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def _status(pid: int, key: str) -> int | None:
    path = Path(f"/proc/{pid}/status")
    if not path.exists():
        return None
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{key}:")), None)
