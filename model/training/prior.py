"""Trains the prior to turn a caption's CLIP embedding into that of its picture.

python -m model.training.prior runs/tiny --minutes 6
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bundle import load_v3
from model.prior import Prior, add_noise
from model.text import CLIP
from model.training import loop
from model.training.clip import with_tokens
from model.training.data import Scenes

_UNCONDITIONAL = 0.1
# Encoding a scene costs as much as many steps of the prior, so they are encoded once, and met again with other noise.
_PICTURES = 8_000


def diffusion_loss(prior: Prior, clip_text: Tensor, clip_image: Tensor) -> Tensor:
    """Squared error of the predicted noise for embeddings [B, D]; a tenth of the texts are blanked, for guidance."""
    t = torch.rand(len(clip_image), device=clip_image.device)
    noise = torch.randn_like(clip_image)
    text = clip_text * (torch.rand_like(t) >= _UNCONDITIONAL)[:, None]
    return F.mse_loss(prior(add_noise(clip_image, t, noise), t, text).float(), noise)


@torch.no_grad()
def embeddings(clip: CLIP, scenes: Scenes, pictures: int, dtype: torch.dtype = torch.float32, batch: int = 64) -> tuple[Tensor, Tensor]:
    """(text [n, C, D], image [n, D]) embeddings of the first square scenes. scenes: with the captions' tokens."""
    if scenes.clip_tokens is None:
        raise ValueError("the captions' tokens are not known")
    index, texts, images = scenes.of_aspect[0][:pictures], [], []
    with torch.autocast(scenes.device.type, dtype, enabled=dtype != torch.float32):
        for part in index.split(batch):
            images.append(clip.encode_image(scenes.pictures(part)).float())
            said = scenes.clip_tokens[part].long()
            texts.append(clip.model.encode_text(said.flatten(0, 1)).float().unflatten(0, said.shape[:2]))
    return torch.cat(texts), torch.cat(images)


def train(prior: Prior, texts: Tensor, images: Tensor, o: loop.Options) -> Prior:
    """Trains until the budget is spent on embeddings [n, C, D] and [n, D]."""

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        chosen = (torch.rand(o.batch, device=images.device) * len(images)).long()
        which = (torch.rand(o.batch, device=images.device) * texts.shape[1]).long()
        return diffusion_loss(prior, texts[chosen, which], images[chosen]), {}

    trained: Prior = loop.fit(prior, loss, o, matrices=matrices(prior)).eval()  # type: ignore[assignment]
    return trained


def matrices(module: nn.Module) -> list[str]:
    """None: AdamW is what the prior's broad, shallow maps are trained with."""
    return []


def main() -> None:
    p = loop.parser(__doc__, name="prior", batch=256, lr=1e-3, minutes=6)
    p.add_argument("bundle", type=Path, help="whose CLIP is trained already")
    p.add_argument("--from-bundle", action="store_true", help="begin with the bundle's prior")
    args = p.parse_args()
    o = loop.options(args)
    bundle = load_v3(args.bundle, o.device, torch.float32)
    prior = Prior(bundle.config.prior).to(o.device)
    if args.from_bundle:
        prior.load_state_dict(bundle.prior.state_dict())
    scenes = with_tokens(Scenes.load(args.corpus, o.device, o.seed), bundle.clip)
    train(prior, *embeddings(bundle.clip, scenes, _PICTURES, o.dtype), o)


if __name__ == "__main__":
    main()
