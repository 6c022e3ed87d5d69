"""Examples to train a denoiser on, and its features of them."""

from __future__ import annotations

import torch

from model.training.features import Examples
from model.training.objective import dropped_condition


@torch.no_grad()
def features(network, x: Examples, t=0.5):
    """Return the features of examples, whose conditions are the same in every call."""
    torch.manual_seed(3)
    condition = dropped_condition(network, x, 0.0)
    torch.manual_seed(4)
    return network.features(x.tokens, network.times(torch.full((len(x.tokens),), t)), condition)


def examples(rows: int, length: int = 6) -> Examples:
    mask = torch.arange(length) < (1 + torch.arange(rows) % length)[:, None]
    clip_text, clip_image = torch.randn(2, rows, 16)
    tokens, byt5 = torch.randint(64, (rows, 8, 8)), torch.randn(rows, length, 16)
    return Examples(tokens, byt5, mask, clip_text, clip_image, empty=mask.sum(-1) == 1)
