"""Train the byte encoder to predict the codes of captions (`codes.py`).

    python -m model.training.byte_encoder --minutes 20

At every byte it predicts the attributes of the byte's own thing, and those of the whole caption.
The denoiser reads these features, and learns from the codes themselves meanwhile. Trained jointly
from scratch, the denoiser learnt to draw long before the encoder learnt to read, and never used the
captions. Where only a pooled feature had to know, it learnt colours and no sides; where every byte
knew the whole caption and nothing of its own thing, the colours of two things came out mixed
(docs/log.md).

At first it reads things alone, cut out of their captions: words take longest to learn, and a third
as many bytes are read five times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import load_v3
from model.config import find_bundle
from model.network_config import ByteEncoderConfig
from model.networks.text_encoders import ByteEncoder
from model.training import checkpoint, command, loop, tiny
from model.training.captions import THING_ATTRIBUTES
from model.training.codes import KIND_WIDTH, ONE, STARTS, USED, Codes, classes_of
from model.training.data import Scenes, Text
from model.training.features import encode_bytes

# Bytes of a thing cut out of its caption, before and behind its first.
_BEFORE, _BEHIND = 3, 25
_CUT_FIRST = 1.0  # share of the steps that read cut-out things, at first
_CUT_LAST = 0.25  # the same at last
_CUT_STEPS = 1200  # steps from the first share to the last
# The weight of the kind's cross-entropy, and the scale of its logits; the same of the others.
_KIND_SHARE, _KIND_SCALE = 0.3, 1 / 8
_OTHERS_SHARE, _SHARPNESS = 0.2, 2.0
_WORD_BYTES = 16  # the difference in length between the captions of a batch, about
_NEAR = 5.0  # the initial score of a head's own neighbour, beyond the other bytes'


def fresh(config: ByteEncoderConfig) -> ByteEncoder:
    """Return an encoder whose heads attend to neighbouring bytes at the start.

    One head attends to the byte before, one to the byte behind and so on; the last head is free.
    The order of its bytes makes a word.
    """
    encoder = ByteEncoder(config)
    bias = (
        encoder.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
    )  # [buckets, heads]
    bias.normal_(std=0.1)
    half = config.relative_attention_num_buckets // 2
    for head, offset in zip(range(config.num_heads - 1), (-1, 1, -2, 2, -3, 3), strict=False):
        bias[half + offset if offset > 0 else -offset, head] += (
            _NEAR  # buckets from `half` on are what lies behind
        )
    return encoder


def reading_loss(
    encoder: ByteEncoder, text: Text, codes: Codes, target: Tensor, cut: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (the loss, figures) for captions whose bytes must predict `target` [B, L + 1, D].

    The loss is the squared distance to the codes, plus the cross-entropy of the kind and of the
    other attributes. cut: the captions are pieces, which do not tell the attributes of the whole.
    """
    found = encode_bytes(encoder, text).float()
    channels = STARTS["background"] if cut else USED
    read = text.mask[..., None].float()
    distance = ((found - target)[..., :channels].square() * read).sum() / (read.sum() * channels)
    # One byte in four is asked what it means; of its kind, those that belong to something of a
    # known one.
    asked, wanted = (vectors[:, ::4].flatten(0, 1) for vectors in (found, target))
    there = text.mask[:, ::4].flatten()
    asked, wanted = asked[there], wanted[there]
    known = (wanted[:, :KIND_WIDTH] != 0).any(-1)
    logits = asked[known, :KIND_WIDTH] @ codes.kinds.T * _KIND_SCALE
    kind = torch.cdist(wanted[known, :KIND_WIDTH], codes.kinds).argmin(-1)
    named = F.cross_entropy(logits, kind)
    others = [
        _class_error(asked, wanted, name) for name in STARTS if not cut or name in THING_ATTRIBUTES
    ]
    other = torch.stack(others)
    right = (logits.argmax(-1) == kind).float().mean()
    figures = {"distance": distance.detach(), "kind": right, "others": other.detach().mean()}
    return distance + _KIND_SHARE * named + _OTHERS_SHARE * other.sum(), figures


