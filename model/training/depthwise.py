"""Compute depthwise 3×3 convolutions whose gradients are fast on a GPU.

Channels stay last, and one pass over the pixels gives each gradient. cuDNN's choice for bf16 with
channels last may take tens of times as long, above all for the weight's gradient. `accelerated`
measures on the device at hand whether these kernels are right and faster. Letters: B images, H W
pixels, C channels.
"""

# Triton's functions are another language in Python's syntax.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.networks.blocks_v3 import ConvBlock
from model.networks.layers import channels_first, channels_last
from model.networks.vqgan_v3 import ResidualBlock

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for this machine
    triton = None

_PIXELS, _CHANNELS = 64, 32  # of one program
_CHUNKS = 256  # parts that a weight's gradient is summed in

if triton is not None:
    # A kernel takes every pointer, stride and constant by itself.
    @triton.jit
    def _convolve(  # noqa: PLR0913
        x,
        w,
        bias,
        y,
        H,
        W,
        C,
        HO,
        WO,
        P,
        N,
        has_bias: tl.constexpr,
        BP: tl.constexpr,
        BC: tl.constexpr,
    ):
        """Compute y [B, HO, WO, C] from x [B, H, W, C], padded by P zeros, with taps w [9, C].

        N: B · HO · WO.
        """
        pixel = tl.program_id(0) * BP + tl.arange(0, BP)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        image = pixel // (HO * WO)
        row = (pixel % (HO * WO)) // WO
        column = pixel % WO
        kept = (pixel < N)[:, None] & (c < C)[None, :]
        total = tl.zeros((BP, BC), tl.float32)
        if has_bias:
            total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(9):
            i = row + tap // 3 - P
            j = column + tap % 3 - P
            inside = kept & ((i >= 0) & (i < H) & (j >= 0) & (j < W))[:, None]
            place = ((image * H + i) * W + j).to(tl.int64)[:, None] * C + c[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            total += value * tl.load(w + tap * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y + pixel.to(tl.int64)[:, None] * C + c[None, :],
            total.to(y.dtype.element_ty),
            mask=kept,
        )

    @triton.jit
    def _weight_gradient(  # noqa: PLR0913
        x, g, parts, H, W, C, HO, WO, P, N, per, BP: tl.constexpr, BC: tl.constexpr
    ):
        """Compute partial sums [chunks, 9, C] of the weight's gradient, over `per` pixels each.

        They sum g [B, HO, WO, C] times x [B, H, W, C] at the place where each tap read it.
        """
        chunk, tap = tl.program_id(0), tl.program_id(2)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        total = tl.zeros((BC,), tl.float32)
        for start in range(0, per, BP):
            offset = start + tl.arange(0, BP)
            pixel = chunk * per + offset
            image = pixel // (HO * WO)
            i = (pixel % (HO * WO)) // WO + tap // 3 - P
            j = pixel % WO + tap % 3 - P
            kept = (pixel < N) & (offset < per)
            inside = (kept & (i >= 0) & (i < H) & (j >= 0) & (j < W))[:, None] & (c < C)[None, :]
            own = tl.load(
                g + pixel.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            place = ((image * H + i) * W + j).to(tl.int64)[:, None] * C + c[None, :]
            total += tl.sum(own * tl.load(x + place, mask=inside, other=0.0).to(tl.float32), axis=0)
        tl.store(parts + (chunk * 9 + tap) * C + c, total, mask=c < C)


def _launch(x: Tensor, taps: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    B, H, W, C = x.shape
    HO, WO = H + 2 * padding - 2, W + 2 * padding - 2
    y = torch.empty(B, HO, WO, C, dtype=x.dtype, device=x.device)
    N = B * HO * WO
    grid = (triton.cdiv(N, _PIXELS), triton.cdiv(C, _CHANNELS))
    _convolve[grid](
        x,
        taps,
        taps if bias is None else bias,
        y,
        H,
        W,
        C,
        HO,
        WO,
        padding,
        N,
        has_bias=bias is not None,
        BP=_PIXELS,
        BC=_CHANNELS,
    )
    return y


class _Depthwise(torch.autograd.Function):
    """The convolution of x [B, H, W, C] to [B, H + 2·padding − 2, W + 2·padding − 2, C].

    x is contiguous; weight: [C, 1, 3, 3]; bias: [C].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        """Return the convolution, computed by the Triton kernel."""
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _launch(x, weight.flatten(1).T.contiguous(), bias, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        g, P = gradients[0].contiguous(), ctx.padding
        to_x = (
            _launch(g, weight.flatten(1).flip(1).T.contiguous(), None, 2 - P)
            if ctx.needs_input_grad[0]
            else None
        )
        B, H, W, C = x.shape
        HO, WO = g.shape[1:3]
        N = B * HO * WO
        per = -(-max(_PIXELS, -(-N // _CHUNKS)) // _PIXELS) * _PIXELS
        parts = torch.empty(-(-N // per), 9, C, dtype=torch.float32, device=x.device)
        grid = (len(parts), triton.cdiv(C, _CHANNELS), 9)
        _weight_gradient[grid](x, g, parts, H, W, C, HO, WO, P, N, per, BP=_PIXELS, BC=_CHANNELS)
        to_weight = parts.sum(0).T.reshape(weight.shape).to(weight.dtype)
        return to_x, to_weight, g.sum((0, 1, 2), dtype=torch.float32).to(weight.dtype), None


def _product_type(x: Tensor) -> torch.dtype:
    """Return the type that autocast would compute in."""
    return (
        torch.get_autocast_dtype(x.device.type)
        if torch.is_autocast_enabled(x.device.type)
        else x.dtype
    )


def by_triton(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolve x [B, H, W, C] with the Triton kernels of this module."""
    y: Tensor = _Depthwise.apply(x.to(_product_type(x)).contiguous(), weight, bias, padding)  # type: ignore[no-untyped-call]
    return y


def by_library(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolve x [B, H, W, C] with torch, channels last."""
    return channels_last(
        F.conv2d(channels_first(x), weight, bias, padding=padding, groups=len(weight))
    )


def by_planes(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolve x [B, H, W, C] with torch, each channel as a contiguous plane."""
    return channels_last(
        F.conv2d(channels_first(x).contiguous(), weight, bias, padding=padding, groups=len(weight))
    )


Way = Callable[[Tensor, Tensor, Tensor, int], Tensor]
WAYS: dict[str, Way] = {"triton": by_triton, "planes": by_planes, "library": by_library}


def _seconds(
    way: Way, shape: tuple[int, int, int, int], device: torch.device, times: int = 5
) -> float:
    """Return the seconds of one forward and backward pass.

    Raises ArithmeticError if the result or a gradient is not that of fp32.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device)
    weight = torch.randn(shape[-1], 1, 3, 3, generator=generator, device=device)
    bias = torch.randn(shape[-1], generator=generator, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def compute(own: Way, half: bool) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            y = own(x, weight, bias, 1)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), leaves)]

    expected, found = compute(by_library, False), compute(way, True)
    for a, b in zip(expected, found, strict=True):
        if not (a.float() - b.float()).norm() <= 3e-2 * a.float().norm():
            raise ArithmeticError("not the same")
    _settle(device)
    start = time.perf_counter()
    for _ in range(times):
        compute(way, True)
    _settle(device)
    return (time.perf_counter() - start) / times


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(shape: tuple[int, int, int, int], device: torch.device) -> Way:
    """Return the fastest of WAYS with correct results, for inputs of this shape on this device."""
    taken: dict[str, float] = {}
    for name, way in WAYS.items():
        try:
            taken[name] = _seconds(way, shape, device)
        except Exception as error:  # any error of a compiler or a library: there are other ways
            print(
                f"depthwise, {name}: {type(error).__name__}: {str(error)[:200]}",
                file=sys.stderr,
                flush=True,
            )
            _settle(device)
    if not taken:
        return by_library
    print(
        f"depthwise {shape}: " + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in taken.items()),
        file=sys.stderr,
        flush=True,
    )
    return WAYS[min(taken, key=lambda name: taken[name])]


@contextmanager
def accelerated(module: nn.Module, batch: int, side: int) -> Iterator[None]:
    """Redirect a network's depthwise convolutions to the fastest way, for this context.

    module: a denoiser or a VQGAN, or holds one.

    On CUDA the ways are compared at `batch` grids of side², the widest of the network. On another
    device nothing changes.
    """
    blocks: list[Any] = [
        block for block in module.modules() if isinstance(block, ConvBlock | ResidualBlock)
    ]
    device = next(module.parameters()).device
    if device.type != "cuda" or not blocks:
        yield
        return
    width = min(block.channelwise[0].in_features for block in blocks)
    way = fastest((batch, side, side, width), device)
    for block in blocks:
        _redirect(block, way)
    try:
        yield
    finally:
        for block in blocks:
            for name in ("_depthwise", "_depthwise_pairs", "forward"):
                block.__dict__.pop(name, None)


def _redirect(block: Any, way: Way) -> None:
    if isinstance(block, ResidualBlock):
        block.__dict__["forward"] = MethodType(_residual_way(way), block)
        return

    def single(self: Any, x: Tensor) -> Tensor:
        return way(x, self.depthwise.weight, self.depthwise.bias, 1)

    def pairs(self: Any, x: Tensor) -> Tensor:
        weight = self._single_depthwise()
        y = way(x, weight, torch.zeros_like(weight[:, 0, 0, 0]), 1).unflatten(-1, (-1, 2))
        return y[..., 0] + y[..., 1] + self.depthwise.bias

    block._depthwise, block._depthwise_pairs = MethodType(single, block), MethodType(pairs, block)


def _residual_way(way: Way) -> Callable[[Any, Tensor], Tensor]:
    from model.networks.layers import norm

    def forward(self: Any, x: Tensor) -> Tensor:
        """Compute as `ResidualBlock.forward` does."""
        g = self.gammas
        y = channels_first(torch.addcmul(g[1], norm(x), 1 + g[0]))
        y = channels_last(F.pad(y, (1, 1, 1, 1), mode="replicate"))
        x = torch.addcmul(x, way(y, self.depthwise[1].weight, self.depthwise[1].bias, 0), g[2])
        y = self.channelwise(torch.addcmul(g[4], norm(x), 1 + g[3]))
        return torch.addcmul(x, y, g[5])

    return forward
