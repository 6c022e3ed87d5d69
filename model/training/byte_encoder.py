"""Trains the byte encoder on captions alone: every byte's feature learns to say what the whole caption states, and what the thing is like
that the byte is about.

    python -m model.training.byte_encoder --minutes 20

The denoiser then reads its frozen features. Trained jointly from scratch instead, the denoiser learnt to draw long before the encoder
learnt to read, and never listened. Where only a pooled feature had to know, it heard colours and no sides; where every byte knew the whole
and nothing of its own, all bytes were alike, attention had nothing to choose from, and of two things the colours came out mixed
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from model.text import ByteEncoder
from model.training import loop, tiny
from model.training.attributes import AttributeHeads, attribute_loss
from model.training.captions import ATTRIBUTES, THING_ATTRIBUTES, Caption, describe
from model.training.scenes import sample

_ASKED = 8  # bytes of a caption that must answer


@dataclass(frozen=True)
class Captions:
    """n captions and what they state.

    texts: ASCII, so that a character is a byte. stated: classes [n] per attribute of a caption. about [n, longest + 1]: the place, 1 or 2,
    of the thing that a byte is about, 0 for others and the end mark. things: classes [n, 3] per attribute of a thing, by its place; −1
    where there is no thing.
    """

    texts: list[str]
    stated: dict[str, Tensor]
    about: Tensor
    things: dict[str, Tensor]

    @classmethod
    def of(cls, captions: list[Caption]) -> Self:
        about = torch.zeros(len(captions), 1 + max(len(caption.text) for caption in captions), dtype=torch.long)
        things = {name: torch.full((len(captions), 3), -1) for name in THING_ATTRIBUTES}
        for row, caption in enumerate(captions):
            for place, (span, classes) in enumerate(zip(caption.spans, caption.things, strict=True), start=1):
                about[row, span.start : span.stop] = place
                for name, value in classes.items():
                    things[name][row, place] = value
        stated = {name: torch.tensor([c.stated[name] for c in captions]) for name in ATTRIBUTES}
        return cls([c.text for c in captions], stated, about, things)

    def own(self, asked: Tensor) -> dict[str, Tensor]:
        """Classes [n · k] per attribute of the things that the asked bytes [n, k] are about."""
        places = self.about.gather(1, asked)
        return {name: classes.gather(1, places).flatten() for name, classes in self.things.items()}


class Reader(nn.Module):
    """The encoder and the heads that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ByteEncoder(tiny.BYTE_ENCODER)
        self.heads = AttributeHeads(tiny.BYTE_ENCODER.d_model)
        self.own = AttributeHeads(tiny.BYTE_ENCODER.d_model, THING_ATTRIBUTES)

    def forward(self, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """B captions → some random bytes of each [B, _ASKED], and their logits [B · _ASKED, classes] per attribute of the whole caption and
        of the things they are about."""
        out = self.encoder(prompts)
        asked = out.mask.float().multinomial(_ASKED, replacement=True)
        features = out.embeddings.gather(1, asked[..., None].expand(-1, -1, out.embeddings.shape[-1])).flatten(0, 1)
        return asked, self.heads(features), self.own(features)


def reading_loss(reader: Reader, captions: Captions) -> tuple[Tensor, dict[str, Tensor]]:
    """(the mean of both questions' losses, the worst attribute's accuracy in each)."""
    asked, whole, own = reader(captions.texts)
    stated = {name: classes.to(asked.device).repeat_interleave(_ASKED) for name, classes in captions.stated.items()}
    things = {name: classes.to(asked.device) for name, classes in captions.own(asked.cpu()).items()}
    (whole_loss, whole_worst), (own_loss, own_worst) = attribute_loss(whole, stated), attribute_loss(own, things)
    return (whole_loss + own_loss) / 2, {"worst": whole_worst, "own": own_worst}


def draw_captions(rng: np.random.Generator, n: int) -> list[Caption]:
    """n captions of sampled scenes."""
    return [describe(sample(rng), rng) for _ in range(n)]


def similar_lengths(rng: np.random.Generator, batch: int, pool: int = 8) -> Iterator[Captions]:
    """Endless batches of captions, each of about one length, because padding costs as much as text."""
    while True:
        captions = sorted(draw_captions(rng, pool * batch), key=lambda caption: len(caption.text))
        for start in batch * rng.permutation(pool):
            yield Captions.of(captions[start : start + batch])


def main() -> None:
    o = loop.options(loop.parser(__doc__, name="byte_encoder", batch=128, lr=1e-3, minutes=20).parse_args())
    captions = similar_lengths(np.random.default_rng(o.seed), o.batch)
    reader = Reader().to(o.device).train()
    loop.fit(reader, lambda: reading_loss(reader, next(captions)), o)


if __name__ == "__main__":
    main()
