"""Training's own attention is torch's, with the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.attention import PlainAttention


def inputs(B: int, h: int, Q: int, K: int, d: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    pixels, condition = torch.randn(B, Q, 3 * h * d), torch.randn(B, K, 2 * h * d)
    return pixels.requires_grad_(), condition.requires_grad_()


def attended(pixels: Tensor, condition: Tensor, h: int, bias: Tensor | None) -> Tensor:
    """Attend as a denoiser's block does: to views of projections."""
    q = pixels[..., : pixels.shape[-1] // 3].unflatten(-1, (h, -1)).transpose(1, 2)
    k, v = condition.unflatten(-1, (2, h, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("masked", [False, True])
def test_results_and_gradients_are_those_of_torch(masked: bool) -> None:
    bias = torch.zeros(3, 1, 1, 7)
    bias[1, ..., 4:] = -torch.inf
    results = []
    for own in (False, True):
        pixels, condition = inputs(3, 2, 5, 7, 4)
        if own:
            with PlainAttention():
                y = attended(pixels, condition, 2, bias if masked else None)
            assert "_Attention" in type(y.grad_fn).__name__
        else:
            y = attended(pixels, condition, 2, bias if masked else None)
        results.append([y, *torch.autograd.grad(y.square().sum(), [pixels, condition])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_any_other_call_is_torch_s_own() -> None:
    q = torch.randn(1, 2, 5, 4)
    with PlainAttention():
        causal = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        total = q.sum()
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert total == q.sum()
