"""Linear maps with int8 weights and a scale per output: half the memory of fp16.

They serve encoders that run once per prompt.

Only the weights are rounded; they are multiplied in the type of what comes in, one layer's at a
time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear map [..., I] → [..., O] with weights rounded to 255 steps.

    The steps lie between each row's extremes.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, twin: nn.Linear) -> None:
        super().__init__()
        wide = twin.weight.detach().float()
        scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (wide / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if twin.bias is None else twin.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the map for x [..., I]."""
        y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def to_int8(module: nn.Module) -> None:
    """Replace every linear map in a module by its int8 form, one after the other."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
