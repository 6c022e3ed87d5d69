"""Trains the VQGAN on captioned scenes' pictures.

    python -m model.training.vqgan --minutes 20

Pixel error plus the error of neighbouring pixels' differences (which keeps edges crisp); the codebook follows the latents it wins by moving
averages, and codes that win nothing are put where a latent of the batch is.
"""

from __future__ import annotations

from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training import loop, tiny
from model.training.data import as_float, stream
from model.vqgan import VQGAN, ResidualBlock

_CODEBOOK_DECAY = 0.99
_REVIVE_EVERY = 50


class Codebook(nn.Module):
    """Running counts and sums of the latents each code wins; the codes are their means."""

    counts: Tensor
    sums: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("counts", torch.ones(len(codes)))
        self.register_buffer("sums", codes.clone())

    @torch.no_grad()
    def follow(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Latents [N, c] and the codes [N] that won them → the new codebook [K, c]."""
        won = torch.zeros_like(self.sums).index_add_(0, tokens, latents)
        count = torch.bincount(tokens, minlength=len(self.counts)).float()
        self.counts.lerp_(count, 1 - _CODEBOOK_DECAY)
        self.sums.lerp_(won, 1 - _CODEBOOK_DECAY)
        return self.sums / self.counts.clamp_min(1e-4)[:, None]

    @torch.no_grad()
    def revive(self, latents: Tensor) -> None:
        """Gives every code that wins next to nothing the place of a random latent."""
        dead = (self.counts < 0.02 * self.counts.mean()).nonzero()[:, 0]
        chosen = latents[torch.randint(len(latents), (len(dead),), device=latents.device)]
        mean = self.counts.mean()
        self.counts[dead] = mean
        self.sums[dead] = chosen * mean


class Autoencoder(nn.Module):
    """A VQGAN with what only its training needs."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.codes = Codebook(vqgan.vquantizer.codebook.weight.detach())
        vqgan.vquantizer.codebook.weight.requires_grad_(False)

    def start_from(self, latents: Tensor) -> None:
        """Codes begin as latents of one batch, not at random."""
        chosen = latents[torch.randperm(len(latents))[: len(self.codes.sums)]]
        self.codes.sums.copy_(chosen)
        self.vqgan.vquantizer.codebook.weight.data.copy_(chosen)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image [B, 3, H, W] → (reconstruction, latents [N, c], tokens [N])."""
        latents = self.vqgan.encode_latents(image).float()
        flat = latents.flatten(0, 2)
        tokens = self.vqgan.vquantizer.nearest(flat.detach())
        codes = self.vqgan.vquantizer.codebook.weight[tokens].view_as(latents)
        through = latents + (codes - latents).detach()  # the straight-through estimate
        return self.vqgan.decode_latents(through), flat, tokens


def reconstruction_loss(output: Tensor, image: Tensor) -> Tensor:
    """Squared error of pixels and of the differences of neighbours, both over [B, 3, H, W]."""
    pixels = F.mse_loss(output, image)
    edges = sum(F.mse_loss(output.diff(dim=d), image.diff(dim=d)) for d in (-1, -2))
    return pixels + 0.5 * edges


def busy_crops(images: Tensor, size: int, tries: int = 3) -> Tensor:
    """Of `tries` crops, at random places but the same ones in all pictures [B, 3, H, W], each picture's with most in it.

    The network is local, and most of a scene is background: a quarter of the pixels teaches nearly as much as all of them.
    """
    _, _, H, W = images.shape
    tops, lefts = torch.randint(H - size + 1, (tries,)).tolist(), torch.randint(W - size + 1, (tries,)).tolist()
    crops = torch.stack([images[..., y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)])
    busiest = crops.float().var((-1, -2)).sum(-1).argmax(0)  # [B]
    return crops[busiest, torch.arange(len(images))]


def main() -> None:
    # Codes jump when they are revived, and the average of a code's old and new place is no code: the average is kept short.
    p = loop.parser(__doc__, name="vqgan", batch=64, lr=1.5e-3, minutes=20, ema=0.95)
    p.add_argument("--crop", type=int, default=64, help="pixels a side of the crops it sees")
    args = p.parse_args()
    o = loop.options(args)
    scenes = stream(o.batch, o.seed, workers=o.workers)
    trained = Autoencoder(VQGAN(tiny.VQGAN)).to(o.device).train()
    for block in trained.modules():
        if isinstance(block, ResidualBlock):
            # Published zeros would leave every residual branch without a gradient to start from.
            block.gammas.data[[2, 5]] = 0.5

    def batch() -> Tensor:
        return as_float(busy_crops(next(scenes)[0], args.crop), o.device)

    if not o.resume:
        with torch.no_grad():
            trained.start_from(trained.vqgan.encode_latents(torch.cat([batch() for _ in range(8)])).flatten(0, 2))

    steps = count()

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        image = batch()
        output, latents, tokens = trained(image)
        output = output.float()
        codes = trained.vqgan.vquantizer.codebook.weight
        commitment = F.mse_loss(latents, codes[tokens])
        codes.data.copy_(trained.codes.follow(latents.detach(), tokens))
        if next(steps) % _REVIVE_EVERY == 0:
            trained.codes.revive(latents.detach())
        psnr = -10 * torch.log10(F.mse_loss(output.detach().clamp(0, 1), image))
        return reconstruction_loss(output, image) + 0.03 * commitment, {"psnr": psnr, "codes": tokens.unique().numel()}

    loop.fit(trained, loss, o)


if __name__ == "__main__":
    main()
