"""The computations of a v3 pipeline that are compiled, each with an example of its inputs.

All sizes but the token grid's are free: rows, branches, and lengths of texts.

Letters: B rows, N branches, H W token grid, L tokens of a text or condition, T tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model import sampling
from model.config import PriorSettings
from model.networks.denoiser_v3 import Condition, Denoiser
from model.networks.text_encoders import ByteTower, TextTower
from model.pipeline import PipelineV3

# Rows and tokens of the example that is compiled from: numbers that no fixed size equals.
ROWS, LENGTH = 3, 40
# The largest size of a free axis that has no other.
MOST = 2**20
_PROMPT = "a red apple on a white background"


@dataclass(frozen=True, eq=False)
class Program:
    """A computation of tensors alone.

    compute: the plain form. networks: whose weights it reads. example: inputs. axes: for each
    input, the letter of every axis whose size is free. most: the largest size of a letter.
    """

    name: str
    compute: Callable[..., Tensor]
    networks: tuple[nn.Module, ...]
    example: tuple[Tensor, ...]
    axes: tuple[dict[int, str], ...]
    most: Mapping[str, int] = field(default_factory=dict)


def programs_of(pipeline: PipelineV3) -> list[Program]:
    """Return all programs of a pipeline, in the order of an image's computation."""
    bundle, programs = pipeline.bundle, []
    if isinstance(bundle.byt5.tower, ByteTower):
        programs.append(_bytes(pipeline, bundle.byt5.tower))
    if isinstance(bundle.clip.tower, TextTower):
        programs.append(_text(pipeline, bundle.clip.tower))
    priors = enumerate(pipeline.config.prior_settings)
    programs += [_prior(pipeline, of_prior(i), settings) for i, settings in priors]
    for name, denoiser in pipeline.denoisers.items():
        assert isinstance(denoiser, Denoiser)
        programs += [
            _condition(pipeline, name, denoiser),
            _features(pipeline, name, denoiser),
            _draw(name, denoiser),
        ]
    programs.append(_decode(pipeline))
    return programs


def of_denoiser(denoiser: str, part: str) -> str:
    """Return the name of a denoiser's program. part: condition, features or draw."""
    return f"{denoiser}-{part}"


def of_prior(number: int) -> str:
    """Return the name of the program for the prior's settings of this number."""
    return f"prior-{number}"


def _bytes(pipeline: PipelineV3, tower: ByteTower) -> Program:
    """Byte ids [B, L], and position bias with padding at −∞ [B, heads, L, L] → [B, L, D]."""
    tokens, mask, _ = pipeline.bundle.byt5.tokenize([_PROMPT] * ROWS)
    axes = {0: "B", 1: "L"}, {0: "B", 2: "L", 3: "L"}
    example = _cut(tokens), tower.masked_bias(_cut(mask))
    return Program("bytes", tower.plain_layers, (pipeline.bundle.byt5,), example, axes)


def _text(pipeline: PipelineV3, tower: TextTower) -> Program:
    """Token ids [B, L] and the end mark's place [B] → [B, D']."""
    tokens, ends = tower.read_part(pipeline.bundle.clip.tokenize([_PROMPT] * ROWS)[0])
    axes = {0: "B", 1: "L"}, {0: "B"}
    example = tokens.contiguous(), ends
    clip = pipeline.bundle.clip
    most = {"L": clip.config.context_length}
    return Program("text", tower.plain_layers, (clip,), example, axes, most)


def _prior(pipeline: PipelineV3, name: str, settings: PriorSettings) -> Program:
    """Text embeddings [B, D'] and noise [S + 1, B, D'] → image embeddings [B, D']."""
    steps, width = pipeline.prior_noise(settings)
    example = _random(ROWS, width).to(pipeline.dtype), _random(steps, ROWS, width)
    pipeline.bundle.prior.schedule(settings.steps)  # remembered: numbers, not a computation

    def compute(text: Tensor, noise: Tensor) -> Tensor:
        return pipeline.sample_prior(text, noise, settings)

    return Program(name, compute, (pipeline.bundle.prior,), example, ({0: "B"}, {1: "B"}))


