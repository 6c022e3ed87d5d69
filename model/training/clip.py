"""Trains the CLIP pair on captioned scenes: contrastively, with both towers also naming what is stated.

    python -m model.training.clip --minutes 15

The attribute heads are what makes minutes enough; they are thrown away. The text tower's vocabulary is learnt first, from captions.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.text import CLIP
from model.training import loop, tiny
from model.training.attributes import AttributeHeads, attribute_loss
from model.training.byte_encoder import draw_captions
from model.training.data import as_float, stream

_SPECIAL = 2 * 256 + 2  # open_clip's bytes, bytes at a word's end, start mark and end mark


def learn_merges(path: Path, vocabulary: int, captions: int = 20_000) -> None:
    """Writes the byte-pair merges of sampled captions as open_clip's tokenizer reads them: gzipped, a header, a pair a line."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [caption.text for caption in draw_captions(np.random.default_rng(0), captions)]
    # The trainer counts its own alphabet of letters into the size it is given, so it is asked for more merges than are kept.
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2 * vocabulary, end_of_word_suffix="</w>", show_progress=False))
    folder = path.parent / "merges"
    folder.mkdir(parents=True, exist_ok=True)
    merges_file = Path(tokenizer.model.save(str(folder))[1])
    merges = merges_file.read_text().splitlines()[1 : 1 + vocabulary - _SPECIAL]
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode(), mtime=0))


class Pair(nn.Module):
    """Both towers, and linear heads on their embeddings."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.clip = CLIP(tiny.CLIP, directory)
        self.heads = AttributeHeads(tiny.CLIP.embed_dim)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(CLIP's symmetric loss, share of pictures that find their caption) for embeddings [B, D]."""
    logits = scale.exp().clamp(max=100) * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    own = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss, (logits.argmax(-1) == own).float().mean()


def main() -> None:
    o = loop.options(loop.parser(__doc__, name="clip", batch=128, lr=1e-3, minutes=15).parse_args())
    merges = o.checkpoint.parent / str(tiny.CLIP.merges)
    if not merges.exists():
        learn_merges(merges, tiny.CLIP.text_cfg["vocab_size"])
    scenes = stream(o.batch, o.seed, workers=o.workers)
    trained = Pair(o.checkpoint.parent).to(o.device).train()

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        pixels, prompts, classes = next(scenes)
        classes = {k: v.to(o.device) for k, v in classes.items()}
        image = trained.clip.encode_image(as_float(pixels, o.device))
        text = trained.clip.encode_text(prompts)
        contrast, found = contrastive_loss(image, text, trained.clip.model.logit_scale)
        image_loss, image_worst = attribute_loss(trained.heads(image), classes)
        text_loss, text_worst = attribute_loss(trained.heads(text), classes)
        return contrast + image_loss + text_loss, {"found": found, "image": image_worst, "text": text_worst}

    loop.fit(trained, loss, o)


if __name__ == "__main__":
    main()
