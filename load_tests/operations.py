"""Measure the cost of input images: /inpaint and /outpaint beside /generate over HTTP.

    python -m load_tests.operations --requests 40

All images have the native size. One request at a time, the three in turn, every prompt and every
image new to the server. The `PAELLERA_*` variables apply as they do to the server. The last line of
output is JSON; `ratio` is the median over /generate's.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.table import Table

from load_tests.prompts import prompts
from load_tests.report import Report, quantiles
from load_tests.serving import server_timing_ms, serving
from model.config import BundleConfig, find_bundle
from server.settings import Settings

WARM_UP = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises SystemExit for bad arguments, httpx.HTTPStatusError for an error.
    """
    parser = argparse.ArgumentParser(
        description="What pictures that come in cost; the last line of output is JSON."
    )
    parser.add_argument("--requests", type=int, default=40, help="of each operation, 40 by default")
    sent = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(sent)
    report = Report(
        "operations", command=shlex.join(["python", "-m", "load_tests.operations", *sent])
    )
    weights = Settings().bundles[0]
    measured = measure(weights, BundleConfig.read(find_bundle(weights)), options.requests)
    report.add(_table(measured))
    report.emit({"operations": measured})


def measure(weights: str, config: BundleConfig, requests: int) -> dict[str, dict[str, Any]]:
    """Return the client's milliseconds, and the server's own medians by stage."""
    new = prompts()
    seconds: dict[str, list[float]] = {name: [] for name in ("generate", "inpaint", "outpaint")}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in seconds}
    with (
        serving({"PAELLERA_WEIGHTS": weights}) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        for number in range(-WARM_UP, requests):
            for name in seconds:
                request = _request(name, next(new), config, number + WARM_UP)
                began = time.perf_counter()
                answer = client.post(f"/{name}", **request)
                taken = time.perf_counter() - began
                answer.raise_for_status()
                if number >= 0:
                    seconds[name].append(taken)
                    stages[name].append(server_timing_ms(answer))
    base = float(np.median(seconds["generate"]))
    return {
        name: quantiles(taken)
        | {
            "ratio": round(float(np.median(taken)) / base, 3),
            "server_timing_ms": _medians(stages[name]),
        }
        for name, taken in seconds.items()
    }


def _request(name: str, prompt: str, config: BundleConfig, number: int) -> dict[str, Any]:
    """Return the body of one request of an operation, with images that are new to the server."""
    width, height = config.native_size
    pixels = np.random.default_rng([number, len(name)]).integers(
        256, size=(8, 8, 3), dtype=np.uint8
    )
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    if name == "inpaint":
        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
        return {"data": {"prompt": prompt}, "files": {"image": _png(picture), "mask": _png(mask)}}
    if name == "outpaint":
        margin = config.size_step
        return {
            "data": {"prompt": prompt, "right": margin},
            "files": {"image": _png(picture.crop((0, 0, width - margin, height)))},
        }
    return {"json": {"prompt": prompt}}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _medians(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        stage: round(float(np.median([timing[stage] for timing in timings])), 2)
        for stage in timings[0]
    }


def _table(measured: Mapping[str, Mapping[str, Any]]) -> Table:
    stages = next(iter(measured.values()))["server_timing_ms"]
    table = Table(
        "",
        "p50 ms",
        "p95 ms",
        "over /generate",
        *stages,
        title="Native size, one request at a time; server's stages: p50 ms",
    )
    for name, row in measured.items():
        own = (f"{milliseconds:.1f}" for milliseconds in row["server_timing_ms"].values())
        table.add_row(
            f"/{name}", f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}", f"{row['ratio']:.2f}", *own
        )
    return table


if __name__ == "__main__":
    main()
