"""Compare Triton's kernels with their plain twins at the published sizes: errors and times.

Inputs are fresh. An error is relative to the twin in fp32, and new memory is spoiled beforehand.
The floor is the time of the bytes that are read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from load_tests.gpu.checks import LIMITS, Check, agreement, error
from load_tests.gpu.options import Options
from load_tests.gpu.recorders import poisoned_memory, recorder_for
from load_tests.gpu.results import Results
from load_tests.gpu.timing import measure
from model import sampling
from model.kernels.cpu import BlockWeights, plain_block

_DRAWS = 0.9
_REPEATS = 10
# Blocks in a row, with weights of their own: one block's would stay in the device's cache, the
# prior's do not.
_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a kernel's inputs; 0: there is none.

    For blocks: rows × side × side pixels of `channels` channels. For draws: tokens of `codes` codes
    and `features` features. For a prior: rows of `prior` channels.
    """

    rows: int
    side: int = 1
    channels: int = 0
    codes: int = 0
    features: int = 256
    prior: int = 0

    @property
    def label(self) -> str:
        kind = "codes" if self.codes else "channels"
        return (
            f"{self.rows} of {self.side}x{self.side}, "
            f"{self.channels or self.codes or self.prior} {kind}"
        )


# A guided picture's levels, then those of sixteen.
SHAPES = [
    Shape(rows, side, channels)
    for rows in (2, 32)
    for side, channels in ((32, 640), (16, 1280), (8, 1280))
]
# Tokens of one picture and of sixteen.
DRAWN = [Shape(rows, 64, codes=8192) for rows in (1, 16)]
# One guided picture, two, and eight.
IMAGINED = [Shape(rows, prior=1280) for rows in (2, 4, 16)]
# Nothing that a power of two divides. They come last: a kernel that is compiled for them alone
# would be compiled while a request waits.
ODD = [Shape(3, 9, 640), Shape(3, 9, 1280), Shape(3, 9, codes=8192), Shape(3, prior=1280)]
ALL_SHAPES = [*SHAPES, *DRAWN, *IMAGINED, *ODD]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape.

    compare: returns the kernel's result on fresh inputs, and its error. bytes: read and written at
    least.
    """

    name: str
    kernel: Callable[[], Tensor]
    twin: Callable[[], Tensor]
    judge: Callable[[], Check]
    bytes: int


def run(options: Options, results: Results) -> None:
    if options.device.type != "cuda":  # interpreted, they say nothing of the device's
        return
    ceilings = options.ceilings()
    for shape in ALL_SHAPES:
        for case in cases(shape, str(options.device), options.dtype):
            check = case.judge()
            judged = {**asdict(check), "value": float(f"{check.value:.3g}"), "good": check.good}
            floor = 1000 * case.bytes / ceilings.bytes
            kernel, twin = (_milliseconds(stage, options) for stage in (case.kernel, case.twin))
            results.add(
                {
                    **judged,
                    "shape": shape.label,
                    "floor_ms": round(floor, 5),
                    "kernel_ms": kernel,
                    "twin_ms": twin,
                }
            )


def _milliseconds(stage: Callable[[], Tensor], options: Options) -> float:
    """Return the milliseconds of one call among many in a graph.

    Small kernels launched one by one would be measured by their launches.
    """

    def repeated() -> Tensor:
        return [stage() for _ in range(_REPEATS)][-1]

    with torch.inference_mode():
        recording = recorder_for(options.device)(repeated)
    return round(measure(recording.replay, options.device, options.budget)["p50_ms"] / _REPEATS, 5)


def cases(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield all kernels of a shape."""
    if shape.channels:
        yield from (_depthwise(shape, device, dtype, skip) for skip in (False, True))
        yield _response(shape, device, dtype)
    if shape.codes:
        yield _draw(shape, device, dtype, "multinomial")
        yield _draw(shape, device, dtype, "argmax")
        yield from (_renoise_and_pin(shape, device, keeping) for keeping in (False, True))
    if shape.prior:
        yield _prior(shape, device, dtype)


def _depthwise(shape: Shape, device: str, dtype: torch.dtype, skip: bool) -> Case:
    from model.kernels.triton.depthwise_norm import depthwise_norm, plain_depthwise_norm, taps_of

    size, C = (shape.rows, shape.side, shape.side, shape.channels), shape.channels
    weight, bias = (
        torch.randn(C, 1 + skip, 3, 3, device=device).to(dtype),
        torch.randn(C, device=device).to(dtype),
    )
    taps = taps_of(weight)

    def inputs() -> tuple[Tensor, Tensor | None]:
        x, other = (torch.randn(size, device=device).to(dtype) for _ in range(2))
        return x, other if skip else None

    def judge() -> Check:
        x, other = inputs()
        with poisoned_memory():
            found = depthwise_norm(x, other, taps, bias)
        exact = plain_depthwise_norm(
            x.float(), None if other is None else other.float(), weight.float(), bias.float()
        )
        return Check(name, error(found, exact), LIMITS[dtype])

    name, (x, other) = f"depthwise norm{', skip' if skip else ''}", inputs()
    bytes_ = (2 + skip) * x.nbytes + taps.nbytes
    return Case(
        name,
        lambda: depthwise_norm(x, other, taps, bias),
        lambda: plain_depthwise_norm(x, other, weight, bias),
        judge,
        bytes_,
    )


