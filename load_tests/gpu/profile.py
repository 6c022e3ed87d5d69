"""Profile every stage: the kernels that take longest, and the share of time the device idles."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from load_tests.gpu.batch import Batch
from load_tests.gpu.options import Options
from load_tests.gpu.results import Results
from load_tests.gpu.stages import release
from load_tests.gpu.timing import Stage, synchronise
from model.pipeline import Pipeline

_RUNS, _KERNELS = 5, 12


def run(options: Options, results: Results) -> None:
    for family in options.families:
        bundle = options.bundle(family)
        for rows in sorted({min(options.rows), min(8, max(options.rows))}):
            batch = Batch(Pipeline.of(bundle), rows, options.size(family))
            batch.record()
            for name, stage in batch.stages(options.steps[:1]).items():
                found = _profile(stage, options.device, _file(options, f"{family}-{rows}-{name}"))
                results.add({"family": family, "rows": rows, "stage": name, **found})
            release(options.device)


def _profile(stage: Stage, device: torch.device, file: Path | None) -> dict[str, Any]:
    """Return the profile of a stage.

    The profiler slows the host down: idle shares are upper bounds, times of kernels are not
    affected.
    """
    cuda = device.type == "cuda"
    for _ in range(2):
        stage()
    synchronise(device)
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ) as profiler:
        began = time.perf_counter()
        for _ in range(_RUNS):
            stage()
        synchronise(device)
        elapsed = time.perf_counter() - began
    averages = profiler.key_averages()
    kernels = [e for e in averages if (str(e.device_type) == "DeviceType.CUDA") == cuda]
    times = {
        e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3 / _RUNS
        for e in kernels
    }
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            averages.table(
                sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=40
            )
        )
    busy, longest = sum(times.values()), sorted(times, key=lambda key: -times[key])[:_KERNELS]
    return {
        "ms": round(elapsed * 1000 / _RUNS, 3),
        "busy_ms": round(busy, 3),
        "idle_share": round(1 - busy / (elapsed * 1000 / _RUNS), 3),
        "launches": sum(e.count for e in kernels) // _RUNS,
        "kernels_ms": {key[:100]: round(times[key], 4) for key in longest},
    }


def _file(options: Options, name: str) -> Path | None:
    return None if options.out is None else options.out / "profiles" / f"{name}.txt"
