"""Train the VQGAN on the images of captioned scenes.

    python -m model.training.vqgan --minutes 20
    python -m model.training.vqgan --decoder-only --from-bundle tiny    # codes stay as they are

The loss is the pixels' error, squared and absolute, plus the error of the differences of
neighbouring pixels (which keeps edges crisp). The codebook follows the latents nearest to its codes
by moving averages, and a code that is hardly used is moved to a latent of the batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bundle import load_v3
from model.config import find_bundle
from model.network_config import VQGANConfig
from model.networks.vqgan_v3 import VQGAN, ResidualBlock
from model.training import command, loop, tiny
from model.training.arguments import at_least
from model.training.data import Scenes
from model.training.scenes import ASPECTS

_CODEBOOK_DECAY = 0.99
# Weights of the terms beside the squared error.
_COMMITMENT = 0.03
_PLAIN = 0.05
_EDGES = 0.5
_DEAD = 0.02  # of the mean count
# Codes jump when they are revived, and the average of a code's old and new place is no code: the
# average is kept short.
_EMA = 0.95
_RATE = 1.5e-3


class Codebook(nn.Module):
    """Running counts and sums of the latents nearest to each code; the codes are their means."""

    counts: Tensor
    sums: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("counts", torch.ones(len(codes)))
        self.register_buffer("sums", codes.clone())

    @torch.no_grad()
    def follow(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Return the new codebook [K, c], from latents [N, c] and the nearest codes [N]."""
        won = torch.zeros_like(self.sums).index_add_(0, tokens, latents)
        count = torch.zeros_like(self.counts).index_add_(0, tokens, torch.ones_like(latents[:, 0]))
        self.counts.lerp_(count, 1 - _CODEBOOK_DECAY)
        self.sums.lerp_(won, 1 - _CODEBOOK_DECAY)
        return self.sums / self.counts.clamp_min(1e-4)[:, None]

    @torch.no_grad()
    def revive(self, latents: Tensor) -> None:
        """Move every code that is hardly used to a random latent."""
        mean = self.counts.mean()
        dead = self.counts < _DEAD * mean
        chosen = latents[torch.randint(len(latents), (len(dead),), device=latents.device)]
        self.sums.copy_(torch.where(dead[:, None], chosen * mean, self.sums))
        self.counts.copy_(torch.where(dead, mean, self.counts))


class Autoencoder(nn.Module):
    """A VQGAN, with the modules that only its training needs."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.codes = Codebook(vqgan.vquantizer.codebook.weight.detach())
        vqgan.vquantizer.codebook.weight.requires_grad_(False)

    @classmethod
    def fresh(cls, config: VQGANConfig) -> Autoencoder:
        """Return a VQGAN with random weights to train."""
        trained = cls(VQGAN(config))
        for block in trained.modules():
            if isinstance(block, ResidualBlock):
                # Published zeros would leave every residual branch without a gradient to start
                # from.
                block.gammas.data[[2, 5]] = 0.5
        return trained

    @classmethod
    def of(cls, state: dict[str, Tensor], config: VQGANConfig) -> Autoencoder:
        """Return a VQGAN that continues from published weights."""
        vqgan = VQGAN(config)
        vqgan.load_state_dict(state)
        return cls(vqgan)

    def start_from(self, latents: Tensor) -> None:
        """Set the codes to random latents of one batch, some twice if there are too few."""
        order = torch.randperm(len(latents), device=latents.device)
        chosen = latents[
            order.repeat(-(-len(self.codes.sums) // len(order)))[: len(self.codes.sums)]
        ]
        self.codes.sums.copy_(chosen)
        self.vqgan.vquantizer.codebook.weight.data.copy_(chosen)

    def freeze_codes(self) -> None:
        """Freeze the encoder and the codes, so that tokens keep their meaning."""
        for module in (self.vqgan.in_block, self.vqgan.down_blocks):
            module.requires_grad_(False).eval()

    @property
    def frozen(self) -> bool:
        """Return whether the encoder and the codes are frozen."""
        return not self.vqgan.in_block[1].weight.requires_grad

    def train(self, mode: bool = True) -> Autoencoder:
        """Set the training mode. Frozen layers stay in evaluation mode."""
        super().train(mode)
        if self.frozen:  # the batch norm's statistics are the codes' too
            self.vqgan.down_blocks.eval()
        return self

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn an image [B, 3, H, W] into (reconstruction, latents [N, c], tokens [N])."""
        latents = self.vqgan.encode_latents(image).float()
        flat = latents.flatten(0, 2)
        with torch.autocast(image.device.type, enabled=False):
            tokens = self.vqgan.vquantizer.nearest(flat.detach())
        codes = self.vqgan.vquantizer.codebook.weight[tokens].view_as(latents)
        through = latents + (codes - latents).detach()  # the straight-through estimate
        return self.vqgan.decode_latents(through), flat, tokens


def reconstruction_loss(output: Tensor, image: Tensor) -> Tensor:
    """Return the loss of an output against an image, both [B, 3, H, W].

    It sums the squared error of pixels, that of the differences of neighbours, and a little of the
    absolute error.
    """
    edges = sum(F.mse_loss(output.diff(dim=d), image.diff(dim=d)) for d in (-1, -2))
    return F.mse_loss(output, image) + _EDGES * edges + _PLAIN * F.l1_loss(output, image)


