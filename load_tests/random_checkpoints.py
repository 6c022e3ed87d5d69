"""Write checkpoints of random values, of any size, in the published layout.

They are pickles of bare state dicts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.bundle import build, state_of
from model.config import BundleConfig

# Random numbers are drawn once and repeated: what is measured does not depend on them, and drawing
# a billion takes longer than it all.
_DRAWN = 2**20


def write_checkpoints(config: BundleConfig, directory: Path) -> None:
    """Write `NETWORK.pt` for every network, in bfloat16. One network is in memory at a time."""
    values = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))
    for name, module in build(config, None).networks():
        state = {key: random_like(tensor, values) for key, tensor in state_of(module).items()}
        # Variances are not negative.
        state.update(
            {key: tensor.abs() for key, tensor in state.items() if key.endswith("running_var")}
        )
        torch.save(state, directory / f"{name}.pt")


def random_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return a random tensor of this shape on the CPU.

    Its values are spread as in a fresh network, so that activations stay in bounds.
    """
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
    scaled = (values * fan_in**-0.5).to(torch.bfloat16)
    repeats = -(-tensor.numel() // len(scaled))
    return scaled.repeat(repeats)[: tensor.numel()].view(tensor.shape).clone()
