"""Measure one image: stages in this process, the published code on the same weights, then HTTP.

    python -m load_tests.bench --steps 8,12 --repeats 20 --requests 20      # or: paellera bench …
    python -m load_tests.bench --repeats 3 --requests 3 --no-transcription  # quick
    python -m load_tests.bench --preset fast         # a preset beside quality, in its own steps

The `PAELLERA_*` variables apply here as they do to the server (weights, device, dtype, threads),
and so does tcmalloc, where it is installed.
The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import torch
from rich.table import Table

from load_tests.prompts import prompts
from load_tests.report import Report, quantiles
from load_tests.serving import server_timing_ms, serving
from load_tests.stages import Stage, Workload, ceiling, flops, measure
from model.bundle import of_preset
from model.compiled.use import use_compiled
from model.config import QUALITY
from model.pipeline import Pipeline, PipelineV3
from model.runtime import prepare
from server.engine.cpu_environment import worker_environment
from server.engine.loading import load_pipeline, load_plain
from server.settings import Settings

WARM_UP = 2


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m load_tests.bench"
) -> None:
    """Run the benchmark and print its report.

    Raises SystemExit for bad arguments, and the errors of loading the bundle.
    """
    options, sent = _parse(arguments, program)
    report = Report("bench", command=shlex.join([*program.split(), *sent]))
    settings = Settings(weights=options.weights) if options.weights else Settings()
    prepare(settings.threads)
    pipeline = load_pipeline(settings.bundles[0], settings)
    if not isinstance(pipeline, PipelineV3):
        raise ValueError(
            f"weights: {pipeline.config.name} is of the v1 family, and the sampler that "
            f"is transcribed here is v3's"
        )
    _check_presets(pipeline, options.preset)
    plain = load_plain(settings.bundles[0], settings) if pipeline.compiled else pipeline
    assert isinstance(plain, PipelineV3)
    measured = _describe(pipeline) | _measure_stages(pipeline, plain, options)
    report.add(_stage_table(measured["stages"]))
    if options.requests > 0:
        asked = _requests(options.steps, options.preset)
        measured["http"] = _measure_http(settings.bundles[0], asked, options.requests)
        measured["overhead_ms"] = _overheads(measured["http"], measured["stages"])
        report.add(_http_table(measured["http"], measured["overhead_ms"]))
    report.emit(measured, json_only=options.json_only)


def begin_as_a_worker() -> None:
    """Run this command anew in a worker's environment, unless it is in one.

    The memory allocator decides a fifth of a step's time, and must be there from the beginning.
    """
    environment = worker_environment()
    if environment != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, environment)


def _parse(arguments: Sequence[str] | None, program: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the arguments that they were parsed from."""
    parser = argparse.ArgumentParser(
        prog=program, description="Latency of one image; the last line of output is JSON."
    )
    parser.add_argument("--weights", help="bundle name or path; default: that of the settings")
    parser.add_argument(
        "--steps", type=_step_counts, default=(8, 12), help="denoising step counts, 8,12 by default"
    )
    parser.add_argument(
        "--repeats", type=_positive, default=20, help="rounds over all stages, 20 by default"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=20,
        help="HTTP requests per step count, 20 by default; 0 starts no server",
    )
    parser.add_argument(
        "--no-transcription",
        dest="transcription",
        action="store_false",
        help="leave the published code out",
    )
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        help="a preset to measure beside quality; may be repeated",
    )
    parser.add_argument("--json-only", action="store_true", help="no tables")
    sent = list(sys.argv[1:] if arguments is None else arguments)
    return parser.parse_args(sent), sent


def _step_counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise argparse.ArgumentTypeError(
            f"numbers from 1 to 64 with commas between them, not {text!r}"
        )
    return tuple(map(int, parts))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1, not {text!r}")
    return int(text)


def _check_presets(pipeline: PipelineV3, presets: Sequence[str]) -> None:
    """Raise ValueError for a preset that the weights lack, and for `quality`."""
    config = pipeline.config
    known = ", ".join(config.presets) or "none beside it"
    for name in presets:
        if name not in config.presets:
            raise ValueError(f"preset: {config.name} has {known}, and not {name}")


