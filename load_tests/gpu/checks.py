"""Check half precision with the chosen kernels against fp32 with the plain ones, and graphs.

Graphs are compared with eager steps. Errors are ‖x − reference‖ / ‖reference‖ on fresh random
inputs; NaN is never good. Outputs are spoiled before a replay, so that a value that is not written
shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from load_tests.gpu.batch import Batch
from load_tests.gpu.options import Options
from load_tests.gpu.recorders import poisoned, recorder_for
from load_tests.gpu.results import Results
from load_tests.gpu.stages import release
from load_tests.gpu.weights import Family
from model.bundle import BundleV3
from model.config import Sampler
from model.executor import BranchBatch, Eager, SamplingInputs
from model.networks.layers import to_device
from model.networks.text_encoders import Prompt
from model.pipeline import Pipeline, PipelineV3

# A network of a hundred layers adds up its roundings, of which fp16 has eleven bits and bf16 eight.
LIMITS = {torch.float32: 0.001, torch.float16: 0.02, torch.bfloat16: 0.1}
# Of tokens drawn from the same features: a batch of another size rounds its products differently,
# and a draw may fall to the next code.
_AGREEMENT = 0.9
_ROWS = (1, 3, 2)
_STEPS = 6


@dataclass(frozen=True, slots=True)
class Check:
    """One result and its limit.

    value: an error, which must be at most the limit, or an agreement, which must be at least that.
    """

    check: str
    value: float
    limit: float
    agreement: bool = False

    @property
    def good(self) -> bool:
        return self.value >= self.limit if self.agreement else self.value <= self.limit


def run(options: Options, results: Results) -> None:
    for family in options.families:
        for find in (_precision, _graphs):
            for check in find(family, options):
                results.add(
                    {
                        "family": family,
                        **asdict(check),
                        "value": float(f"{check.value:.3g}"),
                        "good": check.good,
                    }
                )
            release(options.device)


def error(found: Tensor, reference: Tensor) -> float:
    """Return ‖found − reference‖ / ‖reference‖ in fp64; NaN if either holds one."""
    exact = reference.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def agreement(found: Tensor, reference: Tensor) -> float:
    return float((found == reference).double().mean())


# ── precision ─────────────────────────────────────────────────────────────────────────────────────


def _precision(family: Family, options: Options) -> Iterator[Check]:
    torch.backends.cudnn.allow_tf32 = False  # or the reference would have ten bits itself
    exact = Pipeline.of(options.bundle(family, torch.float32, kernels="torch"))
    given = Batch(exact, 2, options.size(family))
    reference = _outputs(exact, given)
    given.pipeline = None  # type: ignore[assignment]  # its weights' memory is needed
    del exact
    for dtype in (torch.float16,) if options.quick else (torch.float16, torch.bfloat16):
        release(options.device)
        bundle = options.bundle(family, dtype)
        if (
            isinstance(bundle, BundleV3)
            and options.device.type == "cuda"
            and options.kernels != "torch"
        ):
            yield Check(
                "Triton's kernels are in use",
                float(bundle.denoiser.fused and bundle.prior.fused),
                1.0,
                agreement=True,
            )
        found = _outputs(Pipeline.of(bundle), given)
        del bundle
        for name, own in found.items():
            yield Check(
                f"{name} in {str(dtype).removeprefix('torch.')}",
                error(own, reference[name]),
                LIMITS[dtype],
            )


@torch.inference_mode()
def _outputs(pipeline: Pipeline, given: Batch) -> dict[str, Tensor]:
    """Return the output of every network, each from the inputs that fp32 gave it."""
    dtype, b = pipeline.dtype, pipeline.bundle
    prompts = [_cast(prompt, dtype) for prompt in given.prompts]
    conditions = [
        pipeline.condition(prompt, image.to(dtype))
        for prompt, image in zip(prompts, given.images, strict=True)
    ]
    branches = BranchBatch(
        list(enumerate(conditions)), to_device(list(range(given.rows)), pipeline.device)
    )
    times = b.denoiser.times(to_device([0.6, 0.3], pipeline.device))
    features = Eager(b).features(
        given.tokens, times, branches, to_device([1.0] * given.rows, pipeline.device)
    )
    encoded = pipeline.encode(given.texts)
    outputs = {
        "CLIP's text": torch.cat([prompt.clip for prompt in encoded]),
        "logits": b.denoiser.project(features),
        "pixels": b.vqgan.decode(given.tokens),
    }
    if isinstance(pipeline, PipelineV3):
        outputs["bytes"] = torch.cat([prompt.byt5[prompt.mask] for prompt in encoded])
        outputs["prior"] = torch.cat(pipeline.prior_embeddings(prompts, given.noises))
    return outputs


def _cast(prompt: Prompt, dtype: torch.dtype) -> Prompt:
    return replace(prompt, byt5=prompt.byt5.to(dtype), clip=prompt.clip.to(dtype))


# ── graphs ────────────────────────────────────────────────────────────────────────────────────────


def _graphs(family: Family, options: Options) -> Iterator[Check]:
    """Yield checks of replayed rows, with full graphs and padded ones, against eager rows."""
    bundle = options.bundle(family)
    for rows in _ROWS:
        eager, replayed = (Batch(Pipeline.of(bundle), rows, options.size(family)) for _ in range(2))
        replayed.record(lambda: poisoned(recorder_for(options.device)), room_for=max(_ROWS))
        yield from (
            replace(check, check=f"{check.check} of {rows} rows, replayed")
            for check in _compared(eager, replayed)
        )
        release(options.device)


def _compared(eager: Batch, replayed: Batch) -> Iterator[Check]:
    both, limit = (replayed, eager), LIMITS[eager.pipeline.dtype]
    found, expected = (_features(batch) for batch in both)
    yield Check("features", error(found, expected), limit)
    yield Check(
        "pixels", error(*(batch.pipeline.decode_tokens(batch.tokens) for batch in both)), limit
    )
    if isinstance(eager.pipeline, PipelineV3):
        yield Check(
            "prior",
            error(*(torch.cat(b.pipeline.prior_embeddings(b.prompts, b.noises)) for b in both)),
            limit,
        )
    for sampler in eager.pipeline.config.samplers:
        drawn, again = (_draw(batch, sampler, expected) for batch in both)
        yield Check(f"{sampler} draw", agreement(drawn, again), _AGREEMENT, agreement=True)
    # How far roundings lead apart is to be known; no limit says how far they may.
    yield Check(
        "tokens after all steps",
        agreement(*(batch.loop(_STEPS) for batch in both)),
        0.0,
        agreement=True,
    )


@torch.inference_mode()
def _draw(batch: Batch, sampler: Sampler, features: Tensor) -> Tensor:
    uniform = torch.rand(features.shape[:3], generator=torch.Generator().manual_seed(0)).to(
        features.device
    )
    temperature, mass = (
        to_device([1.5] * batch.rows, features.device),
        to_device([0.3] * batch.rows, features.device),
    )
    return batch.pipeline.executor.sample(
        sampler, features, SamplingInputs(uniform, temperature, mass)
    ).clone()


@torch.inference_mode()
def _features(batch: Batch) -> Tensor:
    """Return guided features of the first step of fresh tokens, the same for both."""
    p, n = batch.pipeline, batch.rows
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(
        p.config.vqgan.codebook_size, batch.tokens.shape, generator=generator
    ).to(p.device)
    members = [
        (row, condition)
        for row in range(n)
        for condition in (batch.conditions[row], batch.unconditional)
    ]
    branches = BranchBatch(members, to_device([row for row, _ in members], p.device))
    times = p.bundle.denoiser.times(to_device([1 - row / n for row in range(n)], p.device))
    return p.executor.features(
        tokens, times, branches, to_device([3.0, -2.0] * n, p.device)
    ).clone()
