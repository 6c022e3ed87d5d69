"""Trains the prior to turn a caption's CLIP embedding into that of its picture.

python -m model.training.prior runs/tiny --minutes 6
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import load_bundle
from model.prior import Prior, add_noise
from model.training import loop
from model.training.data import as_float, stream

_UNCONDITIONAL = 0.1
_NOISES = 8  # per scene: the network is much cheaper than encoding another scene


def diffusion_loss(prior: Prior, clip_text: Tensor, clip_image: Tensor) -> Tensor:
    """Squared error of the predicted noise for embeddings [B, D]; a tenth of the texts are blanked, for guidance."""
    t = torch.rand(len(clip_image), device=clip_image.device)
    noise = torch.randn_like(clip_image)
    text = clip_text * (torch.rand_like(t) >= _UNCONDITIONAL)[:, None]
    return F.mse_loss(prior(add_noise(clip_image, t, noise), t, text).float(), noise)


def main() -> None:
    p = loop.parser(__doc__, name="prior", batch=64, lr=1e-3, minutes=6)
    p.add_argument("bundle", type=Path, help="whose CLIP is trained already")
    args = p.parse_args()
    o = loop.options(args)
    bundle = load_bundle(args.bundle, o.device, torch.float32)
    prior = Prior(bundle.config.prior)
    scenes = stream(o.batch, o.seed, workers=o.workers)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        pixels, captions, _ = next(scenes)
        with torch.no_grad():
            text, image = bundle.clip.encode_text(captions), bundle.clip.encode_image(as_float(pixels, o.device))
        value = diffusion_loss(prior, text.repeat(_NOISES, 1), image.repeat(_NOISES, 1))
        return value, {}

    loop.fit(prior, loss, o)


if __name__ == "__main__":
    main()
