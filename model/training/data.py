"""Endless batches of freshly drawn captioned scenes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.training import captions, tiny

# Of the scenes that tokens are learnt from, this share lies on the tokens' own lattice. A circle's outline may fall across a token in
# endless ways, and each is another code; aligned, the same few codes draw it every time, and a small network has that many fewer to learn.
# The rest lies anywhere, as in the pictures that people upload.
_ALIGNED = 0.8

Batch = tuple[Tensor, list[str], dict[str, Tensor]]


class Source(Protocol):
    """Captioned pictures without end, a fixed number at a time."""

    identity: str  # differs for another source: a position in one says nothing about another

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many files could not be used, by reason."""

    def draw(self) -> tuple[Tensor, list[str]]:
        """(uint8 [N, 3, H, W], N captions)."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: everything that `draw` will return follows from this."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Scenes(Dataset[Batch]):
    """Batch i, whoever draws it: (pictures uint8 [B, 3, H, W], B captions, attribute classes [B] each)."""

    def __init__(self, batch: int, seed: int, aligned: float = 0.0) -> None:
        """aligned: the share of pictures that lie on the lattice of the VQGAN's tokens."""
        self.batch, self.seed, self.aligned = batch, seed, aligned

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self.seed, index])
        lattice = tiny.VQGAN.downscale
        images, texts, attributes = captions.batch(rng, self.batch, *tiny.NATIVE_SIZE, lattice=lattice, aligned=self.aligned)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return pixels, texts, {name: torch.from_numpy(classes) for name, classes in attributes.items()}


def stream(batch: int, seed: int, *, workers: int = 0, start: int = 0, aligned: float = 0.0) -> Iterator[Batch]:
    """The batches of `Scenes` from `start` on, without end, drawn in `workers` other processes (0: in this one)."""
    # Its own generator: a loader takes a number from torch's, and where a resumed training makes one, the original did not.
    generator = torch.Generator().manual_seed(seed)
    return iter(DataLoader(Scenes(batch, seed, aligned), batch_size=None, sampler=count(start), num_workers=workers, generator=generator))


class SceneSource:
    """Scenes as a source: where it stands is the number of batches drawn."""

    identity = "scenes"
    skipped: Mapping[str, int] = MappingProxyType({})

    def __init__(self, batch: int, seed: int, *, workers: int = 0) -> None:
        self.batch, self.seed, self.workers = batch, seed, workers
        self._drawn = 0
        self._stream: Iterator[Batch] | None = None

    def draw(self) -> tuple[Tensor, list[str]]:
        if self._stream is None:
            self._stream = stream(self.batch, self.seed, workers=self.workers, start=self._drawn, aligned=_ALIGNED)
        self._drawn += 1
        pixels, texts, _ = next(self._stream)
        return pixels, texts

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn, self._stream = state["drawn"], None


def as_float(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures → float32 in [0, 1] on the device."""
    return pixels.to(device, non_blocking=True).float().div_(255)
