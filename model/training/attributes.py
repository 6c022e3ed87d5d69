"""Classifying what a caption or picture states: it teaches the small encoders to tell prompts apart before anything is drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training.captions import ATTRIBUTES


class AttributeHeads(nn.Module):
    """One learned query per attribute attends over a sequence, as the denoiser's pixels will; a linear map then names the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * 0.02)
        self.kv = nn.Linear(width, 2 * width)
        self.classes = nn.ModuleDict({name: nn.Linear(width, count) for name, count in ATTRIBUTES.items()})

    def forward(self, sequence: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Sequence [B, L, width], mask [B, L] → logits [B, classes] per attribute."""
        k, v = self.kv(sequence).chunk(2, dim=-1)
        queries = self.queries.to(k.dtype).expand(len(k), -1, -1)
        pooled = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask[:, None, :])
        return {name: head(pooled[:, i]) for i, (name, head) in enumerate(self.classes.items())}


def attribute_loss(logits: dict[str, Tensor], classes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy, worst attribute's accuracy) of logits [B, classes] against class numbers [B]."""
    losses = [F.cross_entropy(logits[name].float(), classes[name]) for name in ATTRIBUTES]
    hits = [(logits[name].argmax(-1) == classes[name]).float().mean() for name in ATTRIBUTES]
    return torch.stack(losses).mean(), torch.stack(hits).min()
