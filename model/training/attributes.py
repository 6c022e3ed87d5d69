"""Classifying what a caption or picture states: it teaches the small encoders to tell prompts apart before anything is drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training.captions import ATTRIBUTES


class AttributeHeads(nn.Module):
    """One linear map per attribute, from a feature to the attribute's classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(width, count) for name, count in ATTRIBUTES.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Features [B, width] → logits [B, classes] per attribute."""
        return {name: head(features) for name, head in self.classes.items()}


def attribute_loss(logits: dict[str, Tensor], classes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy, worst attribute's accuracy) of logits [B, classes] against class numbers [B]."""
    losses = [F.cross_entropy(logits[name].float(), classes[name]) for name in ATTRIBUTES]
    hits = [(logits[name].argmax(-1) == classes[name]).float().mean() for name in ATTRIBUTES]
    return torch.stack(losses).mean(), torch.stack(hits).min()
