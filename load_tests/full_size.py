"""Import, load, check and serve the published sizes on this machine, with random weights.

    python -m load_tests.full_size  # v3, then v1: some minutes, 10 GB of memory and of disk
    python -m load_tests.full_size --families v1 --steps 1

Denoiser, VQGAN and prior have their published sizes. The text encoders have their published widths
and two layers, or the whole system would not fit into a small machine; `--encoders whole` gives
them all of theirs. Memory and time are measured. All files are removed at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from rich.table import Table

from load_tests.report import Report
from load_tests.serving import server_timing_ms, serving
from load_tests.stages import flops
from model.bundle import build
from model.bundle_files import RECORD
from model.checkpoints.manifest import published
from model.checkpoints.memory import needs, shapes
from model.config import BundleConfig, BundleV3Config
from model.networks.denoiser_v3 import Denoiser
from model.runtime import prepare

BUNDLES = {"v3": "paella-v3", "v1": "paella-v1"}
GB, MIB = 10**9, 2**20
_LAYERS = 2
_BYTES = 64
_PROMPT = "a red apple on a white background"

# What a process of its own runs, so that its peak memory is that of the one thing that is measured.
# It prints seconds, and MiB at the end and at the start.
_MEASURE = """
import os, sys, time
from load_tests.processes import resident_mib
from model.runtime import prepare
prepare()
{imports}
baseline = resident_mib(os.getpid(), peak=True)
began = time.perf_counter()
{work}
print(time.perf_counter() - began, resident_mib(os.getpid(), peak=True), baseline)
"""
_WRITE = _MEASURE.format(
    imports="""
from pathlib import Path
from load_tests.random_checkpoints import write_checkpoints
from model.config import BundleConfig
""",
    work="write_checkpoints(BundleConfig.read(Path(sys.argv[1])), Path(sys.argv[1]))",
)
_IMPORT = _MEASURE.format(
    imports="""
import torch
from pathlib import Path
from model.config import BundleConfig
from model.checkpoints.convert import import_bundle
""",
    work="""
directory = Path(sys.argv[1])
config = BundleConfig.read(directory)
sources = {name: directory / f"{name}.pt" for name in config.networks}
import_bundle(sources, config, directory / "bundle", torch.bfloat16)
""",
)
_LOAD = _MEASURE.format(
    imports="""
