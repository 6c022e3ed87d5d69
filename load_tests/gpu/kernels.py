"""Triton's kernels beside their plain twins at the published sizes: whether they agree on fresh inputs, and what each takes.

An error is taken beside the twin in fp32, and new memory is spoiled beforehand. The floor is that of the bytes that are read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from load_tests.gpu.checks import LIMITS, Check, agreement, error
from load_tests.gpu.options import Options
from load_tests.gpu.recorders import poisoned_memory
from load_tests.gpu.results import Results
from load_tests.gpu.timing import measure

_DRAWS = 0.9


@dataclass(frozen=True, slots=True)
class Shape:
    """rows × side × side pixels of so many channels, for blocks; or tokens of so many codes and features, for draws. 0: none."""

    rows: int
    side: int
    channels: int = 0
    codes: int = 0
    features: int = 256

    @property
    def label(self) -> str:
        return f"{self.rows} of {self.side}x{self.side}, {self.channels or self.codes} {'channels' if self.channels else 'codes'}"


# A guided picture's levels, then those of sixteen.
SHAPES = [Shape(rows, side, channels) for rows in (2, 32) for side, channels in ((32, 640), (16, 1280), (8, 1280))]
# Tokens of one picture and of sixteen.
DRAWN = [Shape(rows, 64, codes=8192) for rows in (1, 16)]


@dataclass(frozen=True, slots=True)
class Case:
    """compare: the kernel's result on fresh inputs, and how good it is. bytes: read and written at the least."""

    name: str
    kernel: Callable[[], Tensor]
    twin: Callable[[], Tensor]
    judge: Callable[[], Check]
    bytes: int


def run(options: Options, results: Results) -> None:
    if options.device.type != "cuda":  # interpreted, they say nothing of the device's
        return
    ceilings = options.ceilings()
    for shape in (*SHAPES, *DRAWN):
        for case in cases(shape, str(options.device), options.dtype):
            check = case.judge()
            row = {
                **asdict(check),
                "value": float(f"{check.value:.3g}"),
                "good": check.good,
                "floor_ms": 1000 * case.bytes / ceilings.bytes,
            }
            kernel, twin = (measure(stage, options.device, options.budget)["p50_ms"] for stage in (case.kernel, case.twin))
            results.add({**row, "shape": str(shape), "kernel_ms": kernel, "twin_ms": twin})


def cases(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """All kernels that such a shape has."""
    if shape.channels:
        yield from (_depthwise(shape, device, dtype, skip) for skip in (False, True))
        yield _response(shape, device, dtype)
    if shape.codes:
        yield _draw(shape, device, dtype, "multinomial")
        yield _draw(shape, device, dtype, "argmax")


def _depthwise(shape: Shape, device: str, dtype: torch.dtype, skip: bool) -> Case:
    from model.kernels.fused.depthwise_norm import depthwise_norm, plain_depthwise_norm, taps_of

    size, C = (shape.rows, shape.side, shape.side, shape.channels), shape.channels
    weight, bias = torch.randn(C, 1 + skip, 3, 3, device=device).to(dtype), torch.randn(C, device=device).to(dtype)
    taps = taps_of(weight)

    def inputs() -> tuple[Tensor, Tensor | None]:
        x, other = (torch.randn(size, device=device).to(dtype) for _ in range(2))
        return x, other if skip else None

    def judge() -> Check:
        x, other = inputs()
        with poisoned_memory():
            found = depthwise_norm(x, other, taps, bias)
        exact = plain_depthwise_norm(x.float(), None if other is None else other.float(), weight.float(), bias.float())
        return Check(name, error(found, exact), LIMITS[dtype])

    name, (x, other) = f"depthwise norm{', skip' if skip else ''}", inputs()
    bytes_ = (2 + skip) * x.nbytes + taps.nbytes
    return Case(name, lambda: depthwise_norm(x, other, taps, bias), lambda: plain_depthwise_norm(x, other, weight, bias), judge, bytes_)


def _response(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    from model.kernels.fused.gelu_response import gelu_response, plain_gelu_response

    size, C = (shape.rows, shape.side**2, 4 * shape.channels), 4 * shape.channels
    gamma, beta = (torch.randn(C, device=device).to(dtype) for _ in range(2))

    def judge() -> Check:
        x = torch.randn(size, device=device).to(dtype)
        with poisoned_memory():
            found = gelu_response(x, gamma, beta)
        return Check(name, error(found, plain_gelu_response(x.float(), gamma.float(), beta.float())), LIMITS[dtype])

    name, x = "GELU and response norm", torch.randn(size, device=device).to(dtype)
    # The scales need all of a picture: it is read twice and written twice.
    return Case(name, partial(gelu_response, x, gamma, beta), partial(plain_gelu_response, x, gamma, beta), judge, 4 * x.nbytes)


def _draw(shape: Shape, device: str, dtype: torch.dtype, sampler: Literal["multinomial", "argmax"]) -> Case:
    from model.kernels.fused.draw import draw, plain_draw

    N, weight = shape.rows * shape.side**2, torch.randn(shape.codes, shape.features, device=device).to(dtype)

    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = (torch.randn(N, shape.features, device=device) / 4).to(dtype)
        return features, weight, torch.rand(N, device=device) + 0.5, torch.rand(N, device=device)

    def judge() -> Check:
        given = inputs()
        with poisoned_memory():
            found = draw(sampler, *given)
        return Check(sampler, agreement(found, plain_draw(sampler, *given)), _DRAWS, agreement=True)

    given = inputs()
    return Case(sampler, lambda: draw(sampler, *given), lambda: plain_draw(sampler, *given), judge, given[0].nbytes + weight.nbytes + 8 * N)
