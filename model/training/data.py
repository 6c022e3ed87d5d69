"""Endless batches of freshly drawn captioned scenes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.training import captions

Batch = tuple[Tensor, list[str], dict[str, Tensor]]


class Scenes(IterableDataset[Batch]):
    """Yields (pictures uint8 [B, 3, H, W], B captions, attribute classes [B] each). Every worker draws from its own stream."""

    def __init__(self, batch: int, seed: int, width: int = 64, height: int = 64) -> None:
        self.batch, self.seed, self.width, self.height = batch, seed, width, height

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            images, texts, attributes = captions.batch(rng, self.batch, self.width, self.height)
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            yield pixels, texts, {name: torch.from_numpy(classes) for name, classes in attributes.items()}


def stream(batch: int, seed: int, *, workers: int = 0, width: int = 64, height: int = 64) -> Iterator[Batch]:
    """An endless iterator over `Scenes`, drawn in `workers` other processes (0: in this one)."""
    return iter(DataLoader(Scenes(batch, seed, width, height), batch_size=None, num_workers=workers))


def as_float(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures → float32 in [0, 1] on the device."""
    return pixels.to(device, non_blocking=True).float().div_(255)
