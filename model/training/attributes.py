"""Classify the attributes that a caption or an image states.

The small encoders learn to tell prompts apart this way, before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training.captions import ATTRIBUTES

# One of some hundred kinds is right, but one of three sizes: kinds are learnt last and count more.
_KIND = 3.0


class AttributeHeads(nn.Module):
    """One linear map per attribute, from a feature [B, width] to the attribute's classes.

    attributes: the number of classes of each attribute.
    """

    def __init__(self, width: int, attributes: Mapping[str, int] = ATTRIBUTES) -> None:
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
    """Return the mean cross-entropy, and the accuracy of the worst attribute.

    logits: [B, classes] per attribute. classes: [B], class numbers, −1 where the attribute is not
    asked for. An attribute that no row asks for costs nothing and counts as right.
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
