"""A trial of the kernels where they are to run: on small random inputs, each beside its plain twin."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.fused.depthwise_norm import depthwise_norm, plain_depthwise_norm, taps_of
from model.kernels.fused.draw import SAMPLERS, draw, plain_draw
from model.kernels.fused.gelu_response import gelu_response, plain_gelu_response

_ERROR, _AGREEMENT = 0.05, 0.9
_C = 64


def disagreeing(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels whose results are not their twins'. Raises whatever a kernel raises that does not compile there."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x, skip, bias = random(2, 5, 6, _C), random(2, 5, 6, _C), random(_C)
    errors = {}
    for name, other, inputs in (("depthwise_norm", None, 1), ("depthwise_norm with a skip", skip, 2)):
        weight = random(_C, inputs, 3, 3)
        errors[name] = _error(depthwise_norm(x, other, taps_of(weight), bias), plain_depthwise_norm(x, other, weight, bias))
    response = x.flatten(1, 2), random(_C), bias
    errors["gelu_response"] = _error(gelu_response(*response), plain_gelu_response(*response))
    given = random(70, _C) / 8, random(200, _C), random(70).float().exp(), torch.rand(70, generator=generator, device=device)
    same = {f"{sampler} draw": (draw(sampler, *given) == plain_draw(sampler, *given)).float().mean().item() for sampler in SAMPLERS}
    wrong = [name for name, error in errors.items() if not error < _ERROR]  # NaN is no small error
    return wrong + [name for name, share in same.items() if share < _AGREEMENT]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
