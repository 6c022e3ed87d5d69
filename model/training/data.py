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

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __getitem__(self, index: int) -> Batch:
        images, texts, attributes = captions.batch(np.random.default_rng([self.seed, index]), self.batch, *tiny.NATIVE_SIZE)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return pixels, texts, {name: torch.from_numpy(classes) for name, classes in attributes.items()}


def stream(batch: int, seed: int, *, workers: int = 0, start: int = 0) -> Iterator[Batch]:
    """The batches of `Scenes` from `start` on, without end, drawn in `workers` other processes (0: in this one)."""
    # Its own generator: a loader takes a number from torch's, and where a resumed training makes one, the original did not.
    generator = torch.Generator().manual_seed(seed)
    return iter(DataLoader(Scenes(batch, seed), batch_size=None, sampler=count(start), num_workers=workers, generator=generator))


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
            self._stream = stream(self.batch, self.seed, workers=self.workers, start=self._drawn)
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
