"""Compute the denoiser's last projection and its loss as one function, in parts.

The logits over the codebook, their softmax and autograd's copies of both took a third of a step on
a CPU. Here a few hundred rows at a time go from features to gradients while they are in the cache.
Letters: N positions, c channels, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS_ON_CPU, _ROWS = 256, 32_768  # at a time


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The codes nearest to each code. codes: [K, m]. weights: [K, m], each row sums to 1.

    share: the share of a label that goes to its neighbours.
    """

    codes: Tensor
    weights: Tensor
    share: float

    @classmethod
    @torch.no_grad()
    def of(cls, codebook: Tensor, share: float, count: int = 8) -> Neighbours:
        """Return the `count` nearest codes of each in a codebook [K, c], the nearer the heavier.

        A weight falls to a third at the distance which is usual between a code and its nearest.
        """
        squares = torch.cdist(codebook.float(), codebook.float()).square()
        squares.fill_diagonal_(torch.inf)
        nearest = squares.topk(min(count, len(codebook) - 1), dim=-1, largest=False)
        usual = nearest.values[:, 0].mean()
        return cls(nearest.indices, (-nearest.values / usual).softmax(-1), share)


class _CrossEntropy(torch.autograd.Function):
    """The autograd function of `cross_entropy`: its forward pass computes the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        projection: Tensor,
        target: Tensor,
        weights: Tensor,
        smoothing: float,
        near: Neighbours | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (the weighted sum of errors, the correct positions [N]).

        features: [N, c]. projection: [K, c]. target, weights: [N].
        """
        dtype, K = features.dtype, len(projection)
        W = projection.to(dtype)
        to_features = torch.empty_like(features)
        to_projection = torch.zeros_like(projection, dtype=torch.float32)
        total, right = weights.new_zeros(()), torch.empty_like(target, dtype=torch.bool)
        given = smoothing + (near.share if near is not None else 0.0)
        for part in _parts(features):
            f = features[part]
            t = target[part, None]
            w = weights[part, None]
            z = (f @ W.T).float()
            z -= z.amax(-1, keepdim=True)
            own, mean = z.gather(1, t), z.mean(-1, keepdim=True)
            right[part] = (own == 0)[:, 0]
            wanted = (1 - given) * own + smoothing * mean
            if near is not None:
                around, shares = near.codes[t[:, 0]], near.share * near.weights[t[:, 0]]
                wanted = wanted + (shares * z.gather(1, around)).sum(-1, keepdim=True)
            p = z.exp_()
            sums = p.sum(-1, keepdim=True)
            total += (w * (sums.log() - wanted)).sum()
            p *= w / sums
            p -= w * (smoothing / K)
            p.scatter_add_(1, t, w * (given - 1))
            if near is not None:
                p.scatter_add_(1, around, -w * shares)
            g = p.to(dtype)
            to_features[part] = g @ W
            to_projection += g.T @ f
        ctx.save_for_backward(to_features, to_projection)
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Return the gradients of features and projection, scaled by the sum's gradient."""
        return *_scaled(ctx, gradients[0]), None, None, None, None


