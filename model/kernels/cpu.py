"""Compute operations without Triton: packed weights on the CPU, and the prior's block.

Packed linear maps and convolutions have their weights laid out as the CPU's kernels read
them. The operators are those that `torch.compile` calls for frozen weights; without them each call
rearranges the weights again. Eager PyTorch offers no public way to them, so each stands beside its
plain twin (the module it was made from), and `supported` tries all of them once before any is used.
Weights are copied: later changes of the originals do not reach the packed ones.

Letters: B rows, D channels of the prior's residual stream, I inner channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Activation = Literal["none", "gelu", "gelu_tanh"]
# What the fused operator calls each, and which way of computing it.
_POINTWISE = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
LinearMap = Callable[[Tensor], Tensor]
# The largest relative error of a packed form beside its twin; bf16 has eight bits.
_ERROR = 0.05


def supported(weight: Tensor) -> bool:
    """Return whether weights of this type on this device can be packed: fp32 and bf16 on x86 CPUs.

    The first call for a type tries every operator beside its plain twin. An operator that is
    missing, raises or disagrees costs one line in the log, and everything of that type stays plain.
    """
    return weight.device.type == "cpu" and _passes_trial(weight.dtype)


@cache
def _passes_trial(dtype: torch.dtype) -> bool:
    try:
        if not _offered(dtype):
            return False
        wrong = disagreeing(dtype)
    except Exception:  # a private operator may be gone, or take other arguments
        log.warning(
            "packed CPU kernels failed, plain ones compute instead: %s", dtype, exc_info=True
        )
        return False
    if wrong:
        log.warning(
            "packed CPU kernels disagree, plain ones compute instead: %s: %s",
            dtype,
            ", ".join(wrong),
        )
    return not wrong


def _offered(dtype: torch.dtype) -> bool:
    """Return whether torch was built with the kernels and the CPU has the arithmetic."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and torch.backends.mkl.is_available()


@torch.inference_mode()
def disagreeing(dtype: torch.dtype) -> list[str]:
    """Name the packed forms whose results are not their twins', on small random inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    wrong = []
    weight, bias, x = random(40, 24), random(40), random(6, 24)
    for activation in get_args(Activation):
        packed, plain = (
            PackedLinear(weight, bias, len(x), activation),
            _plain_map(weight, bias, activation),
        )
        # The second input has another number of rows than the weights were packed for.
        if not all(_agree(packed(given), plain(given)) for given in (x, x[:5])):
            wrong.append(f"linear map, activation {activation}")
    residual, packed = random(6, 40), PackedLinear(weight, bias, len(x))
    if not _agree(packed.add_to(residual, x), residual + F.linear(x, weight, bias)):
        wrong.append("linear map added to a residual")
    kernel, offset, image = random(24, 1, 3, 3), random(24), random(1, 8, 8, 24)
    for padding in (0, 1):
        depthwise = PackedDepthwise(kernel, offset, (1, 8, 8, 24), padding)
        expected = F.conv2d(image.permute(0, 3, 1, 2), kernel, offset, padding=padding, groups=24)
        if not _agree(depthwise(image), expected.permute(0, 2, 3, 1)):
            wrong.append(f"depthwise convolution, padding {padding}")
    weight = random(24, 16, 4, 4)
    transposed = PackedTransposed(weight, random(16), (1, 8, 8, 24), [2, 2], [1, 1])
    for given in (image, image[:, :5]):
        expected = F.conv_transpose2d(
            given.permute(0, 3, 1, 2), weight, transposed.bias, stride=2, padding=1
        )
        if not _agree(transposed(given), expected.permute(0, 2, 3, 1)):
            wrong.append("transposed convolution")
    return wrong


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Compare within the roundings of bf16; NaN never agrees."""
    if found.shape != expected.shape:
        return False
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(error < _ERROR)


def linear_map(
    weight: Tensor, bias: Tensor | None, rows: int | None, activation: Activation = "none"
) -> LinearMap:
    """Return a linear map [..., I] → [..., O], packed where that is supported.

    rows: as for `PackedLinear`; None: plain, nothing is copied.
    """
    if rows is not None and supported(weight):
        return PackedLinear(weight, bias, rows, activation)
    return _plain_map(weight, bias, activation)


def _plain_map(weight: Tensor, bias: Tensor | None, activation: Activation) -> LinearMap:
    if activation == "none":
        return lambda x: F.linear(x, weight, bias)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return lambda x: F.gelu(F.linear(x, weight, bias), approximate=approximate)


