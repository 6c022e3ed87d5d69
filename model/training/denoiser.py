"""Trains the denoiser on captioned scenes, with a bundle's frozen VQGAN and text encoders.

    python -m model.training.denoiser runs/tiny --minutes 60

The published objective: replace each token by a random code with probability t, predict the original everywhere, and weigh down the
positions that were not touched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import load_bundle
from model.denoiser import Condition, Denoiser
from model.training import loop
from model.training.features import Examples, examples

LABEL_SMOOTHING = 0.1
# Published: CLIP text and image are each dropped 9 times in 10, on 600 million pictures. Ours sees a thousandth of that.
_DROP_CLIP = 0.5
# The prior's embeddings are not quite those of a picture; noise of this share keeps the denoiser from trusting them to the last digit.
_IMAGE_NOISE = 0.3
# Of a row's positions, this share is projected to the codebook and judged: the softmax would else cost as much as the network.
_JUDGED = 0.25


def corrupt(tokens: Tensor, t: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, H, W] with random codes at a share t [B] of the positions, and where those are."""
    noised = torch.rand(tokens.shape, device=tokens.device) < t[:, None, None]
    return torch.where(noised, torch.randint_like(tokens, codes), tokens), noised


def dropped_condition(denoiser: Denoiser, x: Examples) -> Condition:
    """The condition of a training batch, where each row keeps or loses its CLIP text and image tokens by masking their keys."""
    B, device, seq = len(x.tokens), x.tokens.device, denoiser.config.clip_seq_len
    image = x.clip_image + _IMAGE_NOISE * x.clip_image.std() * torch.rand(B, 1, device=device) * torch.randn_like(x.clip_image)
    condition = denoiser.condition(x.byt5, x.mask, x.clip_text, image)
    kept = torch.rand(B, 2, device=device) >= _DROP_CLIP
    # An empty caption is an end mark alone. Its picture would tell what the missing text may not.
    kept[:, 1] &= x.mask.sum(-1) > 1
    groups = kept.repeat_interleave(seq, dim=1)
    return replace(condition, mask=torch.cat([x.mask, groups], dim=1))


def token_loss(denoiser: Denoiser, x: Examples, t: Tensor) -> tuple[Tensor, Tensor]:
    """(the objective, share of judged noised tokens that are predicted right) at times t [B]."""
    noisy, noised = corrupt(x.tokens, t, denoiser.config.num_labels)
    features = denoiser.features(noisy, denoiser.times(t), dropped_condition(denoiser, x)).flatten(1, 2)  # [B, HW, c_out]
    B, positions, _ = features.shape
    judged = torch.rand(B, positions, device=t.device).topk(max(1, int(positions * _JUDGED)), dim=1).indices

    def pick(grid: Tensor) -> Tensor:
        return grid.flatten(1).gather(1, judged)

    logits = denoiser.project(features.gather(1, judged[..., None].expand(-1, -1, features.shape[-1])))
    target, touched = pick(x.tokens), pick(noised)
    errors = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none", label_smoothing=LABEL_SMOOTHING)
    weights = torch.where(touched, 1.0, 1 - 0.7 * (1 - t[:, None]))
    right = ((logits.argmax(-1) == target) & touched).sum() / touched.sum().clamp_min(1)
    return (errors.view_as(weights) * weights).mean(), right


def main() -> None:
    p = loop.parser(__doc__, name="denoiser", batch=32, lr=1e-3, minutes=60)
    p.add_argument("bundle", type=Path, help="whose VQGAN, byte encoder and CLIP are trained already")
    p.add_argument("--from-bundle", action="store_true", help="begin with the bundle's denoiser, not with a random one")
    args = p.parse_args()
    o = loop.options(args)
    bundle = load_bundle(args.bundle, o.device, torch.float32)
    denoiser = Denoiser(bundle.config.denoiser).to(o.device)
    if args.from_bundle:
        denoiser.load_state_dict(bundle.denoiser.state_dict())
    batches = examples(bundle, o.batch, o.seed, workers=o.workers)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        x = next(batches)
        t = 1 - torch.rand(len(x.tokens), device=o.device)
        value, right = token_loss(denoiser, x, t)
        return value, {"right": right.detach()}

    loop.fit(denoiser, loss, o)


if __name__ == "__main__":
    main()