def _class_error(asked: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Return the cross-entropy of an attribute at vectors [n, D]; silence is a class."""
    own = slice(STARTS[name], STARTS[name] + classes_of(name) - 1)
    silent = torch.full_like(asked[:, :1], ONE / 2)
    likelier, best = wanted[:, own].max(-1)
    logits = torch.cat([silent, asked[:, own]], dim=-1) * _SHARPNESS
    return F.cross_entropy(logits, torch.where(likelier > 0, 1 + best, 0))


def captions(
    scenes: Scenes, codes: Codes, batch: int, rng: np.random.Generator, held_out: int
) -> Iterator[tuple[Text, Tensor]]:
    """Yield endless batches (whole captions of about one length, the codes of their bytes).

    held_out: the number of scenes at the corpus's end that are left out.
    """
    length = scenes.corpus.length[: max(len(scenes.corpus) - held_out, 1)].cpu().numpy()
    order = np.argsort(length.reshape(-1) // _WORD_BYTES + rng.random(length.size), kind="stable")
    C = length.shape[1]
    while True:
        for start in rng.permutation(np.arange(0, max(len(order) - batch, 1), batch)):
            chosen = order[start : start + batch]
            index, which = (
                torch.from_numpy(part).to(scenes.device) for part in np.divmod(chosen, C)
            )
            longest = int(length.reshape(-1)[chosen].max())
            text = scenes.text(index, which, longest)
            yield (
                text,
                codes.bytes(
                    index,
                    which,
                    torch.arange(longest + 1, device=scenes.device).expand(len(chosen), -1),
                ),
            )


def pieces(
    scenes: Scenes, codes: Codes, batch: int, held_out: int
) -> Iterator[tuple[Text, Tensor]]:
    """Yield endless batches (things cut out of their captions, the codes of their bytes).

    held_out: the number of scenes at the corpus's end that are left out.
    """
    c = scenes.corpus
    among = torch.arange(max(len(c) - held_out, 1), device=scenes.device)
    width = _BEFORE + _BEHIND
    while True:
        index, which = scenes.some(batch, among)
        span = c.span[index, which].long()  # [B, 3, 2]
        thing = (torch.rand(batch, 3, device=scenes.device) * (span[..., 1] > 0)).argmax(-1)
        start, stop = span.gather(1, thing[:, None, None].expand(-1, 1, 2))[:, 0].unbind(-1)
        first = (start - torch.randint(_BEFORE + 1, (batch,), device=scenes.device)).clamp_min(0)
        place = first[:, None] + torch.arange(width + 1, device=scenes.device)
        longest = (stop + torch.randint(_BEFORE + 1, (batch,), device=scenes.device)).minimum(
            c.length[index, which].long()
        )
        cut = (longest - first).clamp(1, width)
        inside = torch.arange(width, device=scenes.device) < cut[:, None]
        source = (
            c.text[index, which].gather(1, place[:, :width].clamp(max=c.text.shape[-1] - 1))
            * inside
        )
        target = codes.bytes(
            index,
            which,
            torch.where(torch.arange(width + 1, device=scenes.device) < cut[:, None], place, -1),
        )
        yield Text(source, cut), target


@torch.no_grad()
def accuracies(
    encoder: ByteEncoder, scenes: Scenes, index: Tensor, batch: int = 64
) -> dict[str, float]:
    """Return the share of bytes at which each attribute is read right, by name.

    Over the first captions of scenes [N]: attributes of the byte's own thing, and of the whole
    caption.
    """
    codes, hits = Codes(scenes.corpus), dict[str, list[Tensor]]()
    for part in index.split(batch):
        which = torch.zeros_like(part)
        longest = int(scenes.corpus.length[part, which].max())
        text = scenes.text(part, which, longest)
        found = encode_bytes(encoder, text).float()
        classes = scenes.own(
            part, which, torch.arange(longest + 1, device=part.device).expand(len(part), -1)
        )
        stated = {
            name: c[:, None].expand(-1, longest + 1).flatten()
            for name, c in scenes.stated(part, which).items()
        }
        for name, wanted in {
            **classes,
            **{n: stated[n] for n in ("background", "relation", "view")},
        }.items():
            own = name in THING_ATTRIBUTES
            said = read(found, codes, name).flatten()
            asked = text.mask.flatten() & (
                (wanted >= 0) if own else torch.ones_like(wanted, dtype=torch.bool)
            )
            hits.setdefault(name, []).append((said == wanted)[asked])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in hits.items()}


def read(found: Tensor, codes: Codes, name: str) -> Tensor:
    """Return the classes […] that vectors […, D] give an attribute, 0 where they are silent."""
    if name == "kind":
        likeness = found[..., :KIND_WIDTH] @ codes.kinds[1:].T / KIND_WIDTH
        return torch.where(likeness.amax(-1) > 0.5, 1 + likeness.argmax(-1), 0)
    own = found[..., STARTS[name] : STARTS[name] + classes_of(name) - 1]
    return torch.where(own.amax(-1) > ONE / 2, 1 + own.argmax(-1), 0)


def matrices(module: torch.nn.Module) -> list[str]:
    """Return the names of the layers' maps, for Muon."""
    return [
        name
        for name, p in module.named_parameters()
        if p.ndim == 2 and ".block." in name and "relative_attention_bias" not in name
    ]


def train(
    encoder: ByteEncoder, scenes: Scenes, o: loop.Options, held_out: int = 1000
) -> ByteEncoder:
    """Train until the budget is spent, and return the averaged encoder.

    held_out: the number of scenes at the corpus's end that are not trained on.
    """
    encoder.train()
    codes, rng = Codes(scenes.corpus), np.random.default_rng(o.seed)
    steps = count(checkpoint.resumable(o.checkpoint)["step"] if o.resume else 0)
    whole = captions(scenes, codes, o.batch, rng, held_out)
    parts = pieces(scenes, codes, 2 * o.batch, held_out)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        share = _CUT_FIRST + (_CUT_LAST - _CUT_FIRST) * min(1.0, next(steps) / _CUT_STEPS)
        cut = bool(rng.random() < share)
        text, target = next(parts) if cut else next(whole)
        return reading_loss(encoder, text, codes, target, cut)

    # Its batches are of many lengths, and made on the host.
    trained: ByteEncoder = loop.fit(
        encoder, loss, loop.replace(o, record=False), matrices=matrices(encoder)
    ).eval()  # type: ignore[assignment]
    return trained


def main() -> None:
    """Train as the command line says, and print the accuracies on held-out captions."""
    p = loop.parser(__doc__, name="byte_encoder", batch=64, lr=2e-3, minutes=20)
    p.add_argument(
        "--from-bundle",
        metavar="BUNDLE",
        help="name or path of the bundle whose byte encoder to go on with",
    )
    args = p.parse_args()
    o = loop.options(args)
    scenes = Scenes.load(args.corpus, o.device, o.seed, images=False)
    encoder = fresh(tiny.BYTE_ENCODER)
    if args.from_bundle:
        encoder = load_v3(find_bundle(args.from_bundle), torch.device("cpu"), torch.float32).byt5
        encoder.tower = None
        encoder.requires_grad_(True)
    trained = train(encoder.to(o.device), scenes, o)
    if loop.rank() == 0:
        index = torch.arange(
            max(len(scenes.corpus) - 256, 0), len(scenes.corpus), device=scenes.device
        )
        print({name: round(value, 4) for name, value in accuracies(trained, scenes, index).items()})


if __name__ == "__main__":
    command.run(main)