def cross_entropy(
    features: Tensor,
    projection: Tensor,
    target: Tensor,
    weights: Tensor,
    smoothing: float,
    near: Neighbours | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (the weighted sum of errors with smoothed labels, the correct positions [N]).

    features: [N, c]. projection: [K, c]. target, weights: [N]. smoothing: the share of a label that
    goes to all codes alike. near: the share that goes to the label's neighbours, and those.
    Products have the features' type, sums are fp32; only features and projection get gradients.
    """
    result: tuple[Tensor, Tensor] = _CrossEntropy.apply(
        features, projection, target, weights.float(), smoothing, near
    )  # type: ignore[no-untyped-call]
    return result


def _scaled(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the saved gradients of features and projection, scaled by the sum's."""
    to_features, to_projection = ctx.saved_tensors
    return (to_features * gradient).to(to_features.dtype), to_projection * gradient


class _Divergence(torch.autograd.Function):
    """The autograd function of `divergence`: its forward pass computes the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        projection: Tensor,
        target: Tensor,
        target_projection: Tensor,
        weights: Tensor,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return (the weighted sum of divergences, where both find the same code likeliest [N]).

        features, target: [N, c]. projection, target_projection: [K, c]. weights: [N].
        """
        dtype = features.dtype
        own, other = projection.to(dtype), target_projection.to(dtype)
        to_features = torch.empty_like(features)
        to_projection = torch.zeros_like(projection, dtype=torch.float32)
        total = weights.new_zeros(())
        agreed = torch.empty_like(weights, dtype=torch.bool)
        for part in _parts(features):
            f = features[part]
            w = weights[part, None]
            log_p = (f @ own.T).float().log_softmax(-1)
            log_q = (target[part].to(dtype) @ other.T).float().log_softmax(-1)
            agreed[part] = log_p.argmax(-1) == log_q.argmax(-1)
            p = log_p.exp()
            if reverse:
                ratio = log_p - log_q
                divergences = (p * ratio).sum(-1, keepdim=True)
                g = w * p * (ratio - divergences)
            else:
                q = log_q.exp()
                divergences = (q * (log_q - log_p)).sum(-1, keepdim=True)
                g = w * (p - q)
            total += (w * divergences).sum()
            g = g.to(dtype)
            to_features[part] = g @ own
            to_projection += g.T @ f
        ctx.save_for_backward(to_features, to_projection)
        ctx.mark_non_differentiable(agreed)
        return total, agreed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Return the gradients of features and projection, scaled by the sum's gradient."""
        return *_scaled(ctx, gradients[0]), None, None, None, None


def divergence(
    features: Tensor,
    projection: Tensor,
    target: Tensor,
    target_projection: Tensor,
    weights: Tensor,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (the weighted sum of KL divergences, where both find the same code likeliest [N]).

    KL(q ‖ p), or KL(p ‖ q) if `reverse`, of p = softmax(projection · features) and the target's q.
    features, target: [N, c]. projection, target_projection: [K, c]. weights: [N]. Products have the
    features' type, sums are fp32; only features and projection get gradients.
    """
    result: tuple[Tensor, Tensor] = _Divergence.apply(
        features, projection, target, target_projection, weights.float(), reverse
    )  # type: ignore[no-untyped-call]
    return result


class _LogProbability(torch.autograd.Function):
    """The autograd function of `log_probability`: its backward pass computes the softmax again."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, projection: Tensor, target: Tensor) -> Tensor:
        """Return log p [N]. features: [N, c]. projection: [K, c]. target: [N]."""
        W = projection.to(features.dtype)
        result = features.new_empty(len(features), dtype=torch.float32)
        total = torch.empty_like(result)
        for part in _parts(features):
            z = (features[part] @ W.T).float()
            total[part] = z.logsumexp(-1)
            result[part] = z.gather(1, target[part, None])[:, 0] - total[part]
        ctx.save_for_backward(features, projection, target, total)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of features and projection, by those of each log p [N]."""
        features, projection, target, total = ctx.saved_tensors
        W = projection.to(features.dtype)
        to_features = torch.empty_like(features)
        to_projection = torch.zeros_like(projection, dtype=torch.float32)
        for part in _parts(features):
            f, w = features[part], gradients[0][part, None]
            p = ((f @ W.T).float() - total[part, None]).exp_()
            g = p.mul_(-w).scatter_add_(1, target[part, None], w).to(f.dtype)
            to_features[part] = g @ W
            to_projection += g.T @ f
        return to_features, to_projection, None


def log_probability(features: Tensor, projection: Tensor, target: Tensor) -> Tensor:
    """Return log p [N] of target codes [N] in softmax(projection · features), in fp32.

    features: [N, c]. projection: [K, c]. Both get gradients; products have the features' type.
    """
    result: Tensor = _LogProbability.apply(features, projection, target)  # type: ignore[no-untyped-call]
    return result


def _parts(features: Tensor) -> Iterator[slice]:
    """Yield the rows that are computed together, of features [N, c]."""
    rows = _ROWS_ON_CPU if features.device.type == "cpu" else _ROWS
    for start in range(0, len(features), rows):
        yield slice(start, start + rows)