def _preset_stages(pipeline: PipelineV3, preset: str) -> dict[str, Stage]:
    """Return the stages that differ between presets, as `loop_fast`."""
    alone = Pipeline.of(of_preset(pipeline.bundle, preset))
    assert isinstance(alone, PipelineV3)
    if pipeline.compiled:
        use_compiled(alone, pipeline.compiled)
    steps = alone.config.recipe.num_inference_steps
    stages = Workload(alone).engine_stages([steps])
    names = ("prior", "condition", "step", f"loop_{steps}", f"request_{steps}")
    return {f"{name.removesuffix(f'_{steps}')}_{preset}": stages[name] for name in names}


def _requests(step_counts: Sequence[int], presets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of each kind of request, by its name in the report."""
    quality = {str(n): {"preset": QUALITY, "num_inference_steps": n} for n in step_counts}
    return {**quality, **{name: {"preset": name} for name in presets}}


def _describe(pipeline: PipelineV3) -> dict[str, Any]:
    config = pipeline.config
    return {
        "weights": config.name,
        "sha256": config.sha256,
        "size": list(config.native_size),
        "device": str(pipeline.device),
        "dtype": _name(_dtype(pipeline)),
        "threads": torch.get_num_threads(),
        "compiled": pipeline.compiled is not None,
    }


def _engine_stages(pipeline: PipelineV3, options: argparse.Namespace) -> dict[str, Stage]:
    """Return the stages of `quality`, then those of the presets."""
    stages = Workload(pipeline).engine_stages(options.steps)
    for preset in options.preset:
        stages |= _preset_stages(pipeline, preset)
    return stages


def _measure_stages(
    pipeline: PipelineV3, plain: PipelineV3, options: argparse.Namespace
) -> dict[str, Any]:
    """Return times, operations and floors by stage, and the speed-ups over transcriptions.

    plain: the same pipeline, or one that is not compiled: its operations can be counted, and it is
    measured beside the compiled one, as `step_plain`.
    """
    dtype, counted = _dtype(pipeline), _engine_stages(plain, options)
    stages = dict(counted)
    if pipeline.compiled:
        counted |= {f"{name}_plain": stage for name, stage in counted.items()}
        stages = {**counted, **_engine_stages(pipeline, options)}
    dtypes = dict.fromkeys(stages, dtype)
    if options.transcription:
        workload = Workload(plain)
        for autocast in (None, dtype) if dtype != torch.float32 else (None,):
            transcribed = workload.transcription_stages(options.steps, autocast)
            stages |= transcribed
            dtypes |= dict.fromkeys(transcribed, autocast or torch.float32)
    seconds = measure(stages, pipeline.device, warm_up=WARM_UP, repeats=options.repeats)
    ceilings = {used: ceiling(pipeline.device, used) for used in dict.fromkeys(dtypes.values())}
    figures = {
        name: quantiles(seconds[name])
        | _floor(flops(counted.get(name, stages[name])), ceilings[dtypes[name]])
        for name in stages
    }
    return {
        "ceiling_gflops_per_s": {
            _name(used): round(rate / 1e9, 1) for used, rate in ceilings.items()
        },
        "stages": figures,
        "speedup": _speedups(figures) | _preset_speedups(figures, options),
    }


def _floor(operations: int, rate: float) -> dict[str, float]:
    # Four digits that count, whatever the size of the network: rounding to microseconds made zeros
    # of small ones.
    return {
        "gflop": float(f"{operations / 1e9:.4g}"),
        "floor_ms": float(f"{operations / rate * 1000:.4g}"),
    }


def _speedups(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each transcription's loop over the engine's median at as many steps."""
    transcribed = [name for name in figures if name.startswith("transcription")]
    return {
        name: round(figures[name]["p50_ms"] / figures[name[name.index("loop_") :]]["p50_ms"], 2)
        for name in transcribed
    }


def _preset_speedups(
    figures: Mapping[str, Mapping[str, float]], options: argparse.Namespace
) -> dict[str, float]:
    """Return the median of the longest request of `quality` over that of each preset."""
    longest = figures[f"request_{max(options.steps)}"]["p50_ms"]
    presets: Sequence[str] = options.preset
    return {name: round(longest / figures[f"request_{name}"]["p50_ms"], 2) for name in presets}


def _measure_http(
    weights: str, asked: Mapping[str, Mapping[str, Any]], requests: int
) -> dict[str, Any]:
    """Measure one request at a time against a server of its own.

    Every prompt is new to the server, so that no answer comes from a cache. asked: fields by the
    name of the kind of request.
    """
    new = prompts()
    with (
        serving({"PAELLERA_WEIGHTS": weights}) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        first, _ = _generate(client, next(new), 0, next(iter(asked.values())))
        seconds: dict[str, list[float]] = {kind: [] for kind in asked}
        timings: dict[str, list[dict[str, float]]] = {kind: [] for kind in asked}
        for seed, kind in itertools.product(range(1, requests + 1), asked):
            taken, stages = _generate(client, next(new), seed, asked[kind])
            seconds[kind].append(taken)
            timings[kind].append(stages)
        return {
            "start_to_ready_s": round(server.start_to_ready_s, 2),
            "first_request_ms": round(first * 1000, 2),
            "requests": {
                kind: quantiles(seconds[kind]) | {"server_timing_ms": _medians(timings[kind])}
                for kind in asked
            },
            "peak_memory_mib": server.peak_memory_mib(),
        }


def _generate(
    client: httpx.Client, prompt: str, seed: int, fields: Mapping[str, Any]
) -> tuple[float, dict[str, float]]:
    """Return the seconds of one image for the client, and the server's milliseconds by stage.

    Raises httpx.HTTPStatusError.
    """
    began = time.perf_counter()
    response = client.post("/generate", json={"prompt": prompt, "seed": seed, **fields})
    taken = time.perf_counter() - began
    response.raise_for_status()
    return taken, server_timing_ms(response)


def _medians(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    def median(stage: str) -> float:
        return quantiles([timing[stage] / 1000 for timing in timings])["p50_ms"]

    return {stage: median(stage) for stage in timings[0]}


def _overheads(
    http: Mapping[str, Any], stages: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the median overhead of a request over HTTP.

    It is the time beyond the same request in this process, and beyond its bare sampling loop.
    """

    def beyond(name: str, steps: str, row: Mapping[str, float]) -> float:
        return round(row["p50_ms"] - stages[f"{name}_{steps}"]["p50_ms"], 2)

    return {
        steps: {
            "beyond_request": beyond("request", steps, row),
            "beyond_loop": beyond("loop", steps, row),
        }
        for steps, row in http["requests"].items()
    }


def _stage_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table(
        "One image, in this process", "stage", "p50 ms", "p95 ms", "p99 ms", "GFLOP", "floor ms"
    )
    for name, row in stages.items():
        table.add_row(
            name,
            *(f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms", "gflop", "floor_ms")),
        )
    return table


def _http_table(http: Mapping[str, Any], overheads: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with one column per step count: the client's times, then the server's."""
    requests: Mapping[str, Mapping[str, Any]] = http["requests"]
    table = _table(
        f"One image, over HTTP (ready after {http['start_to_ready_s']} s)",
        "ms",
        *(f"{kind} steps" if kind.isdecimal() else kind for kind in requests),
    )
    for key in ("p50_ms", "p95_ms", "p99_ms"):
        table.add_row(key.removesuffix("_ms"), *(f"{row[key]:.2f}" for row in requests.values()))
    for stage in next(iter(requests.values()))["server_timing_ms"]:
        table.add_row(
            f"  {stage}, p50",
            *(f"{row['server_timing_ms'][stage]:.2f}" for row in requests.values()),
        )
    for name, words in (
        ("beyond_request", "beyond the same in this process"),
        ("beyond_loop", "beyond the bare loop"),
    ):
        table.add_row(words, *(f"{overheads[steps][name]:.2f}" for steps in requests))
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _dtype(pipeline: PipelineV3) -> torch.dtype:
    return pipeline.bundle.denoiser.byt5_mapper.weight.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    begin_as_a_worker()
    main()
