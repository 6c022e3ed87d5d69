"""Captioned pictures as the denoiser and the prior see them: tokens and embeddings from the frozen networks of a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from model.bundle import BundleV3
from model.training.data import SceneSource, Source, as_float


@dataclass(frozen=True, slots=True)
class Examples:
    """B captioned pictures. tokens [B, H, W]; byt5 [B, L, D] with mask [B, L]; clip_text, clip_image [B, D']; empty [B]: no caption."""

    tokens: Tensor
    byt5: Tensor
    mask: Tensor
    clip_text: Tensor
    clip_image: Tensor
    empty: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, bundle: BundleV3, images: Tensor, captions: list[str], dtype: torch.dtype = torch.float32) -> Examples:
        """images: [B, 3, H, W] in [0, 1] on the bundle's device. dtype: of the products; what comes out is fp32."""
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            text = bundle.byt5(captions)
            return cls(
                tokens=bundle.vqgan.encode(images),
                byt5=text.embeddings.float(),
                mask=text.mask,
                clip_text=bundle.clip.encode_text(captions).float(),
                clip_image=bundle.clip.encode_image(images).float(),
                empty=text.mask.sum(-1) <= 1,  # an end mark alone
            )


class ExampleStream:
    """Endless batches from a source, captions of about one length together, because padding costs as much as text.

    The source draws `pool` batches at a time; they are encoded once and gone through `reuse` times: the noise is fresh each time, and
    encoding costs as much as a third of a training step. What a pool does with its pictures follows from the seed and the pool's number, so
    a checkpoint holds where the source stood before the pool and how many of its batches were taken.
    """

    def __init__(
        self, bundle: BundleV3, source: Source, seed: int, *, pool: int, reuse: int, dtype: torch.dtype = torch.float32, empty: float = 0.1
    ) -> None:
        """pool: divides the number of pictures the source draws. dtype: of the encoders' products. empty: share of empty captions."""
        self.bundle, self.source, self.seed, self.pool, self.reuse, self.empty = bundle, source, seed, pool, reuse, empty
        self.dtype = dtype
        self.device = next(bundle.denoiser.parameters()).device
        self._number, self._taken = 0, 0
        self._before = source.state_dict()
        self._batches: list[Examples] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Examples:
        if not self._batches:
            self._batches = self._encoded()
        if self._taken >= len(self._batches):
            self._number, self._taken = self._number + 1, 0
            self._before = self.source.state_dict()
            self._batches = self._encoded()
        self._taken += 1
        return self._batches[self._taken - 1]

    def _encoded(self) -> list[Examples]:
        """The next pool's batches in the order in which they are met."""
        rng = np.random.default_rng([self.seed, 1, self._number])
        pixels, captions = self.source.draw()
        captions = ["" if rng.random() < self.empty else caption for caption in captions]
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        batches = []
        for chosen in np.split(order, self.pool):
            images = as_float(pixels[torch.from_numpy(chosen)], self.device)
            batches.append(Examples.of(self.bundle, images, [captions[i] for i in chosen], self.dtype))
        return [batches[i] for _ in range(self.reuse) for i in rng.permutation(self.pool)]

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many files could not be used, by reason."""
        return self.source.skipped

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: everything that it will yield follows from this."""
        return {"source": self.source.identity, "before": self._before, "pool": self._number, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; a position in another source (other files, another number of processes) is left alone, and that is said."""
        if state["source"] != self.source.identity:
            warnings.warn("this is not the data the checkpoint was trained on: it is begun with its first picture", stacklevel=2)
            return
        self._number, self._taken, self._before = state["pool"], state["taken"], state["before"]
        self.source.load_state_dict(self._before)
        self._batches = []


def examples(
    bundle: BundleV3,
    batch: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    empty: float = 0.1,
    pool: int = 48,
    reuse: int = 16,
    workers: int = 0,
) -> ExampleStream:
    """Endless batches of B scenes each."""
    source = SceneSource(pool * batch, seed, workers=workers)
    return ExampleStream(bundle, source, seed, pool=pool, reuse=reuse, dtype=dtype, empty=empty)
