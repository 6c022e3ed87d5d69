"""Scenes as the denoiser and the prior see them: tokens and embeddings from the frozen networks of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from model.training.data import as_float, stream


@dataclass(frozen=True, slots=True)
class Examples:
    """B captioned scenes. tokens [B, H, W]; byt5 [B, L, D] with mask [B, L]; clip_text, clip_image [B, D']."""

    tokens: Tensor
    byt5: Tensor
    mask: Tensor
    clip_text: Tensor
    clip_image: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, bundle: Bundle, images: Tensor, captions: list[str]) -> Examples:
        """images: [B, 3, H, W] in [0, 1] on the bundle's device."""
        text = bundle.byt5(captions)
        return cls(
            tokens=bundle.vqgan.encode(images),
            byt5=text.embeddings,
            mask=text.mask,
            clip_text=bundle.clip.encode_text(captions),
            clip_image=bundle.clip.encode_image(images),
        )


def examples(
    bundle: Bundle, batch: int, seed: int, *, empty: float = 0.1, pool: int = 8, reuse: int = 3, workers: int = 0
) -> Iterator[Examples]:
    """Endless batches of B scenes each, captions of about one length together, because padding costs as much as text.

    empty: share of empty captions. A pool of `pool` batches is encoded at a time and gone through `reuse` times: the noise is fresh each
    time, and encoding costs as much as a third of a training step.
    """
    device = next(bundle.denoiser.parameters()).device
    scenes = stream(pool * batch, seed, workers=workers)
    rng = np.random.default_rng([seed, 1])
    while True:
        pixels, captions, _ = next(scenes)
        captions = ["" if rng.random() < empty else caption for caption in captions]
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        encoded = []
        for chosen in np.split(order, pool):
            images = as_float(pixels[torch.from_numpy(chosen)], device)
            encoded.append(Examples.of(bundle, images, [captions[i] for i in chosen]))
        for _ in range(reuse):
            for i in rng.permutation(pool):
                yield encoded[i]
