"""Set the environment of OpenMP, PyTorch and the allocator for computing on a CPU."""

from __future__ import annotations

import ctypes.util
import functools
import os
import sys

# OpenMP's spin count, measured: a smaller one slows an undisturbed step, a larger one a disturbed
# step (docs/log.md).
SPIN_COUNT = 10_000
# Entries of PyTorch's cache of CPU kernels, each for one shape and up to megabytes large. Its
# default, 1024, took 600 MiB after 130 image sizes; few entries made no step slower (docs/log.md).
KERNEL_CACHE_ENTRIES = 16


def limit_spin_count() -> None:
    """Let waiting OpenMP threads sleep sooner; call it before torch is imported.

    By default they spin for longer than the kernel lets another process compute, and take the cores
    from the threads that they wait for. The environment's own settings take precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def limit_kernel_cache() -> None:
    """Bound PyTorch's cache of CPU kernels; call it before torch computes.

    The environment's own setting takes precedence.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNEL_CACHE_ENTRIES))


@functools.cache
def faster_allocator() -> str | None:
    """Return the name of tcmalloc's library, by which the loader finds it; None if not installed.

    A step on a CPU takes a third less time with it than with glibc's malloc (docs/log.md).
    """
    if sys.platform != "linux":
        return None
    for name in ("tcmalloc_minimal", "tcmalloc"):
        if found := ctypes.util.find_library(name):
            return found
    return None


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: this process's, and tcmalloc preloaded if installed.

    An allocator must be there before a process begins, so the worker cannot choose it by itself.
    The environment's own `LD_PRELOAD` takes precedence, an empty one too.
    """
    environment = dict(os.environ)
    if "LD_PRELOAD" not in environment and (allocator := faster_allocator()):
        environment["LD_PRELOAD"] = allocator
        # It would write a line to the log, not in the log's format, for each large tensor.
        environment.setdefault("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD", str(1 << 62))
    return environment
