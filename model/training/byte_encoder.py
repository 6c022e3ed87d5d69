"""Trains the byte encoder on captions alone: every byte's feature learns to say what the whole caption states, and what the thing is like
that the byte is about.

    python -m model.training.byte_encoder --minutes 20

The denoiser then reads its frozen features. Trained jointly from scratch instead, the denoiser learnt to draw long before the encoder
learnt to read, and never listened. Where only a pooled feature had to know, it heard colours and no sides; where every byte knew the whole
and nothing of its own, all bytes were alike, attention had nothing to choose from, and of two things the colours came out mixed
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.bundle import load_v3
from model.config import find_bundle
from model.text import ByteEncoder
from model.training import loop, tiny
from model.training.attributes import AttributeHeads, attribute_loss
from model.training.captions import ATTRIBUTES, THING_ATTRIBUTES
from model.training.data import Scenes, Text
from model.training.features import encode_bytes

_ASKED = 8  # bytes of a caption that must answer
# Most captions are short, and padding costs as much as text: most steps read those of at most so many bytes.
_SHORT, _SHORT_STEPS = 79, 0.75


class Reader(nn.Module):
    """The encoder and the heads that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ByteEncoder(tiny.BYTE_ENCODER)
        self.heads = AttributeHeads(tiny.BYTE_ENCODER.d_model, ATTRIBUTES)
        self.own = AttributeHeads(tiny.BYTE_ENCODER.d_model, THING_ATTRIBUTES)

    def forward(self, text: Text) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """B captions → some random bytes of each [B, _ASKED], and their logits [B · _ASKED, classes] per attribute of the whole caption and
        of the things they are about."""
        embeddings = encode_bytes(self.encoder, text)
        chance = torch.rand(len(embeddings), _ASKED, device=embeddings.device)
        asked = (chance * (text.length[:, None] + 1)).long()
        features = embeddings.gather(1, asked[..., None].expand(-1, -1, embeddings.shape[-1])).flatten(0, 1)
        return asked, self.heads(features), self.own(features)


def reading_loss(reader: Reader, scenes: Scenes, index: Tensor, which: Tensor, longest: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """(the mean of both questions' losses, the worst attribute's accuracy in each) for captions `which` [B] of scenes [B]."""
    asked, whole, own = reader(scenes.text(index, which, longest))
    stated = {name: classes.repeat_interleave(_ASKED) for name, classes in scenes.stated(index, which).items()}
    whole_loss, whole_worst = attribute_loss(whole, stated)
    own_loss, own_worst = attribute_loss(own, scenes.own(index, which, asked))
    return whole_loss + own_loss, {"worst": whole_worst, "own": own_worst}


@torch.no_grad()
def accuracies(reader: Reader, scenes: Scenes, index: Tensor, batch: int = 512) -> dict[str, float]:
    """How often each attribute is read from a random byte, over the first captions of scenes [N]; of a thing under `own.` its name."""
    hits: dict[str, list[Tensor]] = {}
    for part in index.split(batch):
        which = torch.zeros_like(part)
        asked, whole, own = reader(scenes.text(part, which))
        stated = {name: classes.repeat_interleave(_ASKED) for name, classes in scenes.stated(part, which).items()}
        for prefix, logits, classes in (("", whole, stated), ("own.", own, scenes.own(part, which, asked))):
            for name, logit in logits.items():
                known = classes[name] >= 0
                hits.setdefault(prefix + name, []).append((logit.argmax(-1) == classes[name])[known])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in hits.items()}


def matrices(module: nn.Module) -> list[str]:
    """The layers' maps, for Muon; embeddings and heads are AdamW's."""
    return [
        name for name, p in module.named_parameters() if p.ndim == 2 and ".block." in name and "relative_attention_bias" not in name
    ]


def train(reader: Reader, scenes: Scenes, o: loop.Options, held_out: int = 1000) -> Reader:
    """Trains until the budget is spent, but not on the corpus' last scenes."""
    reader.train()
    everything = torch.arange(max(len(scenes.corpus) - held_out, 1), device=scenes.device)
    short = scenes.shorter_than(_SHORT)
    short = short[short < len(everything)]

    def loss(among: Tensor, longest: int | None) -> loop.Loss:
        return lambda: reading_loss(reader, scenes, *scenes.some(o.batch, among), longest)

    losses = (loss(short, _SHORT), loss(everything, None))
    shares = (_SHORT_STEPS, 1 - _SHORT_STEPS) if len(short) else (0.0, 1.0)
    trained: Reader = loop.fit(reader, loop.Mixture(losses, shares), o, matrices=matrices(reader)).eval()  # type: ignore[assignment]
    return trained


def begin(bundle: str | None) -> Reader:
    """A reader, fresh or with the encoder of a bundle."""
    reader = Reader()
    if bundle is not None:
        kept: Mapping[str, Tensor] = load_v3(find_bundle(bundle), torch.device("cpu"), torch.float32).byt5.state_dict()
        reader.encoder.load_state_dict(kept)
    return reader


def main() -> None:
    p = loop.parser(__doc__, name="byte_encoder", batch=128, lr=1e-3, minutes=20)
    p.add_argument("--from-bundle", metavar="BUNDLE", help="name or path of the bundle whose byte encoder to go on with")
    args = p.parse_args()
    o = loop.options(args)
    scenes = Scenes.load(args.corpus, o.device, o.seed)
    train(begin(args.from_bundle).to(o.device), scenes, o)


if __name__ == "__main__":
    main()
