"""What this process has of the machine: memory, processor time, memory of its device."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from server.engine.protocol import Usage

STATM = Path("/proc/self/statm")


def usage(device: torch.device) -> Usage:
    return Usage(_resident_bytes(), time.process_time(), torch.get_num_threads(), _device_bytes(device) if device.type == "cuda" else {})


def _resident_bytes() -> int:
    """Where the system does not tell, the most it ever was."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_bytes(device: torch.device) -> dict[str, int]:
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }
