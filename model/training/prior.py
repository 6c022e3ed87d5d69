"""Trains the prior to turn a caption's CLIP embedding into that of its picture.

python -m model.training.prior runs/tiny --minutes 6
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import load_v3
from model.prior import Prior, add_noise
from model.text import CLIP
from model.training import loop
from model.training.data import as_float, stream

_UNCONDITIONAL = 0.1
# Encoding a batch of scenes costs as much as many steps of the prior, so the latest ones are kept and met again with other noise.
_KEPT = 256
_STEPS_PER_BATCH = 8
_BATCHES_PER_STEP = 4


def diffusion_loss(prior: Prior, clip_text: Tensor, clip_image: Tensor) -> Tensor:
    """Squared error of the predicted noise for embeddings [B, D]; a tenth of the texts are blanked, for guidance."""
    t = torch.rand(len(clip_image), device=clip_image.device)
    noise = torch.randn_like(clip_image)
    text = clip_text * (torch.rand_like(t) >= _UNCONDITIONAL)[:, None]
    return F.mse_loss(prior(add_noise(clip_image, t, noise), t, text).float(), noise)


@torch.no_grad()
def embeddings(clip: CLIP, o: loop.Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (text, image) embeddings, [4·batch, D] each, of scenes that are met several times."""
    kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=_KEPT)
    for pixels, captions, _ in stream(o.batch, o.seed, workers=o.workers):
        kept.append((clip.encode_text(captions), clip.encode_image(as_float(pixels, o.device))))
        for _ in range(_STEPS_PER_BATCH):
            texts, images = zip(*(kept[i] for i in torch.randint(len(kept), (_BATCHES_PER_STEP,)).tolist()), strict=True)
            yield torch.cat(texts), torch.cat(images)


def main() -> None:
    p = loop.parser(__doc__, name="prior", batch=64, lr=1e-3, minutes=6)
    p.add_argument("bundle", type=Path, help="whose CLIP is trained already")
    args = p.parse_args()
    o = loop.options(args)
    bundle = load_v3(args.bundle, o.device, torch.float32)
    prior = Prior(bundle.config.prior)
    pairs = embeddings(bundle.clip, o)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        return diffusion_loss(prior, *next(pairs)), {}

    loop.fit(prior, loss, o)


if __name__ == "__main__":
    main()
