"""Measure one bundle's stages in this process: seconds and floating-point operations.

Beside them stands the machine's own ceiling of operations. Stages that are compared run
interleaved, one after the other in every round, so that a machine that slows down slows all of
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from load_tests.transcription import Transcription, denoise
from model.config import SamplingConfig
from model.networks.text_encoders import Prompt
from model.pipeline import PipelineV3
from model.rows import AnyCondition, Row

Stage = Callable[[], object]

PROMPT = "a small red ball left of a blue box on a green table"
_CEILING_SIDE = 2048


def _linear_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    return 2 * math.prod(x) * out_shape[-1]


def _depthwise_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    return 2 * 9 * math.prod(out_shape)


def _transposed_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    return 2 * 4 * 4 * math.prod(x) * out_shape[1]


# The CPU's own kernels, which torch's counter does not know. Their packed weights do not tell their
# shape.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.mkl._mkl_linear: _linear_flops,
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.mkldnn._convolution_pointwise: _depthwise_flops,
    torch.ops.mkldnn._convolution_transpose_pointwise: _transposed_flops,
}


class Workload:
    """One prompt on one pipeline, and every stage of its way to an image as something to call."""

    def __init__(self, pipeline: PipelineV3, seed: int = 0) -> None:
        self.pipeline = pipeline
        config = pipeline.config
        self.noise = pipeline.noise(seed, *config.native_size, steps=64)
        self.prompt, self.negative = pipeline.encode([PROMPT, ""])
        (self.image,) = pipeline.prior_embeddings([self.prompt], [self.noise])
        self.conditional, self.unconditional = (
            pipeline.condition(self.prompt, self.image),
            pipeline.condition(self.negative),
        )
        self.tokens = self.noise.start[None].to(pipeline.device)

    def sampling(self, steps: int) -> SamplingConfig:
        """Return the recipe with `steps` steps, by the sampler that the transcription has too."""
        return self.pipeline.config.recipe.sampling(steps=steps, sampler="multinomial")

    def engine_stages(self, step_counts: Sequence[int]) -> dict[str, Stage]:
        p, row = self.pipeline, self._row(step_counts[0])
        return {
            "encode": lambda: p.encode([PROMPT, ""]),
            "prior": lambda: p.prior_embeddings([self.prompt], [self.noise]),
            "condition": lambda: (p.condition(self.prompt, self.image), p.condition(self.negative)),
            "step": lambda: self._step(row),
            **{f"loop_{n}": partial(self._loop, n) for n in step_counts},
            "decode": lambda: p.decode(self.tokens),
            **{f"request_{n}": partial(self._request, n) for n in step_counts},
        }

    def transcription_stages(
        self, step_counts: Sequence[int], autocast: torch.dtype | None = None
    ) -> dict[str, Stage]:
        """Return the published loop in fp32, or under autocast to the given type."""
        model = Transcription(self.pipeline.config.denoiser).eval().to(self.pipeline.device)
        model.load_state_dict(self.pipeline.bundle.denoiser.state_dict())
        suffix = "" if autocast is None else f"_{str(autocast).removeprefix('torch.')}"
        return {
            f"transcription{suffix}_loop_{n}": partial(self._transcribed_loop, model, n, autocast)
            for n in step_counts
        }

    def step_of(self, rows: int) -> Stage:
        """Return the first step of `rows` images at once."""
        batch = [self._row(12) for _ in range(rows)]

        def step() -> None:
            for row in batch:
                row.step = 0
            self.pipeline.advance(batch)

        return step

    def _row(self, steps: int) -> Row:
        # New conditions, as every request brings its own: the pipeline would otherwise keep the
        # last loop's stacked ones.
        return self._start(steps, replace(self.conditional), replace(self.unconditional))

    def _start(self, steps: int, conditional: AnyCondition, unconditional: AnyCondition) -> Row:
        sampling = self.sampling(steps)
        row = self.pipeline.start(self.noise, sampling, conditional, unconditional)
        row.unconditional_start = self.pipeline.unconditional_start(self.noise, sampling, "")
        return row

    def _step(self, row: Row) -> None:
        row.step = 0
        self.pipeline.advance([row])

    def _loop(self, steps: int) -> None:
        self.pipeline.denoise([self._row(steps)])

    def _request(self, steps: int) -> None:
        """Compute a whole request with a new prompt, one stage after the other.

        The unconditional text is known already.
        """
        p = self.pipeline
        (prompt,) = p.encode([PROMPT])
        (image,) = p.prior_embeddings([prompt], [self.noise])
        row = self._start(steps, p.condition(prompt, image), p.condition(self.negative))
        p.decode(p.denoise([row]))

    @torch.inference_mode()
    def _transcribed_loop(
        self, model: Transcription, steps: int, autocast: torch.dtype | None
    ) -> None:
        arguments = (
            denoiser_arguments(self.pipeline, self.prompt, self.image),
            denoiser_arguments(self.pipeline, self.negative),
        )
        with torch.autocast(self.pipeline.device.type, autocast, enabled=autocast is not None):
            for _ in denoise(model, self.tokens, *arguments, self.sampling(steps)):
                pass


def denoiser_arguments(
    pipeline: PipelineV3, prompt: Prompt, image: Tensor | None = None
) -> dict[str, Tensor]:
    """Return an encoded prompt as the published forward takes it: fp32, without padding.

    image: an image embedding for the conditional pass.
    """
    byt5 = prompt.byt5[:, prompt.mask[0]].float()
    arguments = {"byt5": byt5, "clip": prompt.clip.float()}
    if image is None:
        return arguments
    arguments["clip_image"] = image.float()
    if pipeline.config.recipe.attention_weights is not None:
        text, of_image = pipeline.config.recipe.attention_weights
        weights = torch.full((byt5.shape[1],), text, device=byt5.device)
        weights[-pipeline.config.denoiser.clip_seq_len :] = of_image
        arguments["attn_weights"] = weights
    return arguments


def measure(
    stages: Mapping[str, Stage],
    device: torch.device,
    *,
    warm_up: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of every stage in every round after the warm-up.

    The device's queue is emptied before and after each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for round_ in range(warm_up + repeats):
        for name, stage in stages.items():
            taken = _seconds(stage, device, clock)
            if round_ >= warm_up:
                seconds[name].append(taken)
    return seconds


def _seconds(stage: Stage, device: torch.device, clock: Callable[[], float]) -> float:
    _synchronise(device)
    began = clock()
    stage()
    _synchronise(device)
    return clock() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(stage: Stage) -> int:
    """Return the floating-point operations of a stage.

    Those of its matrix products, convolutions and attention.

    A multiplication with its addition counts as two.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        stage()
    return counter.get_total_flops()


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the machine's operations per second: the best of five large matrix products."""
    a, b = (torch.randn(_CEILING_SIDE, _CEILING_SIDE, device=device).to(dtype) for _ in range(2))
    times = measure({"product": lambda: a @ b}, device, warm_up=1, repeats=5)["product"]
    return 2 * _CEILING_SIDE**3 / min(times)
