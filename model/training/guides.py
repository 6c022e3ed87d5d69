"""Add losses on the denoiser's inner features: what a position's text and time should tell of it.

On the deepest features: their position, and the clean image's latents there. Nothing tells a
convolution its position but the zeros beyond the border, and a caption's "on the left" means
nothing to a network that cannot tell left from right; nor does knowing the position lower the loss
while "on the left" means nothing. From the tokens' cross-entropy alone, the network did not get
beyond that for 100,000 images (docs/log.md).

On the finest features: the clean image's latents again, and the things without their background.
A token at a thing's outline is another code before every background, so a network that only ever
sees codes learns every thing's outline once for each background. The things' own colours and
cover are the same before all of them.

The heads of these losses are not saved in a bundle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.networks.blocks_v3 import ConvBlock
from model.networks.denoiser_v3 import Denoiser
from model.networks.layers import norm
from model.training.judged import Neighbours

# How much each question counts beside the tokens.
_PLACE, _LATENTS, _FINE_LATENTS, _SPRITES = 0.2, 1.0, 0.5, 4.0
# Labels: this share goes to the codes nearest to the right one, whose images hardly differ.
_NEAR_SHARE = 0.2
_LONGEST = 64  # cells a side
_BLOCKS = 4  # a token's sprites are told in so many blocks a side


class Guided(nn.Module):
    """A denoiser, and the heads that only its training needs.

    codebook: [K, c], the VQGAN's. After every pass of `denoiser`, `loss` returns the losses of that
    pass. neighbours: the codes near each code, for the tokens' loss.
    """

    codebook: Tensor
    neighbours: Neighbours

    def __init__(self, denoiser: Denoiser, codebook: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        self.use_codebook(codebook)
        config = denoiser.config
        self.patch = config.patch_size << (
            len(config.c_hidden) - 1
        )  # tokens a side of a deepest cell
        self.place = nn.Linear(config.c_hidden[-1], 2 * _LONGEST)
        self.latents = nn.Linear(config.c_hidden[-1], self.patch**2 * codebook.shape[1])
        self.fine_latents = nn.Linear(config.c_hidden[0], config.patch_size**2 * codebook.shape[1])
        self.sprites = nn.Linear(config.c_hidden[0], config.patch_size**2 * 4 * _BLOCKS**2)
        self._deepest: Tensor | None = None
        self._finest: Tensor | None = None
        # The first block of the way up is handed what the way down has found.
        denoiser.up_blocks[0].get_submodule("0").register_forward_pre_hook(self._remember)
        last = [b for b in denoiser.up_blocks[-1].children() if isinstance(b, ConvBlock)][-1]
        last.register_forward_hook(self._remember_finest)

    def use_codebook(self, codebook: Tensor) -> None:
        """Take over the codes [K, c] of a VQGAN."""
        self.codebook.copy_(codebook.detach())
        self.neighbours = Neighbours.of(self.codebook, _NEAR_SHARE)

    def _remember(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._deepest = inputs[0]

    def _remember_finest(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._finest = output

    def loss(
        self, tokens: Tensor, sprites: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the term to add to the objective, figures to show) for the latest pass.

        tokens: the pass's clean tokens [B, H, W]. sprites: the things without their background,
        [B, 4, 4H, 4W] of 0 … 1, if they are known. Raises RuntimeError if the denoiser has not been
        run.
        """
        if self._deepest is None or self._finest is None:
            raise RuntimeError("the denoiser has not been run")
        x, self._deepest = norm(self._deepest).float(), None  # [B, h, w, C]
        fine, self._finest = norm(self._finest).float(), None
        clean = self.codebook[tokens]
        losses = {
            "place": self._place_loss(x),
            "latents": F.mse_loss(self.latents(x), _cells(clean, self.patch)),
            "fine": F.mse_loss(
                self.fine_latents(fine), _cells(clean, self.denoiser.config.patch_size)
            ),
        }
        total = (
            _PLACE * losses["place"] + _LATENTS * losses["latents"] + _FINE_LATENTS * losses["fine"]
        )
        if sprites is not None:
            side = self.denoiser.config.patch_size * _BLOCKS
            losses["sprites"] = F.mse_loss(
                self.sprites(fine), _cells(sprites.permute(0, 2, 3, 1), side)
            )
            total = total + _SPRITES * losses["sprites"]
        return total, {name: value.detach() for name, value in losses.items()}

    def _place_loss(self, x: Tensor) -> Tensor:
        B, h, w, _ = x.shape
        rows = torch.arange(h, device=x.device)[:, None].expand(B, h, w)
        columns = torch.arange(w, device=x.device).expand(B, h, w)
        for_rows, for_columns = self.place(x).flatten(0, 2).chunk(2, dim=-1)
        return F.cross_entropy(for_rows, rows.flatten()) + F.cross_entropy(
            for_columns, columns.flatten()
        )


def _cells(grid: Tensor, side: int) -> Tensor:
    """Turn [B, H, W, c] into [B, h, w, c·side²]: each square of `side` positions as one vector."""
    B, H, W, c = grid.shape
    return grid.view(B, H // side, side, W // side, side, c).transpose(2, 3).flatten(3)