def _response(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    from model.kernels.triton.gelu_response import gelu_response, plain_gelu_response

    size, C = (shape.rows, shape.side**2, 4 * shape.channels), 4 * shape.channels
    gamma, beta = (torch.randn(C, device=device).to(dtype) for _ in range(2))

    def judge() -> Check:
        x = torch.randn(size, device=device).to(dtype)
        with poisoned_memory():
            found = gelu_response(x, gamma, beta)
        return Check(
            name,
            error(found, plain_gelu_response(x.float(), gamma.float(), beta.float())),
            LIMITS[dtype],
        )

    name, x = "GELU and response norm", torch.randn(size, device=device).to(dtype)
    # The scales need all of a picture: it is read twice and written twice.
    return Case(
        name,
        partial(gelu_response, x, gamma, beta),
        partial(plain_gelu_response, x, gamma, beta),
        judge,
        4 * x.nbytes,
    )


def _draw(
    shape: Shape, device: str, dtype: torch.dtype, sampler: Literal["multinomial", "argmax"]
) -> Case:
    from model.kernels.triton.draw import draw, plain_draw

    N, weight = (
        shape.rows * shape.side**2,
        torch.randn(shape.codes, shape.features, device=device).to(dtype),
    )

    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = (torch.randn(N, shape.features, device=device) / 4).to(dtype)
        return features, weight, torch.rand(N, device=device) + 0.5, torch.rand(N, device=device)

    def judge() -> Check:
        given = inputs()
        with poisoned_memory():
            found = draw(sampler, *given)
        return Check(sampler, agreement(found, plain_draw(sampler, *given)), _DRAWS, agreement=True)

    given = inputs()
    return Case(
        sampler,
        lambda: draw(sampler, *given),
        lambda: plain_draw(sampler, *given),
        judge,
        given[0].nbytes + weight.nbytes + 8 * N,
    )


def _renoise_and_pin(shape: Shape, device: str, keeping: bool) -> Case:
    from model.kernels.triton.renoise_and_pin import renoise_and_pin

    size = (shape.rows, shape.side, shape.side)

    def inputs() -> tuple[Any, ...]:
        drawn, source, pinned = (torch.randint(shape.codes, size, device=device) for _ in range(3))
        kept = (torch.rand(size, device=device) < 0.5, pinned) if keeping else None
        return (
            drawn,
            source,
            torch.rand(size, device=device),
            torch.rand(shape.rows, device=device),
            kept,
        )

    def judge() -> Check:
        given = inputs()
        with poisoned_memory():
            found = renoise_and_pin(*given)
        return Check(
            name, min(map(agreement, found, sampling.renoise_and_pin(*given))), 1.0, agreement=True
        )

    name, given = f"renoise_and_pin{', keeping' if keeping else ''}", inputs()
    read = sum(part.nbytes for part in (*given[:3], given[0], given[0], *(given[4] or ())))
    return Case(
        name,
        lambda: renoise_and_pin(*given)[1],
        lambda: sampling.renoise_and_pin(*given)[1],
        judge,
        read,
    )


def _prior(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    from model.kernels.triton.prior_block import prior_block

    B, D, inner = shape.rows, shape.prior, 4 * shape.prior
    blocks = [_block_weights(D, inner, device, dtype) for _ in range(_BLOCKS)]

    def run_through(
        block: Callable[[Tensor, Tensor, BlockWeights], Tensor], h: Tensor, extra: Tensor
    ) -> Tensor:
        for weights in blocks:
            h = block(h, extra, weights)
        return h

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(B, D, device=device).to(dtype), torch.randn(B, inner, device=device).to(
            dtype
        )

    def judge() -> Check:
        given, own = inputs(), BlockWeights(*(part.float() for part in blocks[0]))
        with poisoned_memory():
            found = prior_block(*given, blocks[0])
        return Check(
            name, error(found, plain_block(given[0].float(), given[1].float(), own)), LIMITS[dtype]
        )

    name, given = f"prior blocks, {_BLOCKS} of them", inputs()
    read = sum(part.nbytes for weights in blocks for part in (weights.first, weights.last))
    return Case(
        name,
        partial(run_through, prior_block, *given),
        partial(run_through, plain_block, *given),
        judge,
        read,
    )


def _block_weights(D: int, inner: int, device: str, dtype: torch.dtype) -> BlockWeights:
    """Return random weights of a block; the first is a view by columns, as in the prior."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    ones, zeros = (make(inner, device=device, dtype=dtype) for make in (torch.ones, torch.zeros))
    return BlockWeights(
        random(inner, 2 * D)[:, :D].T, ones, zeros, random(D, inner), ones[:D], zeros[:D]
    )