class PackedLinear:
    """A linear map [..., I] → [..., O] as `nn.functional.linear`, then GELU if asked for.

    rows: what the product of all other dimensions will mostly be. Another number is computed as
    exactly, only less fast.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, activation: Activation = "none"
    ) -> None:
        self.weight, self.bias, self.rows, self.activation = weight, bias, rows, activation
        # MKL multiplies fp32 fastest, but only oneDNN does the GELU on the way.
        self.mkl = activation == "none" and weight.dtype == torch.float32
        reorder = (
            torch.ops.mkl._mkl_reorder_linear_weight
            if self.mkl
            else torch.ops.mkldnn._reorder_linear_weight
        )
        self.packed: Tensor = reorder(weight.detach().contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the map for x [..., I]."""
        if torch.compiler.is_exporting():
            return _plain_map(self.weight, self.bias, self.activation)(x)
        if self.mkl:
            y: Tensor = torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)
            return y
        name, algorithm = _POINTWISE[self.activation]
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return y

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Compute residual [..., O] plus the map for x [..., I], whose activation is "none"."""
        if self.mkl or torch.compiler.is_exporting():
            return residual + self(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.packed, self.bias, "add"
        )
        return y


class PackedDepthwise:
    """A depthwise convolution [B, H, W, C] → [B, H, W, C] for weights [C, 1, k, k].

    shape: what the input's will mostly be. Another is computed as exactly, only less fast. padding:
    zeros on each side, as many as keep the size unless given.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int, int, int],
        padding: int | None = None,
    ) -> None:
        (B, H, W, C), zeros = (
            shape,
            [k // 2 if padding is None else padding for k in weight.shape[2:]],
        )
        self.weight = weight.detach()
        self.bias, self.geometry = (
            bias,
            (zeros, [1, 1], [1, 1], C),
        )  # padding, stride, dilation, groups
        self.packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach(), *self.geometry, [B, C, H, W]
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the convolution for x [B, H, W, C]."""
        if torch.compiler.is_exporting():
            padding, _, _, groups = self.geometry
            return F.conv2d(
                x.permute(0, 3, 1, 2), self.weight, self.bias, padding=padding, groups=groups
            ).permute(0, 2, 3, 1)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2), self.packed, self.bias, *self.geometry, "none", [], ""
        )
        return y.permute(0, 2, 3, 1)


class PackedTransposed:
    """A transposed convolution [B, H, W, I] → [B, H', W', O] for weights [I, O, k, k].

    shape: what the input's will mostly be. Another is computed as exactly, only less fast.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int, int, int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> None:
        B, H, W, C = shape
        self.bias = bias
        self.weight = weight.detach()
        # padding, output padding, stride, dilation, groups
        self.geometry = (padding, [0, 0], stride, [1, 1], 1)
        self.packed: Tensor = torch.ops.mkldnn._reorder_convolution_transpose_weight(
            weight.detach(), *self.geometry, [B, C, H, W]
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the convolution for x [B, H, W, I]."""
        if torch.compiler.is_exporting():
            padding, _, stride, _, _ = self.geometry
            return F.conv_transpose2d(
                x.permute(0, 3, 1, 2), self.weight, self.bias, stride=stride, padding=padding
            ).permute(0, 2, 3, 1)
        y: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
            x.permute(0, 3, 1, 2), self.packed, self.bias, *self.geometry, "none", [], ""
        )
        return y.permute(0, 2, 3, 1)


# ── the prior's block ─────────────────────────────────────────────────────────────────────────────


class BlockWeights(NamedTuple):
    """Weights of one block of the prior, without the columns that read the text and the time.

    Attributes:
        first: [D, I], a view by columns.
        scale: [I], of the first layer norm.
        shift: [I], of the first layer norm.
        last: [D, I].
        last_scale: [D], of the last layer norm.
        last_shift: [D], of the last layer norm.
    """

    first: Tensor
    scale: Tensor
    shift: Tensor
    last: Tensor
    last_scale: Tensor
    last_shift: Tensor


def plain_block(h: Tensor, extra: Tensor, w: BlockWeights) -> Tensor:
    """Compute a block of the prior in plain operators, on any device; Triton's form is its twin.

    h: [B, D]. extra: the text's and the time's part, [B, I]. Returns [B, D].
    """
    y = torch.addmm(extra, h, w.first)
    y = F.gelu(F.layer_norm(y, y.shape[-1:], w.scale, w.shift))
    return h + F.layer_norm(F.linear(y, w.last), h.shape[-1:], w.last_scale, w.last_shift)


# What computes one block: h [B, D], the text's and time's part [B, I], its weights → [B, D].
BlockFn = Callable[[Tensor, Tensor, BlockWeights], Tensor]
