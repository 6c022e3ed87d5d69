"""Linear maps and depthwise convolutions whose weights lie as the CPU's kernels read them, instead of being rearranged in every call.

The operators are those that `torch.compile` calls for frozen weights. Eager PyTorch offers no public way to them, so each stands beside its
plain twin (the module it was made from), and `supported` says whether this build and these weights have them. Weights are copied: change
them afterwards, and the packed ones stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "gelu", "gelu_tanh"]
# What the fused operator calls each, and which way of computing it.
_POINTWISE = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
LinearMap = Callable[[Tensor], Tensor]


def supported(weight: Tensor) -> bool:
    """Whether a weight can be packed: fp32 on any x86 CPU, bf16 where oneDNN computes in it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and torch.backends.mkl.is_available()


def linear_map(weight: Tensor, bias: Tensor | None, rows: int | None, activation: Activation = "none") -> LinearMap:
    """[..., I] → [..., O] by a packed weight where there can be one, by the plain one elsewhere.

    rows: as for `PackedLinear`; None: plain, nothing is copied.
    """
    if rows is not None and supported(weight):
        return PackedLinear(weight, bias, rows, activation)
    if activation == "none":
        return lambda x: F.linear(x, weight, bias)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return lambda x: F.gelu(F.linear(x, weight, bias), approximate=approximate)


class PackedLinear:
    """[..., I] → [..., O], as `nn.functional.linear`, then GELU, exact or by a hyperbolic tangent, if asked for.

    rows: what the product of all other dimensions will mostly be. Another number is computed as exactly, only less fast.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, activation: Activation = "none") -> None:
        self.weight, self.bias, self.rows, self.activation = weight, bias, rows, activation
        # MKL multiplies fp32 fastest, but only oneDNN does the GELU on the way.
        self.mkl = activation == "none" and weight.dtype == torch.float32
        reorder = torch.ops.mkl._mkl_reorder_linear_weight if self.mkl else torch.ops.mkldnn._reorder_linear_weight
        self.packed: Tensor = reorder(weight.detach().contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.mkl:
            y: Tensor = torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)
            return y
        name, algorithm = _POINTWISE[self.activation]
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return y


class PackedDepthwise:
    """A depthwise convolution [B, H, W, C] → [B, H, W, C] for weights [C, 1, k, k].

    shape: what the input's will mostly be. Another is computed as exactly, only less fast. padding: zeros on each side, as many as keep the
    size unless given.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shape: tuple[int, int, int, int], padding: int | None = None) -> None:
        (B, H, W, C), zeros = shape, [k // 2 if padding is None else padding for k in weight.shape[2:]]
        self.bias, self.geometry = bias, (zeros, [1, 1], [1, 1], C)  # padding, stride, dilation, groups
        self.packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *self.geometry, [B, C, H, W])

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x.permute(0, 3, 1, 2), self.packed, self.bias, *self.geometry, "none", [], "")
        return y.permute(0, 2, 3, 1)
