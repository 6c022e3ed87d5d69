"""Classifying what a caption or picture states: it teaches the small encoders to tell prompts apart
before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training.captions import ATTRIBUTES

# Of some hundred kinds one is right, of sizes one of three: what is learnt last counts more.
_KIND = 3.0


class AttributeHeads(nn.Module):
    """One linear map per attribute, from a feature to the attribute's classes."""

    def __init__(self, width: int, attributes: Mapping[str, int] = ATTRIBUTES) -> None:
        """Create it. attributes: how many classes each has."""
        super().__init__()
        self.classes = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in attributes.items()}
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Turn features [B, width] into logits [B, classes] per attribute."""
        return {name: head(features) for name, head in self.classes.items()}


def attribute_loss(
    logits: Mapping[str, Tensor], classes: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (mean cross-entropy, worst attribute's accuracy) of logits [B, classes] against class
    numbers [B], −1 where nothing is asked.

    An attribute that nothing is asked about in the whole batch costs nothing and is right.
    """
    losses, hits = [], []
    for name, logit in logits.items():
        asked = (classes[name] >= 0).float()
        count = asked.sum().clamp_min(1)
        errors = F.cross_entropy(logit.float(), classes[name].clamp_min(0), reduction="none")
        losses.append((errors * asked).sum() / count * (_KIND if name.startswith("kind") else 1.0))
        right = (logit.argmax(-1) == classes[name]).float().sum() / count
        hits.append(right.masked_fill(~asked.any(), 1.0))
    return torch.stack(losses).mean(), torch.stack(hits).min()