import open_clip, torch
import transformers.models.t5.modeling_t5, transformers.models.byt5.tokenization_byt5
from pathlib import Path
from model.bundle import load_bundle
""",
    work="bundle = load_bundle(Path(sys.argv[1]) / 'bundle', torch.device('cpu'), torch.bfloat16)",
)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    report = Report(
        "full_size",
        command=f"python -m load_tests.full_size {' '.join(arguments or sys.argv[1:])}".strip(),
    )
    prepare()
    measured = {}
    for family in options.families:
        with TemporaryDirectory(prefix="paellera-full-size-", dir=options.directory) as name:
            measured[family] = _measure(family, Path(name), options)
        report.add(_table(family, measured[family]))
    report.emit({"families": measured})


def _measure(family: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    whole = published().config(BUNDLES[family])
    config = whole if options.encoders == "whole" else shallow(whole)
    parts = shapes(whole)
    figures: dict[str, Any] = {
        "parts": {
            name: {"parameters": part.parameters, "half_precision_bytes": part.bytes}
            for name, part in parts.items()
        },
        "memory_bytes": {
            place: {"device": need.device, "cpu": need.cpu} for place, need in needs(parts).items()
        },
        "gflop_per_forward": {
            what: round(count / 1e9, 1) for what, count in forward_flops(whole).items()
        },
    }
    config.write(directory)
    _timed(_WRITE, directory)
    figures["largest_tensor_bytes"] = largest = _largest(config)
    figures["import"] = _timed(_IMPORT, directory)
    figures["import"]["allowed_bytes"] = round(1.3 * largest + 500e6)
    for checkpoint in directory.glob("*.pt"):
        checkpoint.unlink()
    return figures | {
        "load": _load(directory),
        "serving": _serve(directory / "bundle", options.steps),
    }


def shallow(config: BundleConfig) -> BundleConfig:
    """Return the same widths with text encoders of two layers and a prior of few steps.

    A machine without room for ByT5-XL can run that.
    """
    clip = replace(
        config.clip,
        vision_cfg=replace(config.clip.vision_cfg, layers=_LAYERS),
        text_cfg=replace(config.clip.text_cfg, layers=_LAYERS),
    )
    config = replace(config, clip=clip, recipe=replace(config.recipe, prior_steps=4))
    return (
        replace(config, byt5=replace(config.byt5, num_layers=_LAYERS))
        if isinstance(config, BundleV3Config)
        else config
    )


def forward_flops(config: BundleConfig) -> dict[str, int]:
    """Return the operations of one forward pass at the native size.

    They are counted on the meta device, where nothing is computed. whole: the published code's work
    at every step, the prompt's part included (v3: 64 bytes; v1: mapped at every position). step:
    the rest of that when a prompt's part is computed once.
    """
    bundle = build(config, None)
    width, height = (side // config.vqgan.downscale for side in config.native_size)
    with torch.device("meta"), torch.inference_mode():
        tokens, one, clip = (
            torch.zeros(1, height, width, dtype=torch.int64),
            torch.ones(1),
            torch.ones(1, config.clip.embed_dim),
        )
        denoiser = bundle.denoiser
        if isinstance(denoiser, Denoiser):
            byt5 = torch.ones(1, _BYTES, denoiser.config.byt5_embd)
            whole = flops(lambda: denoiser(tokens, one, byt5, clip, clip))
            condition = flops(lambda: denoiser.condition(byt5, None, clip, clip))
        else:
            everywhere = clip[:, :, None, None].expand(-1, -1, height, width)
            whole = flops(lambda: denoiser(tokens, everywhere, one))
            condition = flops(lambda: denoiser.condition(everywhere, (height, width)))
    return {"whole": whole, "step": whole - condition}


def _largest(config: BundleConfig) -> int:
    """Return the bytes of the largest tensor in the checkpoints, which are bfloat16."""
    return max(
        2 * t.numel()
        for _, module in build(config, None).networks()
        for t in module.state_dict().values()
    )


def _timed(program: str, directory: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True
    )
    seconds, peak, baseline = map(float, done.stdout.split())
    return {
        "seconds": round(seconds, 3),
        "peak_rss_bytes": round(peak * MIB),
        "peak_beyond_start_bytes": round((peak - baseline) * MIB),
    }


def _load(directory: Path) -> dict[str, Any]:
    """Measure loading the imported bundle.

    Beside it: reading the same bytes from the warm page cache, and loading a copy whose files must
    be hashed. Importing libraries does not count.
    """
    files = sorted((directory / "bundle").glob("*.safetensors"))
    began = time.perf_counter()
    for path in files:
        with path.open("rb") as file:
            while file.read(2**26):
                pass
    reading = time.perf_counter() - began
    loaded = _timed(_LOAD, directory)
    (directory / "bundle" / RECORD).unlink()
    hashed = _timed(_LOAD, directory)["seconds"]
    size = sum(path.stat().st_size for path in files)
    times = {
        "times_reading": round(loaded["seconds"] / reading, 2),
        "hashed_times_reading": round(hashed / reading, 2),
    }
    return {
        **loaded,
        "bytes": size,
        "reading_seconds": round(reading, 3),
        "hashed_seconds": hashed,
        **times,
    }


def _serve(bundle: Path, steps: int) -> dict[str, Any]:
    settings = {
        "PAELLERA_WEIGHTS": str(bundle),
        "PAELLERA_DTYPE": "bfloat16",
        "PAELLERA_STALL_TIMEOUT_S": "300",
    }
    with serving(settings) as server, httpx.Client(base_url=server.url, timeout=600) as client:
        fields = {"prompt": _PROMPT, "seed": 7, "num_inference_steps": steps, "timeout_s": 600}
        answer = client.post("/generate", json=fields).raise_for_status()
        listed = client.get("/v1/models").json()["data"][0]
        memory = server.peak_memory_mib()
    timings = server_timing_ms(answer)
    return {
        "start_to_ready_s": round(server.start_to_ready_s, 2),
        "status": answer.status_code,
        "picture_bytes": len(answer.content),
        "timings_ms": timings,
        "seconds_per_step": round(timings["denoise"] / 1000 / steps, 3),
        "peak_rss_mib": memory,
        "capabilities": listed["capabilities"],
    }


def _table(family: str, figures: Mapping[str, Any]) -> Table:
    table = Table(title=f"{family}: {BUNDLES[family]}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, part in figures["parts"].items():
        table.add_row(
            f"{name}, half precision",
            f"{part['parameters']:,} parameters, {part['half_precision_bytes'] / GB:.2f} GB",
        )
    for place, need in figures["memory_bytes"].items():
        table.add_row(
            f"weights, encoders: {place}",
            f"{need['device'] / GB:.2f} GB on the device, {need['cpu'] / GB:.2f} GB beside it",
        )
    load, serve = figures["load"], figures["serving"]
    written = figures["import"]
    counts = figures["gflop_per_forward"]
    table.add_row(
        "one forward at the native size",
        f"{counts['whole']} GFLOP, {counts['step']} without the prompt's part",
    )
    table.add_row(
        "import",
        f"{written['seconds']:.1f} s, peak {written['peak_beyond_start_bytes'] / 1e6:.0f} "
        f"MB beyond the start",
    )
    table.add_row(
        "largest tensor, allowed peak",
        f"{figures['largest_tensor_bytes'] / 1e6:.0f} MB, {written['allowed_bytes'] / 1e6:.0f} MB",
    )
    table.add_row(
        "load from a warm page cache",
        f"{load['seconds']:.2f} s for {load['bytes'] / GB:.2f} GB, reading takes "
        f"{load['reading_seconds']:.2f} s",
    )
    table.add_row("the same of a copy, which is hashed", f"{load['hashed_seconds']:.2f} s")
    table.add_row("peak memory of the load", f"{load['peak_rss_bytes'] / 1e6:.0f} MB")
    table.add_row("server ready after", f"{serve['start_to_ready_s']:.1f} s")
    table.add_row("guided step of POST /generate", f"{serve['seconds_per_step']:.2f} s")
    table.add_row(
        "peak memory of the server",
        ", ".join(
            f"{name} {max(peaks):.0f} MiB" for name, peaks in serve["peak_rss_mib"].items() if peaks
        ),
    )
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--families", nargs="+", choices=list(BUNDLES), default=list(BUNDLES))
    p.add_argument(
        "--steps", type=int, default=2, help="of the picture that is asked for over HTTP"
    )
    p.add_argument("--encoders", choices=["shallow", "whole"], default="shallow")
    p.add_argument(
        "--directory",
        type=Path,
        help="where there is room for the weights; default: the system's temporary directory",
    )
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
