"""Compare the published sampler, transcribed, with ours on the same weights.

In autocast and in plain half precision, eager and compiled. The first call of a compiled one, which
compiles, is timed apart. Only v3 is transcribed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from load_tests.gpu.batch import Batch
from load_tests.gpu.options import Options
from load_tests.gpu.results import Results
from load_tests.gpu.stages import release
from load_tests.gpu.timing import measure, synchronise
from load_tests.stages import denoiser_arguments
from load_tests.transcription import Transcription, denoise
from model.pipeline import Pipeline, PipelineV3

_ROWS = (1, 4, 16)


def run(options: Options, results: Results) -> None:
    if "v3" not in options.families:
        return
    bundle = options.bundle("v3")
    for rows in (rows for rows in _ROWS if rows <= max(options.rows)):
        batch = Batch(Pipeline.of(bundle), rows, options.size("v3"))
        batch.record()
        for steps in options.steps:
            ours = measure(partial(batch.loop, steps), options.device, options.budget)
            results.add({"rows": rows, "steps": steps, "sampler": "ours", **ours})
        for model in _models(batch):
            _measure(model, batch, options, results)
            release(options.device)


def _measure(model: _Published, batch: Batch, options: Options, results: Results) -> None:
    for compiled in (False,) if options.micro or options.quick else (False, True):
        row: dict[str, Any] = {
            "rows": batch.rows,
            "sampler": f"{model.name}, {'compiled' if compiled else 'eager'}",
        }
        try:
            if compiled:
                row["first_call_s"] = model.compile(batch, options.steps[0])
            for steps in options.steps:
                figures = measure(partial(model.loop, batch, steps), options.device, options.budget)
                results.add({**row, "steps": steps, **figures})
        except (
            RuntimeError,
            torch.OutOfMemoryError,
        ) as error:  # a compiler that is missing, a size that does not fit
            results.add({**row, "failed": str(error).splitlines()[0][:200]})


def _models(batch: Batch) -> Iterator[_Published]:
    yield _Published(batch, autocast=True)
    yield _Published(batch, autocast=False)


class _Published:
    """The published module with the bundle's weights.

    They are fp32 under autocast, or half precision.
    """

    def __init__(self, batch: Batch, *, autocast: bool) -> None:
        p = batch.pipeline
        assert isinstance(p, PipelineV3)
        self.dtype = torch.float32 if autocast else p.dtype
        self.autocast = p.dtype if autocast and p.dtype != torch.float32 else None
        self.name = (
            f"published, {'autocast' if autocast else 'plain'} "
            f"{str(p.dtype).removeprefix('torch.')}"
        )
        model = Transcription(p.config.denoiser).eval().to(p.device)
        model.load_state_dict(p.bundle.denoiser.state_dict())
        self.model = model.to(self.dtype)
        self.start = batch.tokens
        given = ((batch.prompts[0], batch.images[0]), (p.encode([""])[0],))
        self.arguments = [
            _joined([denoiser_arguments(p, *own)], batch.rows, self.dtype) for own in given
        ]

    def compile(self, batch: Batch, steps: int) -> float:
        """Compile the module, and return the seconds of the first loop."""
        torch._dynamo.reset()
        self.model = cast(Transcription, torch.compile(self.model))
        began = time.perf_counter()
        self.loop(batch, steps)
        synchronise(batch.pipeline.device)
        return round(time.perf_counter() - began, 2)

    @torch.inference_mode()
    def loop(self, batch: Batch, steps: int) -> Tensor:
        p = batch.pipeline
        sampling = p.config.recipe.sampling(steps=steps, sampler="multinomial")
        with torch.autocast(p.device.type, self.autocast, enabled=self.autocast is not None):
            *_, (tokens, _) = denoise(
                self.model, self.start, self.arguments[0], self.arguments[1], sampling
            )
        return tokens


def _joined(arguments: list[dict[str, Tensor]], rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of one prompt for all rows.

    The published sampler takes prompts of one length.
    """
    (own,) = arguments
    return {
        name: (t if name == "attn_weights" else t.expand(rows, *t.shape[1:])).to(dtype)
        for name, t in own.items()
    }
