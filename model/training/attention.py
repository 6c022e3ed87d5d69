"""Compute attention over few positions with its gradients, for training on a CPU.

The fused attention's backward pass takes twice the time of plain products there, and those that
autograd writes down for the plain ones multiply transposed views, some of which are a hundred times
slower in bf16 than the same products of contiguous tensors. Letters: B rows, h heads, Q queries, K
keys, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Attention(torch.autograd.Function):
    """The autograd function of `attention`; it keeps the weights for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, h, Q, d]."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        scores = q @ k.transpose(-1, -2)
        scores *= q.shape[-1] ** -0.5
        if bias is not None:
            scores += bias
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of q, k and v."""
        q, k, v, weights = ctx.saved_tensors
        out = gradients[0].contiguous()
        to_v = weights.transpose(-1, -2) @ out
        to_weights = out @ v.transpose(-1, -2)
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        to_scores *= q.shape[-1] ** -0.5
        return to_scores @ k, to_scores.transpose(-1, -2) @ q, to_v, None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √d + bias) v: [B, h, Q, d].

    q: [B, h, Q, d]. k, v: [B, h, K, d]. bias: added to the scores, [B, 1, 1, K]; it gets no
    gradient.
    """
    result: Tensor = _Attention.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
    return result


class PlainAttention(TorchFunctionMode):
    """Within it torch's attention is `attention`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the one function and call any other."""
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and given.keys() <= {"attn_mask"}:
            q, k, v = args
            return attention(q, k, v, given.get("attn_mask"))
        return func(*args, **given)