def training_loss(trained: Autoencoder, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (the objective, figures) for images [B, 3, H, W] of 0 … 1.

    Also updates the codebook, unless the codes are frozen.
    """
    output, latents, tokens = trained(image)
    output = output.float()
    loss = reconstruction_loss(output, image)
    figures = {"psnr": psnr(output.detach(), image)}
    if trained.frozen:
        return loss, figures
    codes = trained.vqgan.vquantizer.codebook.weight
    commitment = F.mse_loss(latents, codes[tokens])
    codes.data.copy_(trained.codes.follow(latents.detach(), tokens))
    trained.codes.revive(latents.detach())
    return loss + _COMMITMENT * commitment, figures


def psnr(output: Tensor, image: Tensor) -> Tensor:
    """Return the mean PSNR in dB over images [B, 3, H, W] of 0 … 1."""
    return (
        -10 * (output.clamp(0, 1) - image).square().mean((1, 2, 3)).clamp_min(1e-8).log10()
    ).mean()


def busy_crops(images: Tensor, size: int, tries: int = 3) -> Tensor:
    """Return for each of the images [B, 3, H, W] the crop with most variance: [B, 3, size, size].

    There are `tries` crops, at random places that are the same in all images. The network is local,
    and most of a scene is background: a quarter of the pixels teaches nearly as much as all of
    them.
    """
    _, _, H, W = images.shape
    tops = torch.randint(H - size + 1, (tries,)).tolist()
    lefts = torch.randint(W - size + 1, (tries,)).tolist()
    crops = torch.stack(
        [images[..., y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)]
    )
    busiest = crops.float().var((-1, -2)).sum(-1).argmax(0)  # [B]
    return crops[busiest, torch.arange(len(images), device=images.device)]


@torch.no_grad()
def held_out_psnr(vqgan: VQGAN, scenes: Scenes, images: int = 512, batch: int = 32) -> float:
    """Return the PSNR in dB over the corpus's last square images, which `train` leaves out."""
    members = scenes.of_aspect[0][-images:]
    values = []
    for index in members.split(batch):
        image = scenes.images(index)
        values.append(psnr(vqgan.decode(vqgan.encode(image)).float(), image) * len(index))
    return float(sum(values)) / len(members)


def _matrices(module: nn.Module) -> list[str]:
    """Return the names of the residual blocks' maps, for Muon."""
    return [name for name, p in module.named_parameters() if p.ndim == 2 and "channelwise" in name]


def train(
    trained: Autoencoder, scenes: Scenes, o: loop.Options, crop: int, held_out: int = 512
) -> VQGAN:
    """Train until the budget is spent, and return the averaged VQGAN.

    crop: pixels a side of the crops that it trains on. held_out: the number of square scenes at the
    corpus's end that are not trained on.
    """
    trained.train()
    members = scenes.of_aspect[0]
    members = members[: max(len(members) - held_out, len(members) // 2)]

    def batch() -> Tensor:
        image = scenes.images(scenes.some(o.batch, members)[0])
        return busy_crops(image, crop) if crop < min(ASPECTS[0]) else image

    if not o.resume and not trained.frozen and trained.codes.counts.eq(1).all():
        with torch.no_grad():
            wanted = len(trained.codes.sums)
            per = o.batch * (crop // trained.vqgan.config.downscale) ** 2
            latents = [
                trained.vqgan.encode_latents(batch()).flatten(0, 2)
                for _ in range(max(8, 2 * wanted // per))
            ]
            if trained.vqgan.vquantizer.codebook.weight.std() < 1e-2:  # untrained ones are tiny
                trained.start_from(torch.cat(latents))
    average: Any = loop.fit(
        trained, lambda: training_loss(trained, batch()), o, matrices=_matrices(trained)
    )
    vqgan: VQGAN = average.vqgan.eval()
    return vqgan


def main() -> None:
    """Train as the command line says."""
    p = loop.parser(__doc__, name="vqgan", batch=64, lr=_RATE, minutes=20, ema=_EMA)
    p.add_argument(
        "--crop",
        type=at_least(tiny.VQGAN.downscale),
        default=128,
        help="pixels a side of the crops it sees (default %(default)s)",
    )
    p.add_argument(
        "--from-bundle",
        metavar="BUNDLE",
        help="name or path of the bundle whose VQGAN to go on with",
    )
    p.add_argument(
        "--decoder-only", action="store_true", help="leave encoder and codes as they are"
    )
    args: argparse.Namespace = p.parse_args()
    o = loop.options(args)
    scenes = Scenes.load(args.corpus, o.device, o.seed)
    if args.from_bundle:
        kept = load_v3(find_bundle(args.from_bundle), torch.device("cpu"), torch.float32).vqgan
        trained = Autoencoder.of(kept.state_dict(), kept.config)
    else:
        trained = Autoencoder.fresh(tiny.VQGAN)
    if args.decoder_only:
        trained.freeze_codes()
    # Crops differ from step to step by numbers that the host draws, so a step is not recorded.
    train(trained.to(o.device), scenes, loop.replace(o, record=False), args.crop)


def trained_vqgan(checkpoint: Path, config: VQGANConfig | None = None) -> Autoencoder:
    """Return the autoencoder of a checkpoint (its average), or of a bundle's vqgan.safetensors.

    Weights alone do not hold how often each code was used, so those counts begin anew.
    """
    state = loop.load(checkpoint)
    config = config or tiny.VQGAN
    if "ema" not in state:
        return Autoencoder.of(state, config)
    trained = Autoencoder(VQGAN(config))
    trained.load_state_dict(state["ema"])
    return trained


if __name__ == "__main__":
    command.run(main)
