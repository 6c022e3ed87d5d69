"""Trains the byte encoder on captions alone: every byte's feature learns to say what the whole caption states.

    python -m model.training.byte_encoder --minutes 20

The denoiser then reads its frozen features. Trained jointly from scratch instead, the denoiser learnt to draw long before the encoder
learnt to read, and never listened. Where only a pooled feature had to know, it heard colours and no sides (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from model.text import ByteEncoder
from model.training import loop, tiny
from model.training.attributes import AttributeHeads, attribute_loss
from model.training.captions import describe
from model.training.scenes import sample

_ASKED = 8  # bytes of a caption that must answer


class Reader(nn.Module):
    """The encoder and the heads that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ByteEncoder(tiny.BYTE_ENCODER)
        self.heads = AttributeHeads(tiny.BYTE_ENCODER.d_model)

    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """B captions → logits [B · _ASKED, classes] per attribute, from as many random bytes of each."""
        out = self.encoder(prompts)
        asked = out.mask.float().multinomial(_ASKED, replacement=True)[..., None].expand(-1, -1, out.embeddings.shape[-1])
        return self.heads(out.embeddings.gather(1, asked).flatten(0, 1))


def draw_captions(rng: np.random.Generator, n: int) -> tuple[list[str], dict[str, Tensor]]:
    """n captions of sampled scenes, and the classes [n] they state per attribute."""
    texts, stated = zip(*(describe(sample(rng), rng) for _ in range(n)), strict=True)
    return list(texts), {name: torch.tensor([s[name] for s in stated]) for name in stated[0]}


def similar_lengths(rng: np.random.Generator, batch: int, pool: int = 8) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Endless batches of captions, each of about one length, because padding costs as much as text."""
    while True:
        texts, classes = draw_captions(rng, pool * batch)
        order = np.argsort([len(text) for text in texts], kind="stable")
        for start in batch * rng.permutation(pool):
            chosen = order[start : start + batch]
            yield [texts[i] for i in chosen], {name: values[chosen] for name, values in classes.items()}


def main() -> None:
    o = loop.options(loop.parser(__doc__, name="byte_encoder", batch=128, lr=1e-3, minutes=20).parse_args())
    captions = similar_lengths(np.random.default_rng(o.seed), o.batch)
    trained = Reader().to(o.device).train()

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        prompts, classes = next(captions)
        value, worst = attribute_loss(trained(prompts), {k: v.to(o.device).repeat_interleave(_ASKED) for k, v in classes.items()})
        return value, {"worst": worst}

    loop.fit(trained, loss, o)


if __name__ == "__main__":
    main()
