"""Add two losses on the denoiser's deepest features: their position, and the clean image there.

Nothing tells a convolution its position but the zeros beyond the border, and a caption's "on the
left" means nothing to a network that cannot tell left from right; nor does knowing the position
lower the loss while "on the left" means nothing. From the tokens' cross-entropy alone, the network
did not get beyond that for 100,000 images (docs/log.md). The heads of these losses are not saved in
a bundle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.networks.denoiser_v3 import Denoiser
from model.networks.layers import norm

_PLACE, _LATENTS = 0.2, 1.0  # how much either question counts beside the tokens
_LONGEST = 64  # cells a side


class Guided(nn.Module):
    """A denoiser, and the heads that only its training needs.

    codebook: [K, c], the VQGAN's. After every pass of `denoiser`, `loss` returns the losses of that
    pass.
    """

    codebook: Tensor

    def __init__(self, denoiser: Denoiser, codebook: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        config = denoiser.config
        self.patch = config.patch_size << (
            len(config.c_hidden) - 1
        )  # tokens a side of a deepest cell
        self.place = nn.Linear(config.c_hidden[-1], 2 * _LONGEST)
        self.latents = nn.Linear(config.c_hidden[-1], self.patch**2 * codebook.shape[1])
        self._deepest: Tensor | None = None
        # The first block of the way up is handed what the way down has found.
        denoiser.up_blocks[0].get_submodule("0").register_forward_pre_hook(self._remember)

    def _remember(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._deepest = inputs[0]

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the term to add to the objective, figures to show) for the latest pass.

        tokens: the pass's clean tokens [B, H, W]. Raises RuntimeError if the denoiser has not been
        run.
        """
        if self._deepest is None:
            raise RuntimeError("the denoiser has not been run")
        x, self._deepest = norm(self._deepest).float(), None  # [B, h, w, C]
        place = self._place_loss(x)
        latents = F.mse_loss(self.latents(x), self._patches(self.codebook[tokens]))
        return _PLACE * place + _LATENTS * latents, {
            "place": place.detach(),
            "latents": latents.detach(),
        }

    def _place_loss(self, x: Tensor) -> Tensor:
        B, h, w, _ = x.shape
        rows = torch.arange(h, device=x.device)[:, None].expand(B, h, w)
        columns = torch.arange(w, device=x.device).expand(B, h, w)
        for_rows, for_columns = self.place(x).flatten(0, 2).chunk(2, dim=-1)
        return F.cross_entropy(for_rows, rows.flatten()) + F.cross_entropy(
            for_columns, columns.flatten()
        )

    def _patches(self, latents: Tensor) -> Tensor:
        """Turn [B, H, W, c] into [B, h, w, c·p²]: the tokens of a deepest cell as one vector."""
        B, H, W, c = latents.shape
        p = self.patch
        return latents.view(B, H // p, p, W // p, p, c).transpose(2, 3).flatten(3)
