"""Try the kernels on their device: on small random inputs, each beside its plain twin.

The inputs are as wide as the network's, because a kernel is compiled anew for every width: a device
may have the registers and the shared memory for one, and not for the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import sampling
from model.kernels.cpu import BlockWeights, plain_block
from model.kernels.triton.depthwise_norm import depthwise_norm, plain_depthwise_norm, taps_of
from model.kernels.triton.draw import SAMPLERS, Fused, draw, plain_draw, supported
from model.kernels.triton.gelu_response import gelu_response, plain_gelu_response
from model.kernels.triton.prior_block import prior_block
from model.kernels.triton.renoise_and_pin import renoise_and_pin
from model.network_config import DenoiserConfig, PriorConfig

_ERROR, _AGREEMENT = 0.05, 0.9
_TOKENS = 70

Random = Callable[..., Tensor]


def disagreeing(
    device: torch.device, dtype: torch.dtype, config: DenoiserConfig | PriorConfig
) -> list[str]:
    """Name the network's kernels whose results are not their twins'.

    Raises the error of a kernel that does not compile.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if isinstance(config, PriorConfig):
        return [] if _prior_error(random, config) < _ERROR else ["prior_block"]
    wrong = [
        f"{name} of {C} channels"
        for C in sorted({*config.c_hidden})
        for name, error in _errors(random, C).items()
        if not error < _ERROR
    ]
    wrong += [
        f"{sampler} draw"
        for sampler in SAMPLERS
        if not _agreement(sampler, random, config) >= _AGREEMENT
    ]
    return wrong if _moves_tokens(random) else [*wrong, "renoise_and_pin"]


def _errors(random: Random, C: int) -> dict[str, float]:
    """Return the errors of a convolution block's kernels. NaN is no small error."""
    x, skip, bias = random(2, 5, 6, C), random(2, 5, 6, C), random(C)
    errors = {}
    for name, other, inputs in (
        ("depthwise_norm", None, 1),
        ("depthwise_norm with a skip", skip, 2),
    ):
        weight = random(C, inputs, 3, 3)
        errors[name] = _error(
            depthwise_norm(x, other, taps_of(weight), bias),
            plain_depthwise_norm(x, other, weight, bias),
        )
    response = random(2, 30, 4 * C), random(4 * C), random(4 * C)
    errors["gelu_response"] = _error(gelu_response(*response), plain_gelu_response(*response))
    return errors


def _agreement(sampler: Fused, random: Random, config: DenoiserConfig) -> float:
    """Return the share of tokens with the twin's code; 1 for a sampler without a kernel."""
    features, weight = (
        random(_TOKENS, config.c_out) / config.c_out**0.5,
        random(config.num_labels, config.c_out),
    )
    if not supported(sampler, weight):
        return 1.0
    given = features, weight, random(_TOKENS).float().exp(), random(_TOKENS).float().sigmoid()
    return (draw(sampler, *given) == plain_draw(sampler, *given)).float().mean().item()


def _moves_tokens(random: Random) -> bool:
    """Return whether all renoised tokens are the twin's: they are moved, not computed."""
    drawn, source, pinned = (random(2, 5, 6).mul(100).long() for _ in range(3))
    given = drawn, source, random(2, 5, 6).float().sigmoid(), random(2).float().sigmoid()
    results = (
        (renoise_and_pin(*given, kept), sampling.renoise_and_pin(*given, kept))
        for kept in (None, (random(2, 5, 6) > 0, pinned))
    )
    return all(
        torch.equal(torch.stack(found), torch.stack(expected)) for found, expected in results
    )


def _prior_error(random: Random, config: PriorConfig) -> float:
    D, inner = config.c_hidden, 4 * config.c_hidden
    first = (random(inner, D + config.clip_r + config.c_r) / D**0.5)[:, :D].T
    weights = BlockWeights(
        first, random(inner), random(inner), random(D, inner) / inner**0.5, random(D), random(D)
    )
    given = random(3, D), random(3, inner), weights
    return _error(prior_block(*given), plain_block(*given))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