def _condition(pipeline: PipelineV3, name: str, denoiser: Denoiser) -> Program:
    """Embeddings of a prompt [B, L, D], [B, D'] and of an image [B, D'] → keys and values."""
    c, dtype = denoiser.config, pipeline.dtype
    example = (
        _random(ROWS, LENGTH, c.byt5_embd).to(dtype),
        _random(ROWS, c.clip_embd).to(dtype),
        _random(ROWS, c.clip_embd).to(dtype),
    )

    def compute(byt5: Tensor, clip: Tensor, image: Tensor) -> Tensor:
        return denoiser.condition(byt5, None, clip, image).kv

    axes = {0: "B", 1: "L"}, {0: "B"}, {0: "B"}
    return Program(of_denoiser(name, "condition"), compute, (denoiser,), example, axes)


def _features(pipeline: PipelineV3, name: str, denoiser: Denoiser) -> Program:
    """Codes [B, H, W], times [B, S], a condition [N, L, S'] with its mask, rows [N] → features."""
    branches = 2 * ROWS
    example = (
        _codes(pipeline),
        denoiser.times(torch.full((ROWS,), 0.5)),
        _random(branches, LENGTH, denoiser.condition_width).to(pipeline.dtype),
        torch.arange(LENGTH).expand(branches, -1) < LENGTH - 1,
        torch.arange(ROWS).repeat_interleave(2),
    )

    def compute(tokens: Tensor, times: Tensor, kv: Tensor, mask: Tensor, row_of: Tensor) -> Tensor:
        return denoiser.features(tokens, times, Condition(kv, mask), row_of)

    axes = {0: "B"}, {0: "B"}, {0: "N", 1: "L"}, {0: "N", 1: "L"}, {0: "N"}
    return Program(of_denoiser(name, "features"), compute, (denoiser,), example, axes)


def _draw(name: str, denoiser: Denoiser) -> Program:
    """Features [T, c_out], uniforms [T] and one over the temperature [T] → codes [T]."""
    tokens = ROWS * LENGTH
    features = _random(tokens, denoiser.config.c_out).to(denoiser.byt5_mapper.weight.dtype)

    def compute(features: Tensor, uniform: Tensor, inverse: Tensor) -> Tensor:
        return sampling.inverse_cdf(denoiser.sharpened(features, inverse[:, None]), uniform)

    example = features, torch.linspace(0, 0.99, tokens), torch.ones(tokens)
    axes = {0: "T"}, {0: "T"}, {0: "T"}
    return Program(of_denoiser(name, "draw"), compute, (denoiser,), example, axes)


def _decode(pipeline: PipelineV3) -> Program:
    """Codes [B, H, W] → images uint8 [B, height, width, 3]."""
    vqgan = pipeline.bundle.vqgan
    return Program("decode", pipeline.pixels, (vqgan,), (_codes(pipeline),), ({0: "B"},))


def _codes(pipeline: PipelineV3) -> Tensor:
    """Return codes [B, H, W] of the native size, all of them if there are so many tokens."""
    grid = pipeline.grid(*pipeline.config.native_size)
    codes = torch.arange(ROWS * grid[0] * grid[1]) % pipeline.config.vqgan.codebook_size
    return codes.view(ROWS, *grid)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _cut(tokens: Tensor) -> Tensor:
    return tokens[:, :LENGTH].contiguous()


def rows_of(program: Program, rows: int) -> Sequence[Tensor]:
    """Return the example's inputs for fewer rows; B counts them, N twice and T for each token."""
    fewer = {"B": rows, "N": 2 * rows, "T": rows * LENGTH}
    inputs = list(program.example)
    for i, axes in enumerate(program.axes):
        for axis, letter in axes.items():
            if letter in fewer:
                inputs[i] = inputs[i].narrow(axis, 0, fewer[letter])
    return [tensor.contiguous() for tensor in inputs]
