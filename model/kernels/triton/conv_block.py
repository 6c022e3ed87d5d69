"""A C block of the v3 denoiser in six launches instead of some twenty.

`model.networks.blocks_v3.ConvBlock` is the twin.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.triton.depthwise_norm import depthwise_norm, taps_of
from model.kernels.triton.gelu_response import gelu_response


class FusedConvBlock:
    """A C block with fused kernels: [B, H, W, C] → [B, H, W, C].

    A skip of the same shape is read where the convolution has two inputs per channel.

    The convolution's weight is copied; the others are the module's own.
    """

    def __init__(
        self,
        depthwise: nn.Conv2d,
        expand: nn.Linear,
        response: tuple[Tensor, Tensor],
        contract: nn.Linear,
    ) -> None:
        if depthwise.bias is None:
            raise ValueError("the kernel adds a bias")
        self.taps, self.bias = taps_of(depthwise.weight), depthwise.bias
        self.expand, self.contract = expand, contract
        self.gamma, self.beta = (each.flatten() for each in response)

    @staticmethod
    def supports(depthwise: nn.Conv2d) -> bool:
        """Return whether the kernel size is the published one, with 1 or 2 inputs per channel."""
        return depthwise.kernel_size == (3, 3) and depthwise.weight.shape[1] <= 2

    def __call__(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Compute the block; shapes as in the class."""
        skip = None if skip is None else skip.contiguous()
        y = self.expand(depthwise_norm(x.contiguous(), skip, self.taps, self.bias))
        y = gelu_response(y.flatten(1, 2), self.gamma, self.beta)
        return x + F.linear(y, self.contract.weight, self.contract.bias).view_as(x)
